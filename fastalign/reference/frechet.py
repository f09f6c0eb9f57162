"""The modality integration rate's lines: scaling, outliers, moments and the Frechet distance.

Source: Huang et al., "Deciphering Cross-Modal Alignment in Large Vision-Language Models with
Modality Integration Rate" (ICCV 2025), equations 2 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 2048  # rows that are in float64 at a time


def frechet_distance(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, trace_root: Tensor
) -> Tensor:
    """|mean_x - mean_y|^2 + Tr(cov_x) + Tr(cov_y) - 2 Tr((cov_x cov_y)^(1/2)), (...).

    Args:
        mean_x: (..., d).
        cov_x: (..., d, d).
        mean_y: (..., d).
        cov_y: (..., d, d).
        trace_root: The last trace, (...), by whichever method.
    """
    traces = (cov_x + cov_y).diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_x - mean_y).square().sum(-1) + traces - 2 * trace_root


def official_fast_trace(cov_x: Tensor, cov_y: Tensor) -> Tensor:
    """Tr(cov_x cov_y), (...): what stands for the root in the released code's fast mode.

    Its coupled iteration starts at (A, I), a fixed point, and so returns A = cov_x cov_y itself.
    """
    return (cov_x * cov_y.mT).sum((-2, -1))


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms of the rows (n, d), (n,) float64."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    return norms


def row_keys(norms: Tensor) -> Tensor:
    """A pseudo-random number (n,) float64 for each row, the same wherever and whenever it comes.

    The bits of the norm, mixed as SplitMix64 ends (Steele et al. 2014). The rows with the smallest
    numbers are a uniform sample that depends neither on the order nor on the process.
    """
    bits = norms.double().view(torch.int64)
    bits = (bits ^ (bits >> 30)) * -4658895280553007687
    bits = (bits ^ (bits >> 27)) * -7723592293110705685
    return (bits ^ (bits >> 31)).double()


def row_sums(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (d,), Gram matrix (d, d) and number of the rows (n, d), float64, a block at a time."""
    dim = rows.shape[-1]
    total = rows.new_zeros(dim, dtype=torch.float64)
    gram = rows.new_zeros(dim, dim, dtype=torch.float64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].double()
        total += block.sum(0)
        gram.addmm_(block.mT, block)
    return total, gram, gram.new_tensor(len(rows))


def within_sigma(norms: Tensor, reference: Tensor, sigmas: float) -> Tensor:
    """Which norms (n,) lie within `sigmas` standard deviations of the reference's median.

    The median is the lower one of an even count and the deviation divides by n - 1, as the
    released code has it. Norms that are not finite are left out of both, and never lie within.
    Rows of equal norm have no outliers, so rounding, 1e-12 of the median, is granted.
    """
    finite = reference[reference.isfinite()]
    if finite.numel() < 2:
        return norms.isfinite()
    median = finite.median()
    return (norms - median).abs() <= sigmas * finite.std() + 1e-12 * median


def moments(total: Tensor, gram: Tensor, count: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d), over n - 1, of scale * rows (eq. 4).

    Args:
        total: Sum of the rows, (d,).
        gram: Sum of their outer products, (d, d).
        count: Number of rows, scalar.
        scale: Scalar.
    """
    mean = total / count
    cov = (gram / count - mean.outer(mean)) * (count / (count - 1))
    return scale * mean, scale.square() * cov


def add_replaced_rows(
    mean: Tensor, cov: Tensor, count: Tensor, row: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:
    """Moments after `copies` copies of one row (d,) join the `count` rows they were taken of."""
    total = count + copies
    offset = mean - row
    spread = (count - 1) * cov + (count * copies / total) * offset.outer(offset)
    return (count * mean + copies * row) / total, spread / (total - 1)


def ordered_cholesky(cov_x: Tensor, cov_y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Factors (d, d) with F F^T = cov[p][:, p] for one order p of both, or None if one is singular.

    Dimensions come in falling order of the product of variances and are brought to unit variance
    first: both cut the error, and neither changes the singular values of F_x^T F_y.
    """
    variances = [cov.diagonal() for cov in (cov_x, cov_y)]
    order = (variances[0] * variances[1]).argsort(descending=True)
    factors = []
    for cov, variance in zip((cov_x, cov_y), variances, strict=True):
        if not bool((variance > 0).all()):
            return None
        std = variance[order].sqrt()
        correlation = cov[order][:, order] / std.outer(std)
        factor, info = torch.linalg.cholesky_ex(correlation)
        if info.item() != 0:
            return None
        factors.append(std.unsqueeze(-1) * factor)
    return factors[0], factors[1]
