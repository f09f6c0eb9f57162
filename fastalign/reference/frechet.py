"""The modality integration rate's lines: scaling, outliers, moments and the Frechet distance.

Source: Huang et al., "Deciphering Cross-Modal Alignment in Large Vision-Language Models with
Modality Integration Rate" (ICCV 2025), equations 2 to 4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 2048  # rows that one accumulator takes


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


def official_fast_trace_of_factors(x: Tensor, y: Tensor) -> Tensor:
    """The same of covariances F F^T, given their factors (d, n) and (d, m)."""
    return (x.mT @ y).square().sum()


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


def _gram(block: Tensor) -> Tensor:
    return block.mT @ block


def shifted_sums(
    rows: Tensor,
    origin: Tensor | None,
    add: Callable[[Tensor], object],
    dtype: torch.dtype = torch.float64,
    gram: Callable[[Tensor], Tensor] = _gram,
) -> Tensor:
    """Sum of rows - origin, (d,) float64; `add` is given the Gram matrix of each block of them.

    A sum of raw products errs by eps |mean|^2, which is much where the mean is far from 0 and the
    spread small: near the mean as origin that error is gone. The difference is taken in `dtype`
    or wider and not rounded again.

    Args:
        rows: (n, d), any floating dtype.
        origin: (d,); None for 0, and rows as they come.
        add: Takes the Gram matrices, (d, d), one a block of at most 2,048 rows.
        dtype: Float32 or wider.
        gram: x -> x^T x.
    """
    total = rows.new_zeros(rows.shape[-1], dtype=torch.float64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        if origin is not None:
            wide = torch.promote_types(rows.dtype, dtype)
            block = block.to(wide) - origin.to(wide)
        total += block.sum(0, dtype=torch.float64)
        add(gram(block))
    return total


def triangle(packed: Tensor, lower: bool) -> Tensor:
    """View (d, d) of packed triangles (d + 1, d) in which the lower, or the upper one stands.

    Each has its diagonal: the lower one begins a row further down. What lies on the other side of
    the diagonal is the other triangle.
    """
    return packed[1:] if lower else packed[:-1]


def add_triangle(packed: Tensor, lower: bool, matrix: Tensor) -> None:
    """Add a symmetric matrix (d, d) to one of two packed triangles (d + 1, d)."""
    triangle(packed, lower).add_(matrix.tril() if lower else matrix.triu())


def unpack_triangle(packed: Tensor, lower: bool) -> Tensor:
    """The symmetric matrix (d, d), float64, of one of two packed triangles (d + 1, d)."""
    half = triangle(packed, lower)
    half = (half.tril() if lower else half.triu().mT).double()
    return half + half.tril(-1).mT


def moved_gram(gram: Tensor, count: Tensor, offset: Tensor, moved: Tensor) -> Tensor:
    """Gram matrix of rows about another point, (d, d).

    Args:
        gram: About the old point, (d, d).
        count: Number of rows.
        offset: Their mean less the old point, (d,).
        moved: Their mean less the new point, (d,).
    """
    return gram + count * (moved.outer(moved) - offset.outer(offset))


def center_and_spread(norms: Tensor) -> tuple[Tensor, Tensor]:
    """Median and standard deviation of the finite norms; 0 and inf of fewer than two.

    The median is the lower one of an even count and the deviation divides by n - 1, as the
    released code has it.
    """
    finite = norms[norms.isfinite()]
    if finite.numel() < 2:
        return norms.new_zeros(()), norms.new_full((), torch.inf)
    return finite.median(), finite.std()


def within_sigma(norms: Tensor, reference: Tensor, sigmas: float) -> Tensor:
    """Which norms (n,) lie within `sigmas` standard deviations of the reference's median.

    Norms that are not finite are left out of both, and never lie within. Rows of equal norm have
    no outliers, so rounding, 1e-12 of the median, is granted.
    """
    median, std = center_and_spread(reference)
    return norms.isfinite() & ((norms - median).abs() <= sigmas * std + 1e-12 * median)


def sigma_margin(norms: Tensor, reference: Tensor, sigmas: float) -> Tensor:
    """How many deviations each norm (n,) lies beyond `sigmas` of them; inf where it is not finite.

    Below 0 within; the size says how sure that is while the reference still grows.
    """
    median, std = center_and_spread(reference)
    margin = (norms - median).abs() / std.clamp_min(torch.finfo(std.dtype).tiny) - sigmas
    return margin.nan_to_num(torch.inf, posinf=torch.inf)


def scaled_factor(rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """F (d, n) with F F^T the covariance, over n - 1, of scale * rows (n, d)."""
    factor: Tensor = (rows - mean).mT * (scale / (len(rows) - 1) ** 0.5)
    return factor


def replaced_rows(
    mean: Tensor, count: Tensor, row: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How moments change as `copies` copies of one row (d,) join `count` rows.

    Returns:
        The new mean (d,), a factor c and a vector v (d,): the new covariance is c cov + v v^T.
    """
    total = count + copies
    offset = mean - row
    shrink = (count - 1) / (total - 1)
    extra = (count * copies / (total * (total - 1))).sqrt() * offset
    return (count * mean + copies * row) / total, shrink, extra
