"""The Frechet distance of Gaussians, and the one place where the metric takes a root's trace."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastalign import linalg
from fastalign.ops._check import check_floating, check_same
from fastalign.reference import frechet as _ref
from fastalign.reference.psd import psd_factor

FLOAT64_DIM = 1024  # widest layer whose sums are in float64


class Moments(NamedTuple):
    """Mean and covariance of the rows of one modality in one layer."""

    mean: Tensor  # (d,) float64
    cov: Tensor | None  # (d, d) float64; None where the factor stands for it
    factor: Tensor | None  # (d, n) float64 with F F^T the covariance: the rows themselves
    rank: int  # upper bound of the covariance's rank

    def variance(self) -> Tensor:
        """Trace of the covariance."""
        if self.factor is not None:
            return self.factor.square().sum()
        assert self.cov is not None
        return self.cov.trace()


def frechet_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    r"""Squared Frechet (2-Wasserstein) distance of Gaussians (Dowson and Landau 1982).

    $|\mu_x - \mu_y|^2 + \mathrm{Tr}(C_x + C_y - 2 (C_x C_y)^{1/2})$, computed in float64. At a
    singular covariance the gradient is that along its range: see
    `fastalign.linalg.trace_sqrtm_product`.

    Args:
        mean_x: (..., d), any floating dtype.
        cov_x: Symmetric positive semi-definite, (..., d, d).
        mean_y: The shape of `mean_x`.
        cov_y: The shape of `cov_x`.

    Returns:
        (...), at least 0, float32, or float64 for float64 input; NaN where a covariance is not
        semi-definite. Differentiable once in all four.

    Raises:
        TypeError: An argument is not of a floating-point dtype.
        ValueError: The shapes do not fit, or dtypes or devices differ.
    """
    check_floating(mean_x=mean_x, cov_x=cov_x, mean_y=mean_y, cov_y=cov_y)
    check_same(mean_x=mean_x, mean_y=mean_y)
    check_same(cov_x=cov_x, cov_y=cov_y)
    check_same("dtype", "device", mean_x=mean_x, cov_x=cov_x)
    if mean_x.dim() == 0 or cov_x.shape != (*mean_x.shape, mean_x.shape[-1]):
        raise ValueError(
            "cov_x must be (..., d, d) for mean_x (..., d): "
            f"got {tuple(cov_x.shape)} and {tuple(mean_x.shape)}"
        )
    mx, cx, my, cy = (t.double() for t in (mean_x, cov_x, mean_y, cov_y))
    distance = _ref.frechet_distance(mx, cx, my, cy, linalg.trace_sqrtm_product(cx, cy))
    return distance.clamp_min(0).to(torch.promote_types(mean_x.dtype, torch.float32))


def distance_of(x: Moments, y: Moments, method: str) -> Tensor:
    """The Frechet distance of two sets of rows by one of the metric's methods, float64."""
    apart = (x.mean - y.mean).square().sum()
    distance = apart + x.variance() + y.variance() - 2 * _trace_root(x, y, method)
    return distance if method == "official_fast" else distance.clamp_min(0)


def _trace_root(x: Moments, y: Moments, method: str) -> Tensor:
    """Tr((C_x C_y)^(1/2)), or what the released code's fast mode has in its place."""
    if method == "official_fast":
        if x.cov is not None and y.cov is not None:
            return _ref.official_fast_trace(x.cov, y.cov)
        return _ref.official_fast_trace_of_factors(_factor(x), _factor(y))
    # Products win on a GPU, where float16 is enough for them; on a CPU decompositions do, which are
    # several times as fast for covariances in float32: as exact as the sums of wide layers are.
    on_gpu = x.mean.is_cuda and method == "newton_schulz"
    dtype = torch.float32 if on_gpu or len(x.mean) > FLOAT64_DIM else torch.float64
    how: Literal["newton_schulz", "eigh"] = "newton_schulz" if on_gpu else "eigh"
    if x.cov is not None and y.cov is not None and x.rank == y.rank == len(x.mean):
        # A dimension without variance in one of them adds nothing, and stops no factorisation.
        varies = (x.cov.diagonal() > 0) & (y.cov.diagonal() > 0)
        covs = (c if bool(varies.all()) else c[varies][:, varies] for c in (x.cov, y.cov))
        a, b = (c.to(dtype) for c in covs)
        if len(a) == 0:
            return x.mean.new_zeros(())
        return linalg.trace_sqrtm_product(a, b, method=how).double()
    f, g = (_factor(m).to(dtype) for m in (x, y))
    return linalg.trace_of_factors(f, g, method=how).double()


def _factor(x: Moments) -> Tensor:
    """(d, r) float64: the rows, Cholesky's factor, or eigenvectors of a singular covariance."""
    if x.factor is not None:
        return x.factor
    assert x.cov is not None
    if x.rank == len(x.cov):
        factor, info = torch.linalg.cholesky_ex(x.cov)
        if int(info) == 0:
            lower: Tensor = factor
            return lower
    return psd_factor(x.cov, x.rank)
