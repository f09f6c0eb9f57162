"""Learnable modality calibration (MoCa): an affine map of the vision tokens."""

import torch
from torch import Tensor


def calibrate(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y = scale ∘ x + shift for vision rows, in float32 or wider; text rows are x bit for bit."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    moved = x.to(dtype) * scale.to(dtype) + shift.to(dtype)
    return torch.where(vision_mask.unsqueeze(-1), moved.to(x.dtype), x)
