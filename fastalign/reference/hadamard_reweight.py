"""Hadamard reweighting: the modality-specific component of a representation."""

import torch
from torch import Tensor


def hadamard_reweight(h: Tensor, w: Tensor) -> Tensor:
    """y = s (w ∘ h) with s = |h| / |w ∘ h| for each row, in float32 or wider; (..., d)."""
    if not h.numel():  # d may be 0, which has no largest magnitude
        return (h * w).to(h.dtype)
    dtype = torch.promote_types(torch.promote_types(h.dtype, w.dtype), torch.float32)
    wide = h.to(dtype)
    u = w.to(dtype) * wide
    u_norm = _norm(u)
    zero = u_norm == 0
    s = torch.where(zero, 0.0, _norm(wide) / torch.where(zero, 1.0, u_norm))
    return (s * u).to(h.dtype)


def _norm(x: Tensor) -> Tensor:
    """Norm of each row, scaled by its largest magnitude so that no square over- or underflows."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    norm: Tensor = torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)
    return scale * norm
