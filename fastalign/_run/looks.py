"""Looks at the tensors of a batch and at what modules return, for what is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import VLM, Batch, evaluating, layer_stack
from fastalign.objectives import DeepAlignState


def is_finite(tensor: Tensor) -> bool:
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(local.isfinite().all())


def unfit(batch: Mapping[str, Any]) -> float | Tensor:
    """0 for a batch whose tensors are finite, else NaN; of tensors on a device a tensor there.

    A sum tells, at a hundredth of the time that it takes to look at each number. On the CPU, where
    it is in float32, the numbers have the last word, as a sum may overflow.
    """
    flag: float | Tensor = 0.0
    for _, tensor in _floating(batch):
        if tensor.device.type == "cpu":
            fine = tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all()
            flag = flag + (0.0 if fine else math.nan)
        else:
            flag = flag + 0.0 * tensor.sum(dtype=torch.float64)
    return flag


def _floating(batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors of a batch by name, those in lists too."""
    for name, value in batch.items():
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield name, tensor


def bad_input(vlm: VLM, batch: Batch, of: str, indices: Sequence[int] | None) -> str | None:
    """The first tensor of a batch that is not finite, and its sample; None when all are.

    Args:
        vlm: Knows which sample a picture is of.
        batch: See `VLM`.
        of: What the batch is called.
        indices: Where its samples stand in the data; None where that is not known.
    """
    for name, tensor in _floating(batch):
        numbers = tensor.detach().isfinite()
        rows = numbers.flatten(1).all(1) if tensor.dim() > 1 else numbers.flatten()
        if rows.all():
            continue
        row = int((~rows).nonzero()[0, 0])
        sample: int | None = row
        if name == "pixel_values" or name == "teacher" or len(rows) != len(batch["input_ids"]):
            view = row if name == "teacher" else _bad_view(vlm, batch)
            sample = None if view is None else _sample_of_view(vlm, batch, view)
        if name == "teacher":
            name = f"teacher features of view {row + 1}"
        if sample is None:
            return f"{name} of {of}, row {row + 1}"
        known = indices is not None and sample < len(indices)
        at = f" (index {indices[sample]})" if indices is not None and known else ""
        return f"{name} of {of}, sample {sample + 1}{at}"
    return None


def bad_output(vlm: VLM, batches: Iterable[Batch], layers: Sequence[int]) -> str | None:
    """The first output of a module that is not finite on the way to decoder layers `layers`."""
    for number, batch in enumerate(batches, 1):
        with evaluating(vlm.model), looking(vlm, None) as seen:
            vlm.hidden_states(batch, layers)
        if seen:
            return f"{seen[0]} in batch {number}"
    return None


def _bad_view(vlm: VLM, batch: Batch) -> int | None:
    """The first picture whose pixels are not finite; None where pictures cannot be told apart."""
    with contextlib.suppress(Exception):  # families differ; the row is named then
        for number, view in enumerate(vlm.views(batch)):
            if not view.isfinite().all():
                return number
    return None


def _sample_of_view(vlm: VLM, batch: Batch, view: int) -> int | None:
    with contextlib.suppress(Exception):
        try:
            patches = vlm.patches(batch)
        except ValueError:
            patches = vlm.queries(batch)
        place = patches.places[int(patches.cu_seqlens[view])]
        return int(place) // int(batch["input_ids"].shape[1])
    return None


@contextlib.contextmanager
def looking(vlm: VLM, state: DeepAlignState | None) -> Iterator[list[str]]:
    """Gives the names of outputs that are not finite, the first of them first."""
    seen: list[str] = []

    def look(label: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if seen or all(t.isfinite().all() for t in _outputs(output)):
                return
            own = module.named_parameters(recurse=False)
            bad = [name for name, p in own if not is_finite(p)]
            seen.append(label + (f", whose {bad[0]} is not finite" if bad else ""))

        return hook

    labels = _labels(vlm)
    handles = [
        module.register_forward_hook(look(labels[name]))
        for name, module in vlm.model.named_modules()
    ]
    teacher = None if state is None else state._teacher[0]
    if state is not None and teacher is not None:
        state._teacher[0] = _looking_at(teacher, seen)
    try:
        yield seen
    finally:
        if state is not None:
            state._teacher[0] = teacher
        for handle in handles:
            handle.remove()


def _looking_at(teacher: Callable[[Batch], Any], seen: list[str]) -> Callable[[Batch], Any]:
    def call(batch: Batch) -> Any:
        features = teacher(batch)
        for view, each in enumerate(features, 1):
            if not seen and not each.isfinite().all():
                seen.append(f"teacher features of view {view}")
        return features

    return call


def _outputs(output: Any) -> Iterable[Tensor]:
    """The hidden states that a module returns; mappings hold what other modules returned."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return [first] if isinstance(first, Tensor) and first.is_floating_point() else []


def _labels(vlm: VLM) -> dict[str, str]:
    """Every module's name, as it is called in a message."""
    places = {id(layer): f"decoder layer {k}" for k, layer in enumerate(vlm.layers, 1)}
    with contextlib.suppress(TypeError):  # towers of convolutions have no stack
        tower = enumerate(layer_stack(vlm.vision_tower), 1)
        places |= {id(layer): f"layer {k} of the vision tower" for k, layer in tower}
    layers = {k: places[id(m)] for k, m in vlm.model.named_modules() if id(m) in places}
    labels = {}
    for name, module in vlm.model.named_modules():
        above = [prefix for prefix in layers if name == prefix or name.startswith(prefix + ".")]
        if above:
            inner = name[len(above[0]) + 1 :]
            labels[name] = f"hidden states of {layers[above[0]]}" + (f" ({inner})" if inner else "")
        else:
            labels[name] = f"output of {name or type(module).__name__}"
    return labels
