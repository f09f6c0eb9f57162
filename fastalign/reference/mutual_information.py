"""InfoNCE:   I >= log m - (CE(S) + CE(S^T)) / 2,   S_ij = cos(x_i, y_j) / temperature, labels i = j
Gaussian:  I  = (log|R_x| + log|R_y| - log|R_xy|) / 2,   R = (1 - shrinkage) corr + shrinkage I

The estimators of L_MI of DeepAlign (CVPR 2026); van den Oord et al. 2018 for the bound.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.reference._rows import unit, wide


def mutual_information(
    x: Tensor,
    y: Tensor,
    estimator: str = "infonce",
    temperature: float = 0.07,
    shrinkage: float = 1e-3,
    mask: Tensor | None = None,
) -> Tensor:
    """(m, d), (m, d) -> nats; the Gaussian estimator takes rows of different widths too.

    Rows outside `mask` (m,) bool are as good as absent; without any row inside it the value is 0.
    """
    x, y = wide(x, y)
    if mask is not None:  # what lies there may be NaN
        x, y = (torch.where(mask[:, None], z, 0.0) for z in (x, y))
    if estimator == "infonce":
        return _infonce(unit(x) @ unit(y).mT / temperature, mask)
    # Columns of unit length: the product of a block with itself is its correlation matrix.
    columns = [unit(_centred(z, mask).mT) for z in (x, y)]
    x_det, y_det, joint = (
        _shrunk_logdet(rows @ rows.mT, shrinkage) for rows in (*columns, torch.cat(columns))
    )
    return (x_det + y_det - joint) / 2


def _infonce(similarity: Tensor, mask: Tensor | None) -> Tensor:
    pair = torch.arange(similarity.shape[0], device=similarity.device)
    if mask is None:
        ce = F.cross_entropy(similarity, pair) + F.cross_entropy(similarity.mT, pair)
        return math.log(similarity.shape[0]) - ce / 2
    # A row outside keeps itself, so that its cross-entropy is 0 and not NaN.
    kept = mask & mask[:, None]
    kept = kept | torch.eye(len(pair), dtype=torch.bool, device=pair.device)
    similarity = similarity.masked_fill(~kept, float("-inf"))
    count = mask.sum().clamp_min(1).to(similarity)
    both = [F.cross_entropy(s, pair, reduction="sum") for s in (similarity, similarity.mT)]
    return count.log() - (both[0] + both[1]) / (2 * count)


def _centred(z: Tensor, mask: Tensor | None) -> Tensor:
    """z less its column means; a constant column becomes zero, not the rounding of its mean.

    A zero column correlates with nothing, so its part of the determinants cancels.
    """
    if mask is None:
        centred = z - z.mean(0)
    else:
        centred = torch.where(mask[:, None], z - z.sum(0) / mask.sum().clamp_min(1), 0.0)
    spread, size = (v.detach().abs().amax(0) for v in (centred, z))
    return centred.masked_fill(spread <= 32 * torch.finfo(z.dtype).eps * size, 0.0)


def _shrunk_logdet(correlation: Tensor, shrinkage: float) -> Tensor:
    identity = torch.eye(correlation.shape[0], dtype=correlation.dtype, device=correlation.device)
    logdet: Tensor = torch.linalg.slogdet(correlation.lerp(identity, shrinkage)).logabsdet
    return logdet
