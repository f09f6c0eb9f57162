"""z = cap(scale (h W^T + b))    ce_i = logsumexp(z_i) - z_i[y_i]    L = sum w ce / sum w

The weighted cross-entropy of CAL (NeurIPS 2024), together with the head whose logits it needs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.reference._rows import wide


class CrossEntropy(NamedTuple):
    """What `linear_cross_entropy(..., details=True)` gives.

    Attributes:
        loss: The loss that the call without `details` returns.
        per_token: Cross-entropy without weights, (t,), 0 where the label is ignored; detached.
        correct: Whether the largest logit is the label's, (t,) bool, False where it is ignored.
    """

    loss: Tensor
    per_token: Tensor
    correct: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    details: bool = False,
) -> Tensor | CrossEntropy:
    """(t, d), (v, d), (t,) -> scalar, or (t,) with reduction "none"; the struct with `details`."""
    hidden, weight = wide(hidden, weight)
    keep = labels != ignore_index
    # An ignored row takes no part at all: left in, a NaN of its padding would reach dW as 0 * NaN.
    hidden = hidden.masked_fill(~keep[:, None], 0.0)
    logits = F.linear(hidden, weight, None if bias is None else bias.to(weight.dtype))
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ce = F.cross_entropy(logits, labels.long(), ignore_index=ignore_index, reduction="none")
    weights = torch.ones_like(ce) if token_weights is None else token_weights.detach().to(ce.dtype)
    weights = weights.masked_fill(~keep, 0.0)
    loss = _reduce(ce, weights, reduction)
    if not details:
        return loss
    correct = (logits.detach().argmax(-1) == labels) & keep
    return CrossEntropy(loss, ce.detach(), correct)


def _reduce(ce: Tensor, weights: Tensor, reduction: str) -> Tensor:
    weighted = weights * ce
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    total = weights.sum()
    return weighted.sum() / total.masked_fill(total == 0, 1.0)
