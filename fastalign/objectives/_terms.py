"""Counting and sharing: how a micro-batch's sums become its part of an optimizer step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastalign import losses
from fastalign.models import VLM, Batch, Forward
from fastalign.models._text_packing import labelled_samples

Terms = dict[str, Tensor]
Totals = Mapping[str, Tensor]


def pair_masks(vlm: VLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Samples that hold both an image and text, (b,); the tokens of each modality, (b, L)."""
    vision, text = vlm.vision_mask(batch), vlm.text_mask(batch)
    return vision.any(1) & text.any(1), vision, text


def counts(vlm: VLM, batch: Batch) -> dict[str, Tensor]:
    """What the objectives divide by: label tokens, samples with labels, pairs and images.

    Images are counted as the pictures that a teacher sees (`VLM.views`): tiles count singly.
    """
    labels = batch.get("labels")
    device = batch["input_ids"].device
    some = torch.zeros(1, 1, dtype=torch.bool, device=device)
    labelled = some if labels is None else labels[:, 1:] != -100
    return {
        "tokens": labelled.sum(),
        "samples": labelled.sum() if labels is None else labelled_samples(batch),
        "pairs": pair_masks(vlm, batch)[0].sum(),
        "images": torch.tensor(vlm.count_views(batch), device=device),
    }


def share(total: Tensor, name: str, count: Tensor | int, totals: Totals | None) -> Tensor:
    """A sum over this micro-batch divided by the count over the whole step; 0 for nothing."""
    whole = count if totals is None else totals[name]
    divisor: Tensor | int
    if isinstance(whole, int | torch.SymInt):  # a compiled step makes no tensor of the latter
        divisor = torch.sym_max(whole, 1)  # type: ignore[no-untyped-call]
    else:
        whole = torch.as_tensor(whole, device=total.device, dtype=torch.float32)
        divisor = whole.clamp_min(1.0)
    return total / divisor


def zero_of(vlm: VLM) -> Tensor:
    """0, which gives the first trainable parameter a zero gradient; plain 0 when there is none.

    A batch without images does not reach adapters of the vision encoder. Its loss must still go
    through the backward, which other ranks wait for.
    """
    for parameter in vlm.model.parameters():
        if parameter.requires_grad and parameter.numel():
            zero: Tensor = parameter.flatten()[0].float() * 0.0
            return zero
    return torch.zeros((), device=vlm.head.weight.device)


def anchored(loss: Tensor, vlm: VLM) -> Tensor:
    """`loss`, differentiable also where no trainable parameter took part in it."""
    return loss if loss.requires_grad or not torch.is_grad_enabled() else loss + zero_of(vlm)


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
