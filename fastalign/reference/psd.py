r"""Roots of positive semi-definite matrices, nuclear norms and polar factors, with their gradients.

Everything is computed in float64, whatever comes in: the root halves the digits of the small
eigenvalues, and float32 would lose them from a condition number of 1e6 on. Results leave in
float32, or in float64 for a float64 input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps

# Least and most that is added to the variances of a matrix of each dtype before a factorisation.
_JITTER = {
    torch.float64: (1e-14, 1e-10),
    torch.float32: (1e-8, 1e-4),
    torch.float16: (1e-8, 1e-1),
    torch.bfloat16: (1e-8, 1e-1),
}


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


def cholesky_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Lower L with L L^T = a, and of b, in float64, or None where one is singular to rounding."""
    factors = []
    for matrix in (a, b):
        wide = symmetrize(matrix.double())
        factor, info = torch.linalg.cholesky_ex(wide)
        # A pivot beside its variance: the share of it that the dimensions before leave open.
        variance = wide.diagonal(dim1=-2, dim2=-1)
        pivot = factor.diagonal(dim1=-2, dim2=-1).square()
        if not bool(((info[..., None] == 0) & (pivot > 16 * a.shape[-1] * _EPS * variance)).all()):
            return None
        factors.append(factor)
    return factors[0], factors[1]


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

    U is the polar factor of F_a^T F_b. The factors are Cholesky's where both matrices have full
    rank. Else they are of eigenvectors: an eigenvalue below d eps of the largest counts as 0 and
    its inverse as 0. At a singular argument this is the gradient along its range. Out of the range
    the slope of T is infinite, and the gradient has 0 there.
    """
    # A compiled graph cannot branch on whether Cholesky went through.
    factors = None if torch.compiler.is_compiling() else cholesky_pair(a, b)
    if factors is not None:
        return triangular_trace_grad(*factors, partial_isometry(factors[0].mT @ factors[1]))
    (fa, fa_inv), (fb, fb_inv) = _factor_and_inverse(a), _factor_and_inverse(b)
    u = partial_isometry(fa.mT @ fb)
    return symmetrize(fa_inv @ u @ fb.mT) / 2, symmetrize(fb_inv @ u.mT @ fa.mT) / 2


def triangular_trace_grad(fa: Tensor, fb: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The same for lower triangular factors and the polar factor U of F_a^T F_b."""
    pa = torch.linalg.solve_triangular(fa.mT, u @ fb.mT, upper=True)
    pb = torch.linalg.solve_triangular(fb.mT, u.mT @ fa.mT, upper=True)
    return symmetrize(pa) / 2, symmetrize(pb) / 2


class Factors(NamedTuple):
    """Cholesky factors of two matrices, their dimensions in one order.

    Args:
        a: Lower L, (..., d, d), with L L^T = a[order][:, order] + jitter_a diag(a).
        b: The same of b.
        order: (..., d).
        jitter: (..., 2), relative to each dimension's variance.
        open: Share of dimensions that only the jitter tells from a combination of others,
            (..., 2).
    """

    a: Tensor
    b: Tensor
    order: Tensor
    jitter: Tensor
    open: Tensor


def permute(a: Tensor, order: Tensor) -> Tensor:
    """a[order][:, order] of (..., d, d) by (..., d)."""
    rows = torch.take_along_dim(a, order.unsqueeze(-1), -2)
    return torch.take_along_dim(rows, order.unsqueeze(-2), -1)


def ordered_cholesky(a: Tensor, b: Tensor, jitter: Tensor | None = None) -> Factors:
    """Factors of covariances for an iteration in low precision, in float64.

    Dimensions come in falling order of the product of variances and have unit variance in the
    decomposition: both cut the error of the iteration, and neither changes the trace of the root.
    A little is added to each variance: `jitter` of it, (..., 2), or else as little as serves, up to
    what the rounding of the dtype can ask for. NaN comes of a matrix that stays indefinite.
    """
    dtype = a.dtype
    a, b = (symmetrize(m.double()) for m in (a, b))
    variances = [m.diagonal(dim1=-2, dim2=-1) for m in (a, b)]
    order = (variances[0] * variances[1]).argsort(dim=-1, descending=True)
    given = (None, None) if jitter is None else jitter.unbind(-1)
    found = [
        _jittered_cholesky(permute(m, order), *_JITTER[dtype], given=used)
        for m, used in zip((a, b), given, strict=True)
    ]
    (fa, jitter_a, open_a), (fb, jitter_b, open_b) = found
    jitter, opened = torch.stack([jitter_a, jitter_b], -1), torch.stack([open_a, open_b], -1)
    return Factors(fa, fb, order, jitter, opened)


def _jittered_cholesky(
    a: Tensor, first: float, last: float, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    variance = a.diagonal(dim1=-2, dim2=-1)
    std = variance.clamp_min(0).sqrt()
    unit = std.masked_fill(std == 0, 1)
    correlation = a / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    used = torch.full_like(variance[..., 0], first) if given is None else given
    factor, info = torch.linalg.cholesky_ex(correlation + used[..., None, None] * eye)
    # Reading `info` waits for the device, once where nothing fails.
    while given is None and bool((info != 0).any()) and first < last:
        first *= 2  # the bias grows with it, and a factorisation costs little
        failed = info != 0
        again, left = torch.linalg.cholesky_ex(correlation[failed] + first * eye)
        factor[failed], info[failed], used[failed] = again, left, first
    negative = variance.amin(-1) < -last * variance.amax(-1)
    used = used.masked_fill((info != 0) | negative, torch.nan)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    opened = ((pivots < 4 * used.unsqueeze(-1)) & (std > 0)).to(a.dtype).mean(-1)
    return std.unsqueeze(-1) * factor + 0 * used[..., None, None], used, opened


def _factor_and_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    w, q, _ = psd_eigh(a)
    null = w <= w.shape[-1] * _EPS * w[..., -1:]
    root = w.masked_fill(null, 0).sqrt()
    inverse = root.masked_fill(null, 1).reciprocal().masked_fill(null, 0)
    return q * root.unsqueeze(-2), q * inverse.unsqueeze(-2)


def sqrtm_inverse_from_eigh(w: Tensor, q: Tensor, flag: Tensor, eps: float) -> Tensor:
    """q diag(w^(-1/2)) q^T, (..., d, d); NaN where an eigenvalue is within eps of the largest."""
    singular = w.amin(-1) <= eps * w.amax(-1)
    flag = flag.masked_fill(singular, torch.nan)[..., None, None]
    return symmetrize((q * w.rsqrt().unsqueeze(-2)) @ q.mT) + flag


def sqrtm_inverse(a: Tensor) -> Tensor:
    """Inverse of the principal root of a symmetric positive definite matrix, (..., d, d)."""
    dtype = result_dtype(a)
    return sqrtm_inverse_from_eigh(*psd_eigh(a), torch.finfo(dtype).eps).to(dtype)


def sqrtm_inverse_grad(w: Tensor, q: Tensor, grad: Tensor) -> Tensor:
    """Gradient of Z = S^-1: X of S X + X S = -Z sym(grad) Z, from dZ = -Z dS Z."""
    inner = q.mT @ symmetrize(grad.double()) @ q
    s = w.sqrt()
    inner = -inner / (s.unsqueeze(-1) * s.unsqueeze(-2))
    return symmetrize(q @ divide_by_sums(inner, s) @ q.mT)


def solve_sylvester(s: Tensor, g: Tensor, doublings: int = 9) -> Tensor:
    r"""X of S X + X S = G by products, for S symmetric positive definite, (..., d, d).

    Squared Smith: with R = (S + p I)^-1 and F = I - 2 p R, the sum 2 p \sum_j F^j R G R F^j, of
    which k doublings take in 2^k terms. p = (s_min s_max)^(1/2) makes |F| least; nine doublings
    leave less than 1e-8 up to a condition number of S of 1e4.
    """
    d = s.shape[-1]
    eye = torch.eye(d, dtype=s.dtype, device=s.device)
    root, _ = torch.linalg.cholesky_ex(s)
    # A start without randomness that no structure of S is likely to be orthogonal to.
    start = torch.arange(1, d + 1, dtype=s.dtype, device=s.device).square().cos().unsqueeze(-1)
    high = low = (start / torch.linalg.vector_norm(start)).expand(*s.shape[:-1], 1)
    for _ in range(12):
        high = s @ high
        high = high / torch.linalg.vector_norm(high, dim=(-2, -1), keepdim=True)
        low = torch.linalg.solve_triangular(root, low, upper=False)
        low = torch.linalg.solve_triangular(root.mT, low, upper=True)
        low = low / torch.linalg.vector_norm(low, dim=(-2, -1), keepdim=True)
    largest, least = ((v.mT @ s @ v) for v in (high, low))
    # NaN and noise come of a matrix that is singular to rounding.
    least = least.nan_to_num(0.0).clamp_min(torch.finfo(s.dtype).eps * largest)
    p = (least * largest).sqrt()
    factor, _ = torch.linalg.cholesky_ex(s + p * eye)
    r: Tensor = torch.cholesky_inverse(factor)
    f = eye - 2 * p * r
    x: Tensor = 2 * p * (r @ g @ r)
    for _ in range(doublings):
        x = x + f @ x @ f
        f = f @ f
    return x
