"""Attention masks of whole batches, made to fit fewer tokens or to hide some."""

import torch
from torch import Tensor


def cut_mask(mask: Tensor | None, samples: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """Rows and columns of the kept tokens of a (b or 1, 1, L, L) mask, (samples, 1, T, T).

    None is the causal mask. Padding sees itself, so that no row is without a key.
    """
    longest = order.shape[1]
    own = torch.eye(longest, dtype=torch.bool, device=order.device)
    inside = valid[:, None, :] | own
    if mask is None:
        causal = torch.ones_like(own).tril()
        return (causal & inside)[:, None]
    of = samples if len(mask) > 1 else torch.zeros_like(samples)
    taken = mask[of[:, None, None], 0, order[:, :, None], order[:, None, :]]
    if taken.dtype == torch.bool:
        return ((taken | own) & inside)[:, None]
    taken = taken.masked_fill(own & ~valid[:, None, :], 0.0)
    return taken.masked_fill(~inside, torch.finfo(taken.dtype).min)[:, None]


def without_columns(mask: Tensor | None, image: Tensor) -> Tensor:
    """A (b or 1, 1, L, L) mask in which no token but itself sees an image token."""
    length = image.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=image.device)
    hidden = image[:, None, None, :] & ~own
    if mask is None:
        return torch.ones_like(own).tril() & ~hidden
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.expand(len(image), -1, -1, -1).masked_fill(hidden, torch.finfo(mask.dtype).min)
