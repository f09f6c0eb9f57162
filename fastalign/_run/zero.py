"""DeepSpeed's ZeRO-2: weights whole on every rank, gradients and moments in parts.

DeepSpeed adds up the gradients of ranks in the order in which a backward makes them. A rank whose
batch has no image makes others, in another order, and DeepSpeed would add up what does not belong
together. So a backward first makes all gradients of a micro-batch, and they are handed over in one
order, zeros for what had no part in it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign._run.steps import Steps

MOMENTS = ("exp_avg", "exp_avg_sq")


class Handover(nn.Module):
    """What DeepSpeed sees of a loss: a forward whose backward gives the gradients it was given."""

    def __init__(self, loss: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.loss, self._parameters_in_order = loss, list(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """0, whose gradient for each parameter is the one of `gradients` in its place."""
        given: Any = _Given
        value: Tensor = given.apply(len(gradients), *gradients, *self._parameters_in_order)
        return value


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.gradients = tensors[:count]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, ()
        return None, *[None] * len(gradients), *gradients


class ZeroSteps(Steps):
    """Steps of ZeRO-2; the loop's order is kept: backward, division, norm, guard, step.

    Args:
        accelerator: Of the run.
        loss: An `engines.Step`, which runs micro-batches past DeepSpeed: its weights are whole.
        engine: DeepSpeed's, of a `Handover`.
        parameters: The trained ones, in the order in which they are handed over.
        groups: Of the optimizer, with the model's parameters.
    """

    local = False

    def __init__(
        self,
        accelerator: Any,
        loss: nn.Module,
        engine: Any,
        parameters: Sequence[nn.Parameter],
        groups: list[dict[str, Any]],
    ) -> None:
        super().__init__(accelerator, loss, ZeroMoments(engine, groups), parameters)
        self._engine = engine
        self._in_use = [False] * len(parameters)

    def micro_batch(self, last: bool) -> Any:
        """Nothing: DeepSpeed is told which one is the last when it is handed gradients."""
        return contextlib.nullcontext()

    def backward(self, share: Tensor, last: bool) -> None:
        """Hand over the gradients of a micro-batch's share of the loss."""
        found = torch.autograd.grad(share, self.parameters, allow_unused=True)
        for number, gradient in enumerate(found):
            self._in_use[number] |= gradient is not None
        ranks = self.accelerator.num_processes  # DeepSpeed averages over them
        given = [
            torch.zeros_like(p) if gradient is None else gradient * ranks
            for p, gradient in zip(self.parameters, found, strict=True)
        ]
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(self._engine(given))

    def norm(self) -> Tensor:
        """Of all gradients together, from every rank's part."""
        square = nn.utils.get_total_norm(self._gradients()).double().square()
        whole: Tensor = self.accelerator.reduce(square)
        return whole.sqrt().float()

    def take(self, norm: Tensor, limit: float) -> None:
        """Scale each rank's part down, and let DeepSpeed step and gather the weights.

        What had no part in the step on any rank is neither moved nor decayed, as elsewhere.
        """
        if limit:
            factor = (limit / (norm + 1e-6)).clamp_max(1.0)  # as torch's clipping does
            for gradient in self._gradients():
                gradient.mul_(factor)
        counts = torch.tensor(self._in_use, dtype=torch.float32, device=self.accelerator.device)
        users = self.accelerator.reduce(counts).tolist()
        pairs = list(zip(self.parameters, users, strict=True))
        with self.optimizer.holding([p for p, number in pairs if not number]):
            self._engine.step()
        self.optimizer.stepped |= {id(p) for p, number in pairs if number}

    def clear(self) -> None:
        """Forget what DeepSpeed keeps of a step that is left out, as it does after one it takes."""
        optimizer = self._engine.optimizer
        self._in_use = [False] * len(self.parameters)
        for number in range(len(optimizer.bit16_groups)):
            optimizer.averaged_gradients[number] = None
            optimizer.all_grad_tensors[number] = None
        optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Gathered from the ranks."""
        from deepspeed.utils import safe_get_full_grad

        whole: Tensor | None = safe_get_full_grad(parameter)
        return whole

    def moments(self) -> Any:
        """Whole ones, kept by the first rank, which writes them."""
        self.optimizer.gather(self.accelerator.is_main_process)
        return self.optimizer

    def _gradients(self) -> list[Tensor]:
        """This rank's part of the step's gradients, which DeepSpeed steps from."""
        parts = self._engine.optimizer.averaged_gradients.values()
        return [gradient for part in parts for gradient in part]


class ZeroMoments:
    """AdamW's moments by the position of each parameter, whole, of flat ones in parts.

    Args:
        engine: DeepSpeed's.
        groups: With the model's parameters.

    Attributes:
        stepped: The parameters that have moments, by their id.
    """

    def __init__(self, engine: Any, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.stepped: set[int] = set()
        self._zero = engine.optimizer
        self._state: dict[int, dict[str, Tensor]] = {}

    def gather(self, keep: bool) -> None:
        """Take note of the moments on the ranks that keep them; every rank must call."""
        self._state = {}
        for position, (parameter, flat) in enumerate(self._pairs()):
            if id(parameter) not in self.stepped:
                continue
            state = self._zero.optimizer.state[flat]
            whole = {key: _add_parts(parameter, state[key]) for key in MOMENTS}
            if keep:
                self._state[position] = {"step": state["step"].clone().cpu()}
                self._state[position] |= {key: value.cpu() for key, value in whole.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `gather` noted."""
        return {"state": self._state, "param_groups": []}

    @torch.no_grad()
    def load_state_dict(self, given: dict[str, Any]) -> None:
        """Take this rank's part of whole moments, and of the weights as the model has them now."""
        states = self._zero.optimizer.state
        for position, (parameter, flat) in enumerate(self._pairs()):
            whole = given["state"].get(position)
            if whole is None:
                continue
            if not states[flat]:
                states[flat] |= {key: torch.zeros_like(flat) for key in MOMENTS}
                states[flat]["step"] = whole["step"].clone()
            self.stepped.add(id(parameter))
            _take_part(parameter, whole, states[flat])
        self._zero.refresh_fp32_params()

    @contextlib.contextmanager
    @torch.no_grad()
    def holding(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """A step inside leaves `parameters` and their moments as they are."""
        chosen = {id(p) for p in parameters}
        whole = [(p, p.detach().clone()) for p in parameters]
        parts: list[tuple[Tensor, Tensor]] = []
        for parameter, flat in self._pairs():
            places = _places(parameter)
            if id(parameter) in chosen and places is not None:
                state = self._zero.optimizer.state.get(flat, {})
                own = [flat, *(state[key] for key in MOMENTS if key in state)]
                parts += [(tensor[places[1]], tensor[places[1]].clone()) for tensor in own]
        yield
        for tensor, value in [*whole, *parts]:
            tensor.copy_(value)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter, and the flat tensor that holds this rank's part of it."""
        flats = [group["params"][0] for group in self._zero.optimizer.param_groups]
        for group, flat in zip(self.param_groups, flats, strict=True):
            yield from ((parameter, flat) for parameter in group["params"])


def _places(parameter: Any) -> tuple[slice, slice] | None:
    """Of this rank's part: in the flattened parameter, and in the rank's flat tensor; or None.

    DeepSpeed's functions for this find the moments of the first group only.
    """
    if parameter._hp_mapping is None:
        return None
    own = parameter._hp_mapping.lp_fragment_address
    flat = parameter._hp_mapping.get_hp_fragment_address()
    return slice(own.start, own.start + own.numel), slice(flat.start, flat.start + flat.numel)


def _add_parts(parameter: Tensor, flat: Tensor) -> Tensor:
    whole = torch.zeros_like(parameter, dtype=flat.dtype).flatten()
    places = _places(parameter)
    if places is not None:
        whole[places[0]] = flat[places[1]]
    torch.distributed.all_reduce(whole)
    return whole.view(parameter.shape)


def _take_part(parameter: Tensor, whole: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    places = _places(parameter)
    if places is not None:
        for key in MOMENTS:
            state[key][places[1]] = whole[key].flatten()[places[0]].to(state[key])
