"""Empty outputs of the operators that have a Triton and a compiled kernel, for tracing.

The arguments are those of the operators; shapes, dtypes and strides are those of what they give.
"""

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def hadamard_reweight_fwd(h: Tensor, w: Tensor) -> Tensor:
    return h.new_empty(h.shape)


def hadamard_reweight_bwd(dy: Tensor, h: Tensor, w: Tensor, needs_w: bool) -> Pair:
    return h.new_empty(h.shape), w.new_empty(w.shape if needs_w else (0,))


def inverse_norms(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def calibrate_fwd(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def calibrate_bwd(
    dy: Tensor, x: Tensor, vision_mask: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def label_logits_fwd(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def label_logits_bwd_hidden(dy: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return weight.new_empty(dy.shape[0], weight.shape[1])


def label_logits_bwd_weight(dy: Tensor, hidden: Tensor, labels: Tensor, v: int) -> Pair:
    return hidden.new_empty(v, hidden.shape[1]), hidden.new_empty(v)


def structure_distill_fwd(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
    cosine: bool, negatives: str, keep: int,
) -> Four:  # fmt: skip
    """Of the compiled kernel, whose R is (N, longest)."""
    losses = student.new_empty((images,), dtype=torch.float32)
    residual = losses.new_empty((student.shape[0], longest) if keep else (0, 0))
    return losses, residual, losses.new_empty((0,)), losses.new_empty((images,))


def structure_distill_bwd(dlosses: Tensor, student: Tensor, *_: object) -> Tensor:
    return student.new_empty(student.shape)
