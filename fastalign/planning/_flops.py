"""FLOPs of one sample, phase by phase: matrix products and attention, two for a multiply and add.

A product Y = X W of t rows takes 2 t |W| forward, as many for dX where X needs a gradient, and as
many for dW where W is trained. Attention of n tokens, w wide, takes 4 n^2 w, backward twice that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.adapters import AdapterConfig
from fastalign.adapters._config import build_parts
from fastalign.models._branch import _WORTH as PREFIX_WORTH
from fastalign.models._rows import _WORTH as ROWS_WORTH
from fastalign.ops._structure_portable import PANEL
from fastalign.planning._options import PlanConfig
from fastalign.planning._sizes import Sizes, Stack
from fastalign.planning._teacher import TeacherSizes


@dataclass(frozen=True)
class Shift:
    """Entries of the two convolutions of a shift module, and the layer that it follows."""

    layer: int
    first: int
    second: int
    hidden: int


@dataclass(frozen=True)
class Gradient:
    """Where the backward pass goes.

    Attributes:
        all: Whether every parameter is trained.
        tower, decoder: Layers that a gradient passes through, from 1.
        projector: Whether one passes through it.
        tower_shifts, decoder_shifts: The shift modules.
    """

    all: bool
    tower: tuple[int, ...]
    decoder: tuple[int, ...]
    projector: bool
    tower_shifts: tuple[Shift, ...]
    decoder_shifts: tuple[Shift, ...]


def find_gradient(
    sizes: Sizes, adapter: AdapterConfig | None, config: Any, everything: bool
) -> Gradient:
    """What the backward pass goes through: everything above the lowest trained parameter."""
    shifts: dict[str, tuple[Shift, ...]] = {"shifts": (), "decoder_shifts": ()}
    below_tower, below_decoder = sizes.last_read, sizes.decoder.layers
    if adapter is not None:
        with torch.device("meta"):
            parts = build_parts(adapter, config)
        for kind in shifts:
            shifts[kind] = tuple(_shift(int(k), m) for k, m in parts[kind].items())
        below_tower = min((s.layer for s in shifts["shifts"]), default=below_tower)
        layers = [s.layer for s in shifts["decoder_shifts"]]
        below_decoder = min([*layers, *map(int, parts["calibrations"])], default=below_decoder)
    from_tower = everything or bool(shifts["shifts"])
    if everything:
        below_tower = 0
    if from_tower:
        below_decoder = 0
    return Gradient(
        all=everything,
        tower=tuple(range(below_tower + 1, sizes.last_read + 1)) if from_tower else (),
        decoder=tuple(range(below_decoder + 1, sizes.decoder.layers + 1)),
        projector=from_tower,
        tower_shifts=shifts["shifts"],
        decoder_shifts=shifts["decoder_shifts"],
    )


def _shift(layer: int, module: nn.Module) -> Shift:
    first, second = (m.weight for m in module.modules() if isinstance(m, nn.Conv2d))
    return Shift(layer, first.numel(), second.numel(), first.shape[0])


def count(
    sizes: Sizes, gradient: Gradient, options: PlanConfig, teacher: TeacherSizes | None
) -> dict[str, float]:
    """FLOPs of one sample, by phase.

    Args:
        sizes: The model.
        gradient: Where the backward pass goes.
        options: The run.
        teacher: Of the distillation; None where none runs.
    """
    length = options.text_tokens + sizes.picture.image_tokens
    labels = options.label_tokens
    head = 2.0 * sizes.head
    phases = {
        "tower forward": _tower(sizes, range(sizes.tower.layers + 1), options),
        "projector forward": 2.0 * sizes.projector * _rows_between(sizes),
        "adapter forward": _shifts(sizes, gradient, 2.0),
        "decoder forward": _decoder(
            sizes, range(1, sizes.decoder.layers + 1), length, labels, options
        ),
        # The model's own forward makes one row of logits, the loss all rows with a label.
        "head forward": head * (labels + 1),
        "backward to activations": _to_activations(sizes, gradient, options, length),
        "backward to weights": _to_weights(sizes, gradient, options, length),
    }
    if options.checkpointing:
        phases["recomputation"] = _recomputed(sizes, gradient, options, length)
    if options.objective == "cal":
        phases["contrast branch"] = _branch(sizes, options)
    if options.intervenes:
        phases["second pass"] = _second_pass(sizes, options, length)
        phases["intervention"] = _intervention(sizes, options)
    if options.collects_pairs:
        phases["pass for negatives"] = _pass_for_negatives(sizes, gradient, options, length)
    if options.distils and teacher is not None:
        phases["teacher"] = 0.0 if options.teacher_cached else sizes.picture.views * teacher.flops
        phases["distillation"] = _distillation(sizes, options, teacher.width)
    return phases


def _rows_between(sizes: Sizes) -> int:
    return sizes.picture.views * sizes.picture.merged


def _attention(spans: Iterable[int], width: int, options: PlanConfig, causal: bool) -> float:
    share = 0.5 if causal and options.attention == "flash" else 1.0
    return share * 4.0 * width * sum(n**2 for n in spans)


def _backward(options: PlanConfig) -> float:
    """FLOPs of attention's backward pass over those of its forward one."""
    return 2.5 if options.attention == "flash" else 2.0


def _tower(sizes: Sizes, layers: Iterable[int], options: PlanConfig) -> float:
    """Forward of layers of the tower, from 1; 0 is the patch embedding."""
    picture, stack, total = sizes.picture, sizes.tower, 0.0
    for k in layers:
        if k == 0:
            total += 2.0 * sizes.patch * picture.patches
            continue
        total += 2.0 * stack.linear * picture.tokens
        total += _attention(picture.spans[k - 1], stack.queries, options, causal=False)
    return picture.views * total


def pruned(rows: int, length: int) -> int:
    """Rows that `only_rows` computes: those wanted, unless nearly all are."""
    return length if rows > ROWS_WORTH * length else rows


def _layer(stack: Stack, length: int, rows: int) -> float:
    """Forward of the matrices of a decoder layer of which some rows are wanted."""
    return 2.0 * (stack.rowless * length + (stack.linear - stack.rowless) * pruned(rows, length))


def _decoder(
    sizes: Sizes, layers: Iterable[int], length: int, rows: int, options: PlanConfig
) -> float:
    """Forward of decoder layers, of the last one of the stack only `rows`."""
    stack, total = sizes.decoder, 0.0
    for k in layers:
        total += _layer(stack, length, rows if k == stack.layers else length)
        total += _attention((length,), stack.queries, options, causal=True)
    return total


def _shifts(sizes: Sizes, gradient: Gradient, factor: float) -> float:
    picture = sizes.picture
    tower = picture.views * picture.patches * sum(s.first + s.second for s in gradient.tower_shifts)
    decoder = _rows_between(sizes) * sum(s.first + s.second for s in gradient.decoder_shifts)
    return factor * (tower + decoder)


def _to_activations(sizes: Sizes, gradient: Gradient, options: PlanConfig, length: int) -> float:
    """dX of every product above the lowest trained parameter, and the backward of attention."""
    picture, ratio = sizes.picture, _backward(options)
    total = 2.0 * sizes.head * options.label_tokens
    for k in gradient.tower:
        each = 2.0 * sizes.tower.linear * picture.tokens
        each += ratio * _attention(picture.spans[k - 1], sizes.tower.queries, options, causal=False)
        total += picture.views * each
    if gradient.projector:
        total += 2.0 * sizes.projector * _rows_between(sizes)
    for k in gradient.decoder:
        rows = options.label_tokens if k == sizes.decoder.layers else length
        total += _layer(sizes.decoder, length, rows)
        total += ratio * _attention((length,), sizes.decoder.queries, options, causal=True)
    for shifts, rows, flows in (
        (gradient.tower_shifts, picture.views * picture.patches, gradient.tower),
        (gradient.decoder_shifts, _rows_between(sizes), gradient.decoder),
    ):
        for shift in shifts:  # the input of the lowest one needs none
            total += 2.0 * rows * (shift.second + shift.first * (shift.layer in flows))
    return total


def _to_weights(sizes: Sizes, gradient: Gradient, options: PlanConfig, length: int) -> float:
    """dW of every product whose matrix is trained."""
    total = _shifts(sizes, gradient, 2.0)
    if not gradient.all:
        return total
    picture, decoder = sizes.picture, sizes.decoder
    total += 2.0 * picture.views * sizes.patch * picture.patches
    total += 2.0 * picture.views * len(gradient.tower) * sizes.tower.linear * picture.tokens
    total += 2.0 * sizes.projector * _rows_between(sizes)
    for k in gradient.decoder:
        total += _layer(decoder, length, options.label_tokens if k == decoder.layers else length)
    return total + 2.0 * sizes.head * options.label_tokens


def _recomputed(sizes: Sizes, gradient: Gradient, options: PlanConfig, length: int) -> float:
    """The forward of checkpointed layers once more, but for their last matrix.

    The last layer of the decoder, on few rows, is never checkpointed.
    """
    inner = [k for k in gradient.decoder if k < sizes.decoder.layers]
    rows = sizes.picture.views * sizes.picture.tokens * len(gradient.tower)
    spared = 2.0 * (sizes.tower.closing * rows + sizes.decoder.closing * length * len(inner))
    tower = _tower(sizes, gradient.tower, options)
    return tower + _decoder(sizes, inner, length, length, options) - spared


def _branch(sizes: Sizes, options: PlanConfig) -> float:
    """CAL's image-free forward: text up to the last predictor, the prefix as keys and values."""
    kept = options.text_tokens - 1
    prefix = options.prefix_tokens if options.prefix_tokens > PREFIX_WORTH * kept else 0
    total = 0.0
    for k in range(1, sizes.decoder.layers + 1):
        last = k == sizes.decoder.layers
        total += _layer(sizes.decoder, kept, options.label_tokens if last else kept - prefix)
        total += _attention((kept,), sizes.decoder.queries, options, causal=True)
    return total


def deepest(sizes: Sizes, options: PlanConfig) -> int:
    """The last decoder layer of the base model's pass: as `DeepAlignState` chooses it."""
    return max(options.deepalign.layers, default=max(1, sizes.decoder.layers // 5))


def _second_pass(sizes: Sizes, options: PlanConfig, length: int) -> float:
    """Tower, projector, and the decoder up to the deepest pooled layer, of it two rows a sample."""
    return _pass_until_pooled(sizes, options, length, options.deepalign.pool == "last")


def _pass_for_negatives(
    sizes: Sizes, gradient: Gradient, options: PlanConfig, length: int
) -> float:
    """The adapted model up to the deepest pooled layer: `objectives.mutual_shares`."""
    adapters = _shifts(sizes, gradient, 2.0)
    return _pass_until_pooled(sizes, options, length, False) + adapters


def _pass_until_pooled(sizes: Sizes, options: PlanConfig, length: int, pruned: bool) -> float:
    last = deepest(sizes, options)
    total = _tower(sizes, range(sizes.tower.layers + 1), options)
    total += 2.0 * sizes.projector * _rows_between(sizes)
    stack = sizes.decoder
    for k in range(1, last + 1):
        total += _layer(stack, length, 2 if k == last and pruned else length)
        total += _attention((length,), stack.queries, options, causal=True)
    return total


def _intervention(sizes: Sizes, options: PlanConfig) -> float:
    """The classifier and its gradient for both modalities, and InfoNCE over all samples at once."""
    width = sizes.decoder.width
    widths = [width, *options.deepalign.classifier_hidden_dims, 2]
    pairs = [n * m for n, m in zip(widths[:-1], widths[1:], strict=True)]
    total = 2 * 2.0 * (sum(pairs) + sum(pairs[:-1]))
    if options.deepalign.weight("mutual"):
        pairs_of_step = options.batch_size * options.accumulation * options.gpus
        total += 3 * 2.0 * width * pairs_of_step * options.gpus
    return total


def _distillation(sizes: Sizes, options: PlanConfig, teacher_width: int) -> float:
    """Similarities of patches of student and teacher, and the gradient, half of them at a time."""
    n, width = sizes.picture.merged, sizes.decoder.width
    cells = square = 0
    for first in range(0, n, PANEL):
        rows = min(PANEL, n - first)
        cells, square = cells + rows * (n - first), square + rows**2
    each = 2.0 * cells * (width + teacher_width) + 2.0 * (2 * cells - square) * width
    return sizes.picture.views * max(1, len(options.deepalign.student_layers)) * each
