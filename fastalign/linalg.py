r"""Linear algebra of covariance matrices: roots, polar factors and nuclear norms, with gradients.

All are batched over leading dimensions and run on CPU and CUDA. Decompositions are taken in
float64 for every input, so a result is as accurate as its input: rounding a matrix to float32
leaves traces a relative error of about 1e-7, `sqrtm` one of about condition^(1/2) * 1e-7 and its
gradient condition * 1e-7. Beyond a condition number of 1e6, give float64.

Results are float32, or float64 for float64 input; a gradient has the dtype of its input and can be
taken once. A matrix that holds NaN or inf gives NaN, or raises torch.linalg.LinAlgError where the
decomposition finds it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.ops._check import check_floating, check_positive, check_same
from fastalign.reference import psd
from fastalign.reference.newton_schulz import (
    corrected_trace,
    newton_schulz,
    quintic_schedule,
    trace_certificate,
)

__all__ = [
    "newton_schulz_nuclear_norm",
    "newton_schulz_polar",
    "nuclear_norm",
    "polar",
    "sqrtm",
    "trace_sqrtm_product",
]

# 12 repeats take the certificate below 1e-6 at any width; more would only chase rounding.
_MAX_REPEATS = 12


def _check_square(**matrices: Tensor) -> None:
    check_floating(**matrices)
    for name, matrix in matrices.items():
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
            raise ValueError(
                f"{name} must be square matrices (..., d, d) with d >= 1: "
                f"got shape {tuple(matrix.shape)}"
            )


class _Sqrtm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, q, flag = psd.psd_eigh(a)
        return psd.sqrtm_from_eigh(w, q, flag).to(psd.result_dtype(a)), w, q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, w, q = output
        ctx.mark_non_differentiable(w, q)
        ctx.save_for_backward(w, q)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        w, q = ctx.saved_tensors
        return psd.sqrtm_grad(w, q, grad).to(ctx.dtype)


class _NuclearNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor) -> Tensor:
        return psd.nuclear_norm(m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return (grad[..., None, None] * psd.partial_isometry(m)).to(m.dtype)


class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(m: Tensor) -> Tensor:
        return psd.polar(m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (m,) = ctx.saved_tensors
        return psd.polar_grad(m, grad).to(m.dtype)


class _TraceSqrtmProduct(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return psd.trace_sqrtm_product(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        da, db = psd.trace_sqrtm_product_grad(a, b)
        grad = grad[..., None, None]
        return (grad * da).to(a.dtype), (grad * db).to(b.dtype)


def sqrtm(a: Tensor) -> Tensor:
    r"""Principal square root of symmetric positive semi-definite matrices, $S S = a$.

    The gradient $X$ solves $S X + X S = G$ and holds for repeated eigenvalues. Where two null
    directions of `a` meet, the root has no derivative and the gradient is 0.

    Args:
        a: (..., d, d), any floating dtype; only the symmetric part counts. Negative eigenvalues
            of the size of rounding, d eps |a|, count as 0.

    Returns:
        (..., d, d), symmetric, float32 or float64; NaN for a matrix that is not semi-definite.
        Differentiable once.

    Raises:
        TypeError: `a` is not of a floating-point dtype.
        ValueError: `a` is not square.
    """
    _check_square(a=a)
    root: Tensor = _Sqrtm.apply(a)[0]  # type: ignore[no-untyped-call]
    return root


def nuclear_norm(m: Tensor) -> Tensor:
    r"""Sum of singular values, $\|m\|_* = \mathrm{Tr}((m^\top m)^{1/2})$.

    The gradient is $U V^\top$, unique for repeated singular values; at a singular matrix it is the
    subgradient of least norm, over the singular values above d eps of the largest.

    Args:
        m: (..., d, d), any floating dtype.

    Returns:
        (...), float32 or float64. Differentiable once.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` is not square.
    """
    _check_square(m=m)
    norm: Tensor = _NuclearNorm.apply(m)  # type: ignore[no-untyped-call]
    return norm


def polar(m: Tensor) -> Tensor:
    r"""Orthogonal factor $U$ of the polar decomposition $m = U H$, $H$ positive semi-definite.

    At a singular matrix U is not unique: one orthogonal factor comes back, and directions in which
    it has no derivative get the gradient 0.

    Args:
        m: (..., d, d), any floating dtype.

    Returns:
        (..., d, d), float32 or float64. Differentiable once.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` is not square.
    """
    _check_square(m=m)
    factor: Tensor = _Polar.apply(m)  # type: ignore[no-untyped-call]
    return factor


def trace_sqrtm_product(a: Tensor, b: Tensor) -> Tensor:
    r"""$\mathrm{Tr}((a b)^{1/2})$ of positive semi-definite matrices: the Frechet distance's root.

    Computed as $\|F_a^\top F_b\|_*$ with $F F^\top$ the argument. The gradient is $P_a / 2$ with
    $P_a = F_a^{-\top} U F_b^\top$, U the polar factor of $F_a^\top F_b$. At a singular argument it
    is the gradient along the argument's range; out of the range the slope is infinite, and the
    gradient 0. Eigenvalues below d eps (of float64) of the largest count as 0 for this.

    Args:
        a: (..., d, d), any floating dtype; only the symmetric part counts. Negative eigenvalues
            of the size of rounding, d eps |a|, count as 0.
        b: The shape, dtype and device of `a`.

    Returns:
        (...), float32 or float64; NaN where a matrix is not semi-definite. Differentiable once.

    Raises:
        TypeError: An argument is not of a floating-point dtype.
        ValueError: They are not square, or differ in shape, dtype or device.
    """
    _check_square(a=a, b=b)
    check_same(a=a, b=b)
    trace: Tensor = _TraceSqrtmProduct.apply(a, b)  # type: ignore[no-untyped-call]
    return trace


@torch.no_grad()
def newton_schulz_polar(m: Tensor, *, steps: int = 12) -> Tensor:
    r"""Orthogonal factor by a Newton-Schulz iteration: matrix products only, no decomposition.

    Each step applies the odd quintic nearest to 1 on the interval that holds the singular values.
    Twelve steps bring those above 1e-6 of the largest to 1 within 1e-6 in float32, 1e-8 in float64;
    smaller ones stay below 1. Not differentiable: `polar` is.

    Args:
        m: (..., d, d), any floating dtype.
        steps: Number of steps.

    Returns:
        (..., d, d), float32 or float64; 0 for a zero matrix.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` is not square, or `steps` is not positive.
    """
    _check_square(m=m)
    check_positive("steps", steps)
    x, _ = newton_schulz(m.to(psd.result_dtype(m)), quintic_schedule(steps))
    return x


@torch.no_grad()
def newton_schulz_nuclear_norm(m: Tensor, *, rtol: float = 1e-5) -> Tensor:
    r"""Nuclear norm by the same iteration: products in float32, the trace corrected in float64.

    The polar factor X enters as $\langle X, M\rangle - \langle X (X^\top X - I), M\rangle / 2$,
    so its own error counts in second order only. What small singular values may still lack is
    bounded; while the bound exceeds `rtol`, the iteration is run again with more steps. Not
    differentiable: `nuclear_norm` is.

    Args:
        m: (..., n, d), any floating dtype, not necessarily square.
        rtol: Relative error to stay below, apart from rounding (about 1e-6 in all).

    Returns:
        (...), float64.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` has fewer than two dimensions, or `rtol` is not positive.
    """
    check_floating(m=m)
    check_positive("rtol", rtol)
    if m.dim() < 2:
        raise ValueError(f"m must be matrices (..., n, d): got shape {tuple(m.shape)}")
    if m.numel() == 0:
        return m.new_zeros(m.shape[:-2], dtype=torch.float64)
    wide = m.double() if m.shape[-2] >= m.shape[-1] else m.double().mT
    # A power of two keeps float32 within range and costs no digit.
    largest = wide.abs().amax((-2, -1), keepdim=True)
    unit = torch.exp2(largest.clamp_min(torch.finfo(torch.float64).tiny).log2().round())
    wide = wide / unit
    repeats = 0
    while True:
        schedule = quintic_schedule(repeats=repeats)
        x, scale = newton_schulz(wide.float(), schedule)
        trace, square_norm = corrected_trace(x.double(), wide)
        lacking = trace_certificate(schedule, scale.double(), square_norm, wide.shape[-1])
        excess = float((lacking / (rtol * trace)).nan_to_num(0.0).max())
        if excess <= 1 or repeats == _MAX_REPEATS:
            return trace * unit[..., 0, 0]
        # One repeat divides what is lacking by about 4.
        repeats = min(_MAX_REPEATS, repeats + max(1, math.ceil(math.log(excess, 4))))
