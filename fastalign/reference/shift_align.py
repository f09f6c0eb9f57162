"""u = h' - h    cosine: L_i = 1 - <u, d> / (max(|u|, REST |h|) |d|)    mse: L_i = mean (u - d)^2

L_global and L_instance of DeepAlign (CVPR 2026).
"""

import torch
from torch import Tensor

from fastalign.reference._rows import reduce, unit, wide

# Displacements shorter than this part of the representation count as not yet moved: bfloat16 cannot
# tell them from rounding (its spacing is 4e-3), and the cosine's gradient grows as 1 / |u|.
REST = 1e-3


def shift_align(
    original: Tensor,
    shifted: Tensor,
    direction: Tensor,
    kind: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    """(m, d), (m, d), (d,) or (m, d) -> scalar, or (m,) with reduction "none"."""
    original, shifted, direction = wide(original, shifted, direction.detach())
    u = shifted - original
    if kind == "mse":
        losses = (u - direction).square().mean(-1)
    else:
        rest = REST * torch.linalg.vector_norm(original, dim=-1)
        length = torch.maximum(torch.linalg.vector_norm(u, dim=-1), rest)
        # Zero only where h = h' = 0: any positive length gives cosine 0 and a bounded gradient.
        length = length.masked_fill(length == 0, 1.0)
        losses = 1.0 - (u * unit(direction)).sum(-1) / length
    return reduce(losses, reduction, losses.shape[0])
