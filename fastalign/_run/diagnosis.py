"""Which tensor of a step was the first that is not finite: its inputs, or what the step made.

The step is run again, from the same random numbers: without gradient and with a look at the output
of every module, in the order in which they end; if all of them are finite, with gradients. Every
rank takes part, as the forward exchanges, and all return the same name: that of the rank that has
it, since a NaN of one rank is in the gradients of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastalign._run.looks import bad_input, is_finite, looking
from fastalign._run.steps import Steps
from fastalign.models import VLM, Batch, is_sharded
from fastalign.objectives import DeepAlignState, Terms

# Stage, what comes first within it, micro-batch; then the name.
Finding: TypeAlias = tuple[tuple[int, int, int], str]

# In the order in which they follow from each other.
_TERMS = ("delta", "weight", "ce", "global", "instance", "mutual", "visual", "loss")
_SUMMED = (2, 1, 0)


class Beginning:
    """What a step draws from and changes before its optimizer does: generators, running statistics.

    Args:
        model: Its normalisations may keep statistics.
        state: Its global direction takes in the pairs of a step in the forward.
        device: Of the step.
    """

    def __init__(self, model: nn.Module, state: DeepAlignState | None, device: torch.device):
        kinds = nn.modules.batchnorm._NormBase
        self._modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, kinds)]
        self._modules += [] if state is None else [state.direction]
        self._device = device
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._generators = self._states()

    def keep(self) -> None:
        """Take note of them; nothing waits for the device."""
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        self._kept = [(buffer, buffer.clone()) for buffer in buffers]
        self._generators = self._states()

    def restore(self) -> None:
        """Give the running statistics back what they held."""
        with torch.no_grad():
            for buffer, value in self._kept:
                buffer.copy_(value)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Code inside draws what the step drew, and leaves no trace."""
        now = self._states()
        self.restore()
        self._set(self._generators)
        try:
            yield
        finally:
            self.restore()
            self._set(now)

    def _states(self) -> tuple[Tensor, Tensor | None]:
        if self._device.type == "cpu":
            return torch.get_rng_state(), None
        return torch.get_rng_state(), torch.get_device_module(self._device).get_rng_state()

    def _set(self, states: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.get_device_module(self._device).set_rng_state(states[1])


@dataclass
class StepAgain:
    """A step that can be run again.

    Attributes:
        vlm, state: The model, and the objective's state.
        run: A micro-batch, by its number from 0, to its terms, through the engine's wrapper.
        micro: The micro-batches of this rank.
        indices: Of a micro-batch, from 0: where its samples stand in the data, if that is known.
        beginning: Of the step.
        accelerator: Of the run.
        module: What the engine wrapped.
        ends: Of the run; None where gradients lie in the parameters.
    """

    vlm: VLM
    state: DeepAlignState | None
    run: Callable[[int], Terms]
    micro: Sequence[Batch]
    indices: Callable[[int], Sequence[int] | None]
    beginning: Beginning
    accelerator: Any
    module: nn.Module
    ends: Steps | None = None

    def first(self) -> str | None:
        """The first tensor that is not finite, over all ranks, which all have to call this.

        None when every tensor is finite this time.
        """
        for stage in (self._inputs, self._forward, self._backward):
            found = self._earliest(stage())
            if found is not None:
                return found
        return None

    def describe(self, bad: Sequence[str], step: int) -> str:
        """What is not finite in step `step`, from 1, and what was first; every rank has to call."""
        first = self.first()
        if first is None and list(bad) == ["gradient norm"]:
            first = "the sum of the squares of finite gradients, too large for its dtype"
        found = f"the first was {first}" if first else "not so when the step was run again"
        return (
            f"{', '.join(bad)} not finite at step {step}: {found}. Parameters, moments and running "
            "direction are those of the step before, and the checkpoints are whole"
        )

    def _earliest(self, own: Finding | None) -> str | None:
        """The earliest of what the ranks found; of several, that of the lowest rank."""
        from accelerate.utils import gather_object

        rank = self.accelerator.process_index
        # What was summed over the ranks is not of any one of them.
        at = "" if own is None or own[0] == _SUMMED else f", on rank {rank}"
        named = [] if own is None else [(own[0], rank, own[1] + at)]
        found = gather_object(named) if self.accelerator.num_processes > 1 else named
        return min(found)[2] if found else None

    def _inputs(self) -> Finding | None:
        for number, batch in enumerate(self.micro):
            indices = self.indices(number)
            found = bad_input(self.vlm, batch, f"micro-batch {number + 1}", indices)
            if found is not None:
                return (0, 0, number), found
        return None

    def _forward(self) -> Finding | None:
        first: Finding | None = None
        with self.beginning.again(), torch.no_grad():
            for number in range(len(self.micro)):
                with looking(self.vlm, self.state) as seen:
                    terms = self._eager(number)  # after a find too: other ranks wait for this one
                bad = [k for k, v in terms.items() if not v.isfinite().all()]
                bad.sort(key=lambda k: _TERMS.index(k) if k in _TERMS else len(_TERMS))
                seen += ["delta" if k == "delta" else f"term {k}" for k in bad]
                kind = 1 if seen and seen[0].startswith(("term ", "delta")) else 0
                # A term may hold what came of a later micro-batch, its modules may not.
                if seen and (first is None or kind < first[0][1]):
                    first = (1, kind, number), f"{seen[0]} of micro-batch {number + 1}"
        return first

    def _eager(self, number: int) -> Terms:
        """The micro-batch's terms, uncompiled, since compiled code does not call hooks."""
        with torch.compiler.set_stance("force_eager"):
            terms = self.run(number)
        if is_sharded(self.module) and not torch.is_grad_enabled():
            self.module.reshard()  # type: ignore[operator]  # a backward would have
        return terms

    def _backward(self) -> Finding | None:
        named = [(k, p) for k, p in self.vlm.model.named_parameters() if p.requires_grad]
        gradient: Callable[[Tensor], Tensor | None] = lambda p: p.grad
        if self.ends is not None:
            gradient = self.ends.gradient  # of all ranks together, where they lie in parts
        whole = [k for k, p in named if (g := gradient(p)) is not None and not is_finite(g)]
        first: Finding | None = None
        local = not is_sharded(self.module) and (self.ends is None or self.ends.local)
        if local:
            first = self._local(named)
        if first is None and whole:
            anew = (
                ""
                if is_sharded(self.module) or not local
                else ", finite when the step was run again"
            )
            first = _SUMMED, f"gradient of {whole[0]}, summed over the ranks{anew}"
        return first

    def _local(self, named: list[tuple[str, nn.Parameter]]) -> Finding | None:
        """The first gradient of this rank alone; leaves gradients behind that mean nothing."""
        seen: list[str] = []
        handles = [_watched(p, _noting(k, seen)) for k, p in named]
        first: Finding | None = None
        try:
            with self.beginning.again(), torch.enable_grad():
                for number in range(len(self.micro)):
                    for _, parameter in named:
                        parameter.grad = None
                    with self.accelerator.no_sync(self.module):
                        loss = self._eager(number)["loss"] * self.accelerator.num_processes
                        self.accelerator.backward(loss)
                    if seen and first is None:
                        first = (2, 0, number), f"{seen[0]} of micro-batch {number + 1}"
        finally:
            for handle in handles:
                handle.remove()
        return first


def _watched(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _noting(name: str, seen: list[str]) -> Callable[[Tensor], None]:
    def note(parameter: Tensor) -> None:
        if not seen and parameter.grad is not None and not is_finite(parameter.grad):
            seen.append(f"gradient of {name}")

    return note
