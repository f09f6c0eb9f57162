"""Supervised fine-tuning and contrastive alignment."""

from typing import Any

import torch
from torch import Tensor, nn

from fastalign import losses
from fastalign.models import VLM, Batch, Forward
from fastalign.models._text_packing import sample_numbers
from fastalign.objectives._terms import Terms, Totals, anchored, label_loss, report, share

NORMALIZE = ("mean", "tokens", "sample", "official")


def sft(vlm: VLM, batch: Batch, *, totals: Totals | None = None) -> Terms:
    """Supervised fine-tuning: mean cross-entropy of the labels, in nats per token.

    A batch without labels gives 0 with a zero gradient.

    Args:
        vlm: The model.
        batch: See `VLM`, with `labels`.
        totals: See the module.

    Returns:
        "loss", "ce" (the same without gradient) and "accuracy" of the arg max.
    """
    result, _ = label_loss(vlm, batch, vlm.forward(batch, labels_only=True), None)
    loss = share(result.loss, "tokens", len(result.per_token), totals)
    return {"loss": anchored(loss, vlm), **report(result, totals)}


def cal(
    vlm: VLM,
    batch: Batch,
    *,
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
    mode: str = "drop",
    normalize: str = "mean",
    compat: str = "paper",
    totals: Totals | None = None,
    **contrast: Any,
) -> Terms:
    r"""Contrastive alignment: labels weighted by what the image adds (CAL, NeurIPS 2024).

    $L = \sum_j w_j CE_j / \sum_j w_j$ with $w = \mathrm{avgpool}_W(\mathrm{clamp}(\delta))$.

    Args:
        vlm: The model. With dropout in it, delta comes from two passes of its own without dropout.
        batch: See `VLM`, with `labels`.
        clamp: Bounds of delta, (alpha, beta).
        window: Odd width of the average over neighbouring labels of one sample.
        mode: See `VLM.contrast`.
        normalize: What the weighted sum is divided by. "mean": the sum of weights over the whole
            step. "tokens": weights scaled to mean 1 in the micro-batch, over the labels of the
            step. "sample": each sample's own sum (paper), mean over samples. "official": the
            micro-batch's sum + 1e-6, whatever the step.
        compat: "official" pools as the released code does, across samples and ignored positions,
            with the image masked instead of dropped.
        totals: See the module.
        contrast: Further options of `VLM.contrast`, for compat="paper".

    Returns:
        "loss", "ce", "accuracy", "weight" (mean) and "delta" (mean); with `totals` and
        normalize="mean" the loss is the weighted sum and "weight_sum" what the step divides by.

    Raises:
        ValueError: An option has an unknown value.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}: got {normalize!r}")
    rows, cols, _ = vlm.label_rows(batch)
    samples = sample_numbers(batch, rows, cols)
    if compat == "official":
        if batch.get("segments") is not None:
            raise ValueError(
                'compat="official" pools over rows of one sample each: got rows that hold several; '
                'use compat="paper", or pack_text=False'
            )
        out = vlm.forward(batch)
        delta, weights = _official_weights(vlm, batch, out, clamp, window)
    else:
        if vlm.model.training and _has_dropout(vlm.model):
            delta = vlm.contrast(batch, mode, **contrast)
            out = vlm.forward(batch, labels_only=True)
        else:
            out, delta = vlm.forward_with_contrast(batch, mode, **contrast)
        # One run of labels per sample: they ascend, so equal neighbours share a sample.
        most = len(batch["input_ids"]) if batch.get("segments") is None else len(rows)
        starts = torch.searchsorted(samples, torch.arange(most + 1, device=rows.device))
        weights = losses.contrast_weights(
            delta, starts.to(torch.int32), clamp=clamp, window=window, compat=compat
        )
    factor = _sample_factors(samples, weights) if normalize == "sample" else weights
    result, _ = label_loss(vlm, batch, out, factor)
    terms = report(result, totals)
    terms["delta"] = share(delta.sum(), "tokens", len(delta), totals)
    terms["weight"] = share(weights.sum(), "tokens", len(delta), totals)
    tiny = torch.finfo(torch.float32).tiny
    if normalize == "sample":
        terms["loss"] = share(result.loss, "samples", len(torch.unique(samples)), totals)
    elif normalize == "official":
        terms["loss"] = result.loss / (weights.sum() + 1e-6)
        if totals is not None:
            terms["loss"] = terms["loss"] / totals["batches"]
    elif normalize == "tokens":
        scaled = result.loss * len(delta) / weights.sum().clamp_min(tiny)
        terms["loss"] = share(scaled, "tokens", len(delta), totals)
    elif totals is None:
        terms["loss"] = result.loss / weights.sum().clamp_min(tiny)
    else:
        terms["loss"], terms["weight_sum"] = result.loss, weights.sum()
    terms["loss"] = anchored(terms["loss"], vlm)
    return terms


def _has_dropout(model: nn.Module) -> bool:
    active = (m.p > 0 for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return any(active) or getattr(text, "attention_dropout", 0.0) > 0


def _sample_factors(samples: Tensor, weights: Tensor) -> Tensor:
    """Weights divided by their sum over the labels of their own sample."""
    _, sample = torch.unique(samples, return_inverse=True)
    sums = torch.zeros_like(weights).index_add(0, sample, weights)
    return weights / sums[sample].clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _official_weights(
    vlm: VLM, batch: Batch, out: Forward, clamp: tuple[float, float], window: int
) -> tuple[Tensor, Tensor]:
    """Delta and weights of the labels as the released code pools them.

    It contrasts every position of the shifted batch, with token 0 where the label is ignored.
    """
    labels = batch["labels"][:, 1:]
    kept = labels != -100
    everywhere = {**batch, "labels": batch["labels"].clamp_min(0)}
    delta = vlm.contrast_from(everywhere, out, "mask")
    weights = losses.contrast_weights(delta, clamp=clamp, window=window, compat="official")
    return delta[kept.flatten()], weights[kept.flatten()]
