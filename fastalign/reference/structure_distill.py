"""S_h = H^ H^T    S_g = G^ G^T    L_b = |S_g - S_h|_F^2 / n_b^2    with ^ a row over its norm

Structure-induced distillation (DeepAlign, CVPR 2026); per image it is the Gram anchoring loss of
DINOv3.
"""

import torch
from torch import Tensor

from fastalign.reference._rows import reduce, unit, wide


def structure_distill(
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor | None = None,
    similarity: str = "cosine",
    negatives: str = "keep",
    level: str = "image",
    reduction: str = "mean",
) -> Tensor:
    """(b, n, d), (b, n, dt), or packed (sum n, d), (sum n, dt) with cu_seqlens (b + 1,) -> scalar.

    The packed form loops over the images and reads their offsets on the host.
    """
    student, teacher = wide(student, teacher.detach())
    if similarity == "cosine":
        student, teacher = unit(student), unit(teacher)
    if level == "batch":
        student, teacher = (x.reshape(1, -1, x.shape[-1]) for x in (student, teacher))
    if student.dim() == 3:
        losses = _image_losses(student, teacher, negatives)
        return reduce(losses, reduction, student.shape[0] if student.shape[1] else 0)
    assert cu_seqlens is not None
    offsets = cu_seqlens.tolist()
    bounds = list(zip(offsets[:-1], offsets[1:], strict=True))
    images = [_image_losses(student[i:j], teacher[i:j], negatives) for i, j in bounds]
    # The sum over no row keeps the graph when the batch holds no image.
    losses = torch.stack(images) if images else student.new_zeros(0) + student.sum()
    return reduce(losses, reduction, sum(j > i for i, j in bounds))


def _image_losses(student: Tensor, teacher: Tensor, negatives: str) -> Tensor:
    """(..., n, d), (..., n, dt) -> (...)."""
    s_h, s_g = (x @ x.mT for x in (student, teacher))
    if negatives != "keep":
        s_g = s_g.clamp_min(0.0)
    if negatives == "clip":
        # One that is 0 has a derivative, in every torch: from 2.15 on clamp_min gives it none.
        s_h = s_h.masked_fill(s_h < 0, 0.0)
    return (s_h - s_g).square().sum((-2, -1)) / max(student.shape[-2], 1) ** 2
