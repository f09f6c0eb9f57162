"""DeepAlign's intervention: pooled representations, shift directions and the three terms.

A step takes all samples of a batch through the same code, whether they are image-text pairs or not:
those that are not count 0. So no shape depends on what the batch holds, nothing waits for the
device, and every rank takes part in every exchange.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastalign import losses, ops
from fastalign.adapters import disabled
from fastalign.models import VLM, Batch, Forward, evaluating, is_sharded
from fastalign.models._rows import only_rows
from fastalign.nn import ModalityClassifier
from fastalign.objectives._terms import Terms, Totals, pair_masks, share, zero_of
from fastalign.ops._autocast import no_autocast

if TYPE_CHECKING:
    from fastalign.objectives._deepalign import DeepAlignConfig, DeepAlignState
    from fastalign.objectives._negatives import MutualShare

TEXT, VISION = 0, 1
# Base vision, base text and shifted vision vectors, (b, d) each, and which samples are pairs, (b,).
Vectors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def pooled(hidden: list[Tensor], mask: Tensor, pool: str) -> Tensor:
    """One vector per sample, averaged over layers (appendix A: cross-layer pooled).

    "last" reads one row a layer and sample, "mean" a float32 copy of each layer. (Float64 stays.)

    Args:
        hidden: Layers, each (b, L, d).
        mask: The modality's tokens, (b, L).
        pool: "last" or "mean".

    Returns:
        (b, d) float32 (float64 of float64), differentiable; 0 for a sample without such a token.
    """
    if pool == "last":
        rows = last_places(mask)
        vectors = [h.flatten(0, 1)[rows].to(_wide(h.dtype)) for h in hidden]
    else:
        share = mask.to(_wide(hidden[0].dtype)) / mask.sum(1, keepdim=True).clamp_min(1)
        with no_autocast(share):
            vectors = [torch.einsum("bl,bld->bd", share, h.to(share.dtype)) for h in hidden]
    return torch.stack(vectors).mean(0).masked_fill(~mask.any(1, keepdim=True), 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def last_places(mask: Tensor) -> Tensor:
    """Where each sample's last token of a mask (b, L) lies in the flattened batch, (b,).

    The last place of a sample without any.
    """
    last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
    return last + mask.shape[1] * torch.arange(len(mask), device=mask.device)


def base_vectors(
    vlm: VLM, batch: Batch, state: DeepAlignState, masks: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Vectors of two modalities of the base model, (b, d) each, in evaluation mode.

    With `pool="last"` the deepest layer computes its queries and its MLP for their rows only.
    """
    pool = state.config.pool
    pruned: AbstractContextManager[None] = nullcontext()
    if pool == "last" and not torch.compiler.is_compiling():
        rows = torch.cat([last_places(mask) for mask in masks])
        deepest = vlm.layers[max(state.layers) - 1]
        pruned = only_rows(deepest, rows, (masks[0].shape[0], masks[0].shape[1]))
    with evaluating(vlm.model), disabled(vlm.model):
        with pruned:
            hidden = vlm.hidden_states(batch, state.layers)
        first, second = (pooled(hidden, mask, pool) for mask in masks)
    return first, second


def has_images(batch: Batch) -> bool:
    """Whether the vision tower has anything to see."""
    return any(key.startswith("pixel_values") for key in batch)


def pair_vectors(vlm: VLM, batch: Batch, state: DeepAlignState) -> Vectors:
    """What the mutual term reads of a batch, without gradient; the adapted model as it stands.

    Passes end after the deepest of `state.layers`. A batch without images needs none, unless the
    model is sharded: its modules then run as on the other ranks.
    """
    pair, vision, text = pair_masks(vlm, batch)
    if not has_images(batch) and not is_sharded(vlm.model):
        zeros = _zeros(vlm, len(pair))
        return zeros, zeros, zeros, pair
    with torch.no_grad():
        shifted = pooled(vlm.hidden_states(batch, state.layers), vision, state.config.pool)
    return *base_vectors(vlm, batch, state, (vision, text)), shifted, pair


def _zeros(vlm: VLM, rows: int) -> Tensor:
    weight: Tensor = vlm.head.weight
    return torch.zeros(rows, vlm.hidden_size, dtype=_wide(weight.dtype), device=weight.device)


def mutual_term(
    h_v: Tensor, h_t: Tensor, shifted: Tensor, pair: Tensor, config: DeepAlignConfig
) -> Tensor:
    """L_MI = -(MI(h'_v, h_t) - MI(h_v, h_t)) of the pairs of all ranks, in nats (section 1.4)."""
    options: dict[str, Any] = {"estimator": config.estimator, "gather": True, "mask": pair}
    if config.estimator == "infonce":
        options["temperature"] = config.temperature
    information = losses.mutual_information
    return information(h_v, h_t, **options) - information(shifted, h_t, **options)


def representations(
    vlm: VLM, batch: Batch, layers: Iterable[int], pool: str
) -> tuple[Tensor, Tensor]:
    """Vision and text vectors of the pairs of a batch, (m, d) float32 each.

    In evaluation mode and without gradient; of the model as it stands, its adapter included.
    """
    pair, vision, text = pair_masks(vlm, batch)
    with evaluating(vlm.model):
        hidden = vlm.hidden_states(batch, list(layers))
        return pooled(hidden, vision, pool)[pair], pooled(hidden, text, pool)[pair]


@torch.no_grad()
def instance_direction(classifier: ModalityClassifier, h_v: Tensor, h_t: Tensor) -> Tensor:
    """Modality-specific text minus modality-specific vision, per pair, (m, d)."""
    text = ops.hadamard_reweight(h_t, classifier.channel_weights(h_t, TEXT))
    return text - ops.hadamard_reweight(h_v, classifier.channel_weights(h_v, VISION))


def intervention(
    vlm: VLM,
    batch: Batch,
    out: Forward,
    state: DeepAlignState,
    totals: Totals | None,
    mutual: MutualShare | None = None,
) -> tuple[Terms, Terms]:
    """The terms of sections 1.2 to 1.4 that push vision along the shift direction.

    Args:
        vlm: The model, with its adapter.
        batch: See `VLM`.
        out: The forward of the adapted model, with `state.layers`.
        state: Its global direction is that of the pairs before this step; the pairs of the batch
            are taken in, in training mode.
        totals: See `fastalign.objectives`.
        mutual: Of a step of several micro-batches.

    Returns:
        The terms that are switched on, by name; and "cos_global" and "cos_instance", the cosine of
        the displacement with each direction, as `losses.shift_align` has it, for the log. Shares of
        the step's means.
    """
    config = state.config
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    names = [name for name in ("global", "instance", "mutual") if config.weight(name)]
    images = has_images(batch)
    if not images and not ranks:
        zero = torch.zeros((), device=out.hidden.device)
        return dict.fromkeys(names, zero), {"cos_global": zero, "cos_instance": zero}
    pair, vision, text = pair_masks(vlm, batch)
    # Without an image the modules of a sharded model still run, as on the other ranks.
    if images or is_sharded(vlm.model):
        if mutual is None:
            h_v, h_t = base_vectors(vlm, batch, state, (vision, text))
        else:
            h_v, h_t = mutual.h_v, mutual.h_t
        shifted = pooled([out.layers[k] for k in state.layers], vision, config.pool)
    else:  # a rank without pairs takes part in the mean, the exchange and its backward
        h_v = h_t = _zeros(vlm, len(pair))
        shifted = h_v + zero_of(vlm)
    instance = instance_direction(state.classifier, h_v, h_t)
    directions = {"global": state.direction.value, "instance": instance}
    if vlm.model.training:
        whole = None if totals is None else totals["pairs"]
        state.direction.update(instance, mask=pair, step_pairs=whole)
    count = pair.sum()
    shares, logs = {}, {}
    for name, direction in directions.items():
        each = losses.shift_align(h_v, shifted, direction, reduction="none")
        cosines = ((1.0 - each.detach()) * pair).sum()
        logs[f"cos_{name}"] = share(cosines, "pairs", count, totals)
        if name in names:
            if config.kind != "cosine":
                each = losses.shift_align(
                    h_v, shifted, direction, kind=config.kind, reduction="none"
                )
            shares[name] = share((each * pair).sum(), "pairs", count, totals)
    if "mutual" in names:
        if mutual is None:
            term = mutual_term(h_v, h_t, shifted, pair, config)
            shares["mutual"] = share(term * count, "pairs", count, totals)
        else:
            shares["mutual"] = mutual.share(shifted, count, totals)
    return shares, logs
