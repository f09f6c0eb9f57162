"""Nuclear norms and polar factors."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.linalg._common import (
    Batched,
    Certified,
    Method,
    check_square,
    factor_storage,
    gradient,
    iterates,
    products,
    tall,
    wide_storage,
)
from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_floating, check_one_of, check_positive, check_same
from fastalign.reference import newton_schulz as ns
from fastalign.reference import psd


class _NuclearNorm(Batched):
    @staticmethod
    def forward(m: Tensor, storage: ns.Storage | None) -> tuple[Tensor, Tensor, Tensor]:
        if storage is None:
            value = psd.nuclear_norm(m)
            return value, torch.zeros_like(value), value.new_empty(*value.shape, 0)
        norm = ns.nuclear_norm(tall(m).to(storage.wide), storage, products(m))
        dtype = psd.result_dtype(m)
        return norm.value.to(dtype), norm.bound.to(dtype), norm.x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        m, ctx.storage = inputs
        _, bound, x = output
        ctx.mark_non_differentiable(bound, x)
        ctx.save_for_backward(m, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        return gradient(_nuclear_norm_grad, *ctx.saved_tensors, grad, ctx.storage), None


def _nuclear_norm_grad(m: Tensor, x: Tensor, grad: Tensor, storage: ns.Storage | None) -> Tensor:
    if storage is None:
        u = psd.partial_isometry(m)
    else:
        u = ns.refined_factor(x, storage, products(x))
        u = u if m.shape[-2] >= m.shape[-1] else u.mT
    return (grad[..., None, None] * u).to(m.dtype)


class _Polar(Batched):
    @staticmethod
    def forward(m: Tensor, storage: ns.Storage | None) -> Tensor:
        if storage is None:
            return psd.polar(m)
        x, _ = ns.newton_schulz(m.to(storage.wide), ns.quintic_schedule(), storage, products(m))
        return ns.refined_factor(x, storage, products(m))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        m, storage = inputs
        ctx.save_for_backward(m, *(() if storage is None else (output,)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gradient(_polar_grad, grad, *ctx.saved_tensors), None


def _polar_grad(grad: Tensor, m: Tensor, u: Tensor | None = None) -> Tensor:
    if u is None:
        return psd.polar_grad(m, grad).to(m.dtype)
    h = psd.symmetrize(u.mT @ m.to(u.dtype))
    skew = u.mT @ grad
    return (u @ psd.solve_sylvester(h, skew - skew.mT)).to(m.dtype)


class _FactorProduct(Batched):
    @staticmethod
    def forward(f: Tensor, g: Tensor, storage: ns.Storage) -> Tensor:
        return ns.split_product(f, g, storage, products(f))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *gradient(_factor_product_grad, *ctx.saved_tensors, grad), None


def _factor_product_grad(f: Tensor, g: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    df, dg = g.to(grad.dtype) @ grad.mT, f.to(grad.dtype) @ grad
    return df.to(f.dtype), dg.to(g.dtype)


@overload
def nuclear_norm(
    m: Tensor, *, method: Method = ..., certificate: Literal[False] = ...
) -> Tensor: ...
@overload
def nuclear_norm(m: Tensor, *, method: Method = ..., certificate: Literal[True]) -> Certified: ...
def nuclear_norm(
    m: Tensor, *, method: Method = "auto", certificate: bool = False
) -> Tensor | Certified:
    r"""Sum of singular values, $\|m\|_* = \mathrm{Tr}((m^\top m)^{1/2})$.

    The gradient is $U V^\top$, unique for repeated singular values; at a singular matrix it is the
    subgradient of least norm, over the singular values above d eps of the largest. By
    "newton_schulz" the value errs by 1e-5 at most and waits for the device once or more; in the
    gradient singular values below 1e-6 of the largest count in part. Products are in the dtype of
    the result.

    Args:
        m: (..., d, d), any floating dtype.
        method: "auto", "newton_schulz" or "eigh" (singular values): see the module.
        certificate: Also return a bound of what the iteration left out.

    Returns:
        (...), float32 or float64. Differentiable once. With `certificate`, `(value, bound)`.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` is not square, or `method` is unknown.
    """
    check_square(m=m)
    with no_autocast(m):
        storage = wide_storage(m) if iterates(method, m) else None
        value, bound, _ = _NuclearNorm.apply(m, storage)  # type: ignore[no-untyped-call]
    return Certified(value, bound) if certificate else value


@overload
def trace_of_factors(
    f: Tensor, g: Tensor, *, method: Method = ..., certificate: Literal[False] = ...
) -> Tensor: ...
@overload
def trace_of_factors(
    f: Tensor, g: Tensor, *, method: Method = ..., certificate: Literal[True]
) -> Certified: ...
def trace_of_factors(
    f: Tensor, g: Tensor, *, method: Method = "auto", certificate: bool = False
) -> Tensor | Certified:
    r"""$\mathrm{Tr}((f f^\top g g^\top)^{1/2}) = \|f^\top g\|_*$ of factors of any rank.

    For covariances of fewer rows than dimensions: centred rows over $\sqrt{n - 1}$, transposed, are
    the factor, and nothing is squared. The error is at most that of `nuclear_norm`. Gradients are
    $g U^\top$ and $f U$, U the polar factor of $f^\top g$.

    Args:
        f: (..., d, r), any floating dtype.
        g: (..., d, s), the other dimensions, dtype and device those of `f`.
        method: "auto", "newton_schulz" or "eigh" (singular values): see the module.
        certificate: Also return a bound of what the iteration left out.

    Returns:
        (...), float32 or float64; 0 for r = 0. Differentiable once. With `certificate`,
        `(value, bound)`.

    Raises:
        TypeError: An argument is not of a floating-point dtype.
        ValueError: They have fewer than two dimensions, differ in one other than the last, in dtype
            or device, or `method` is unknown.
    """
    check_floating(f=f, g=g)
    check_same("dtype", "device", f=f, g=g)
    if f.dim() < 2 or f.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            "f and g must be (..., d, r) and (..., d, s): "
            f"got shapes {tuple(f.shape)} and {tuple(g.shape)}"
        )
    with no_autocast(f):
        iterate = iterates(method, f) and min(f.shape[-1], g.shape[-1], f.shape[-2]) > 0
        storage = wide_storage(f) if iterate else None
        if storage is not None:
            m = _FactorProduct.apply(f, g, storage)  # type: ignore[no-untyped-call]
        else:
            m = f.double().mT @ g.double()
        value, bound, _ = _NuclearNorm.apply(m, storage)  # type: ignore[no-untyped-call]
    value, bound = (t.to(psd.result_dtype(f)) for t in (value, bound))
    return Certified(value, bound) if certificate else value


def polar(m: Tensor, *, method: Method = "auto") -> Tensor:
    r"""Orthogonal factor $U$ of the polar decomposition $m = U H$, $H$ positive semi-definite.

    At a singular matrix U is not unique. By "eigh" one orthogonal factor comes back, and directions
    in which it has no derivative get the gradient 0. By "newton_schulz" singular values of `m`
    below 1e-6 of the largest stay below 1 in U, and the gradient needs a condition number below
    1e4; products are in the dtype of the result, on CUDA in float16 for 16-bit input.

    Args:
        m: (..., d, d), any floating dtype.
        method: "auto", "newton_schulz" or "eigh" (singular vectors): see the module.

    Returns:
        (..., d, d), float32 or float64. Differentiable once.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` is not square, or `method` is unknown.
    """
    check_square(m=m)
    with no_autocast(m):
        storage = factor_storage(m) if iterates(method, m) else None
        factor: Tensor = _Polar.apply(m, storage)  # type: ignore[no-untyped-call]
    return factor


def _check_matrices(m: Tensor, dtype: torch.dtype | None) -> None:
    check_floating(m=m)
    if m.dim() < 2:
        raise ValueError(f"m must be matrices (..., n, d): got shape {tuple(m.shape)}")
    check_one_of("dtype", dtype, (None, *ns.STORAGE))


@torch.no_grad()
def newton_schulz_polar(
    m: Tensor, *, steps: int = 12, lower: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Orthogonal factor by a Newton-Schulz iteration: matrix products only, no decomposition.

    Each step applies the odd quintic nearest to 1 on the interval that holds the singular values.
    Twelve steps bring those above 1e-6 of the largest to 1 within 1e-6 in float32, 1e-8 in float64
    and 5e-3 in float16; smaller ones stay below 1. For the updates of an optimizer five steps with
    `lower=1e-2` serve. Not differentiable: `polar` is.

    Args:
        m: (..., n, d), any floating dtype, not necessarily square.
        steps: Number of steps.
        lower: Least singular value, relative to a bound of the largest that may be twice too high,
            which the steps are fitted to. Fewer steps need a higher one.
        dtype: What matrices are kept in between products: torch.float16 (scaled by powers of two),
            torch.bfloat16, torch.float32 or torch.float64. None is that of `m`, and torch.float16
            for bfloat16 input, which is as fast and more accurate.

    Returns:
        (..., n, d), orthonormal columns or rows, whichever are fewer; float32 or float64; 0 for a
        zero matrix.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` has fewer than two dimensions, `steps` is not positive, `lower` is
            not between 0 and 1, or `dtype` is another.
    """
    _check_matrices(m, dtype)
    check_positive("steps", steps)
    if not 0 < lower < 1:
        raise ValueError(f"lower must be above 0 and below 1: got {lower!r}")
    if m.numel() == 0:
        return m.to(psd.result_dtype(m))
    storage = ns.STORAGE[dtype or (torch.float16 if m.dtype == torch.bfloat16 else m.dtype)]
    schedule = ns.quintic_schedule(steps, lower=lower, inflation=storage.inflation)
    with no_autocast(m):
        wide = torch.promote_types(storage.wide, m.dtype)
        x, _ = ns.newton_schulz(tall(m).to(wide), schedule, storage, products(m))
        factor = x.to(psd.result_dtype(m)) / storage.x
    return factor if m.shape[-2] >= m.shape[-1] else factor.mT


@torch.no_grad()
def newton_schulz_nuclear_norm(
    m: Tensor, *, rtol: float = 1e-5, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Nuclear norm by the same iteration: products in float32, the trace summed in float64.

    The polar factor X enters as $\langle X, M\rangle - \langle X (X^\top X - I), M\rangle / 2$,
    so its own error counts in second order only. What small singular values may still lack is
    bounded; while the bound exceeds `rtol`, the iteration is run again with more steps. Not
    differentiable: `nuclear_norm` is.

    Args:
        m: (..., n, d), any floating dtype, not necessarily square.
        rtol: Relative error to stay below, apart from rounding: about 1e-6 in all in float32, 1e-5
            in float16 and 5e-4 in bfloat16.
        dtype: What matrices are kept in between products, as in `newton_schulz_polar`.

    Returns:
        (...), float64.

    Raises:
        TypeError: `m` is not of a floating-point dtype.
        ValueError: `m` has fewer than two dimensions, `rtol` is not positive, or `dtype` is
            another.
    """
    _check_matrices(m, dtype)
    check_positive("rtol", rtol)
    if m.numel() == 0:
        return m.new_zeros(m.shape[:-2], dtype=torch.float64)
    with no_autocast(m):
        wide = tall(m.double())
        return ns.nuclear_norm(wide, ns.STORAGE[dtype], products(m), rtol).value
