r"""Roots of positive semi-definite matrices, nuclear norms and polar factors, with their gradients.

Everything is computed in float64, whatever comes in: the root halves the digits of the small
eigenvalues, and float32 would lose them from a condition number of 1e6 on. Results leave in
float32, or in float64 for a float64 input.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


def result_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def symmetrize(a: Tensor) -> Tensor:
    """(a + a^T) / 2, (..., d, d)."""
    return (a + a.mT) / 2


def _svd(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return u, s, vh


def singular_value_sum(m: Tensor) -> Tensor:
    """Nuclear norm of matrices of any shape, (..., n, d) -> (...) float64."""
    values: Tensor = torch.linalg.svdvals(m.double())
    return values.sum(-1)


def psd_eigh(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (..., d), ascending and >= 0, eigenvectors (..., d, d) and a flag, in float64.

    Of `a` only the symmetric part counts. A negative eigenvalue within the rounding of the input,
    d eps |a| with the eps of float32 or of a narrower input, is rounding and becomes 0. The flag
    (...) is 0, or NaN where one lies beyond: that matrix is no covariance, and what is computed of
    it must not pass for a result. Callers add the flag.
    """
    w, q = torch.linalg.eigh(symmetrize(a.double()))
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
    indefinite = w.amin(-1) < -eps * a.shape[-1] * w.abs().amax(-1)
    flag = torch.zeros_like(w[..., 0]).masked_fill(indefinite, torch.nan)
    return w.clamp_min(0), q, flag


def psd_factor(a: Tensor, rank: int | None = None) -> Tensor:
    """F with F F^T = a, (..., d, r) float64, from eigenvectors; r = d, or the `rank` largest."""
    w, q, _ = psd_eigh(a)
    first = 0 if rank is None else max(a.shape[-1] - rank, 0)
    return q[..., first:] * w[..., None, first:].sqrt()


def sqrtm_from_eigh(w: Tensor, q: Tensor, flag: Tensor) -> Tensor:
    """q diag(w^(1/2)) q^T, (..., d, d)."""
    return symmetrize((q * w.sqrt().unsqueeze(-2)) @ q.mT) + flag[..., None, None]


def sqrtm(a: Tensor) -> Tensor:
    """Principal root of a symmetric positive semi-definite matrix, (..., d, d)."""
    return sqrtm_from_eigh(*psd_eigh(a)).to(result_dtype(a))


def divide_by_sums(x: Tensor, s: Tensor) -> Tensor:
    """x_ij / (s_i + s_j), (..., d, d), for s >= 0, (..., d); 0 where both are 0 to rounding.

    This solves S X + X S = C in the eigenbasis of S. Unlike the derivative of eigenvectors it
    divides by sums, so equal eigenvalues do no harm. "To rounding" is (d eps)^(1/2) max(s): what
    an eigenvalue d eps of the largest one leaves in its root.
    """
    sums = s.unsqueeze(-1) + s.unsqueeze(-2)
    cut = (s.shape[-1] * _EPS) ** 0.5 * s.amax(-1)[..., None, None]
    null = sums <= cut
    return torch.where(null, 0.0, x / torch.where(null, 1.0, sums))


def sqrtm_grad(w: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """X of S X + X S = sym(grad), with S = q diag(w^(1/2)) q^T: the gradient of `sqrtm`."""
    inner = q.mT @ symmetrize(grad.double()) @ q
    return symmetrize(q @ divide_by_sums(inner, w.sqrt()) @ q.mT)


def nuclear_norm(m: Tensor) -> Tensor:
    """Sum of singular values, (..., d, d) -> (...)."""
    return singular_value_sum(m).to(result_dtype(m))


def partial_isometry(m: Tensor) -> Tensor:
    """U V^T over the singular values above d eps max(s), (..., d, d) float64.

    It is the gradient of the nuclear norm; at a singular matrix, its subgradient of least norm.
    """
    u, s, vh = _svd(m)
    keep = s > s.shape[-1] * _EPS * s[..., :1]
    return (u * keep.unsqueeze(-2)) @ vh


def polar(m: Tensor) -> Tensor:
    """Orthogonal factor U V^T of m = U S V^T, (..., d, d)."""
    u, s, vh = _svd(m)
    # 0 * inf: a matrix that holds inf has no polar factor, but LAPACK returns one.
    return (u @ vh + 0 * s[..., :1, None]).to(result_dtype(m))


def polar_grad(m: Tensor, grad: Tensor) -> Tensor:
    r"""Gradient of `polar`: U Y with H Y + Y H = U^T grad - grad^T U and H = (m^T m)^(1/2).

    From m = U H: U^T dU is skew and H (U^T dU) + (U^T dU) H = U^T dm - dm^T U.
    """
    left, s, vh = _svd(m)
    u = left @ vh
    skew = u.mT @ grad.double()
    skew = skew - skew.mT
    return u @ vh.mT @ divide_by_sums(vh @ skew @ vh.mT, s) @ vh


def trace_sqrtm_product(a: Tensor, b: Tensor) -> Tensor:
    """Tr((a b)^(1/2)) = |F_a^T F_b|_* with F F^T the argument, (..., d, d) -> (...).

    Singular values of the factors' product, and not eigenvalues of a b, which is not symmetric
    and loses half the digits.
    """
    (wa, qa, flag_a), (wb, qb, flag_b) = psd_eigh(a), psd_eigh(b)
    m = (qa * wa.sqrt().unsqueeze(-2)).mT @ (qb * wb.sqrt().unsqueeze(-2))
    return (singular_value_sum(m) + flag_a + flag_b).to(result_dtype(a))


def trace_sqrtm_product_grad(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dT/da = P_a / 2 and dT/db = P_b / 2 with P_a = F_a^-T U F_b^T, P_b = F_b^-T U^T F_a^T.

    U is the polar factor of F_a^T F_b. An eigenvalue below d eps of the largest counts as 0 and its
    inverse as 0: at a singular argument this is the gradient along its range. Out of the range the
    slope of T is infinite, and the gradient has 0 there.
    """
    (fa, fa_inv), (fb, fb_inv) = _factor_and_inverse(a), _factor_and_inverse(b)
    u = partial_isometry(fa.mT @ fb)
    return symmetrize(fa_inv @ u @ fb.mT) / 2, symmetrize(fb_inv @ u.mT @ fa.mT) / 2


def _factor_and_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    w, q, _ = psd_eigh(a)
    null = w <= w.shape[-1] * _EPS * w[..., -1:]
    root = w.masked_fill(null, 0).sqrt()
    inverse = root.masked_fill(null, 1).reciprocal().masked_fill(null, 0)
    return q * root.unsqueeze(-2), q * inverse.unsqueeze(-2)
