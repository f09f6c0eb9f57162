"""Counting and sharing: how a micro-batch's sums become its part of an optimizer step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign import losses
from fastalign.models import VLM, Batch, Forward

Terms = dict[str, Tensor]
Totals = Mapping[str, Tensor]


def pair_rows(vlm: VLM, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Samples that hold both an image and text, and the two masks (b, L)."""
    vision, text = vlm.vision_mask(batch), vlm.text_mask(batch)
    rows = (vision.any(1) & text.any(1)).nonzero()[:, 0]
    return rows, (vision, text)


def counts(vlm: VLM, batch: Batch) -> dict[str, Tensor]:
    """What the objectives divide by: label tokens, samples with labels, pairs and images."""
    labels = batch.get("labels")
    device = batch["input_ids"].device
    some = torch.zeros(1, 1, dtype=torch.bool, device=device)
    labelled = some if labels is None else labels[:, 1:] != -100
    pixels = batch.get("pixel_values")
    image_rows, _ = pair_rows(vlm, batch)
    return {
        "tokens": labelled.sum(),
        "samples": labelled.any(1).sum(),
        "pairs": torch.tensor(len(image_rows), device=device),
        "images": torch.tensor(0 if pixels is None else len(pixels), device=device),
    }


def share(total: Tensor, name: str, count: Tensor | int, totals: Totals | None) -> Tensor:
    """A sum over this micro-batch divided by the count over the whole step; 0 for nothing."""
    whole = count if totals is None else totals[name]
    whole = torch.as_tensor(whole, device=total.device, dtype=torch.float32)
    return total / whole.clamp_min(1.0)


def label_loss(
    vlm: VLM, batch: Batch, out: Forward, weights: Tensor | None
) -> tuple[losses.CrossEntropy, Tensor]:
    """Sum of weighted cross-entropies, per-token results, and the labels' samples."""
    rows, cols, labels = vlm.label_rows(batch)
    result = losses.linear_cross_entropy(
        out.hidden[rows, cols],
        vlm.head.weight,
        labels,
        token_weights=weights,
        bias=vlm.head.bias,
        logit_scale=vlm.logit_scale,
        softcap=vlm.softcap,
        reduction="sum",
        details=True,
    )
    return result, rows


def report(result: losses.CrossEntropy, totals: Totals | None) -> Terms:
    """Unweighted cross-entropy and accuracy, for the log."""
    per_token = result.per_token.detach()
    return {
        "ce": share(per_token.sum(), "tokens", len(per_token), totals),
        "accuracy": share(result.correct.float().sum(), "tokens", len(per_token), totals),
    }
