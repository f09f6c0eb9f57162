"""Roots of positive semi-definite matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.linalg._common import (
    Batched,
    Method,
    check_square,
    gradient,
    iterates,
    products,
)
from fastalign.ops._autocast import no_autocast
from fastalign.reference import newton_schulz as ns
from fastalign.reference import psd

Found = tuple[Tensor, Tensor, Tensor]


def _polar_root(a: Tensor) -> Found:
    """Root H of a, its inverse L^-T U, and what Cholesky found wrong, (...).

    From a = L L^T and L^T = U H, U by the iteration. Dimensions of large variance come first.
    """
    storage = ns.STORAGE[psd.result_dtype(a)]
    wide = psd.symmetrize(a.to(storage.dtype))
    order = wide.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    factor, info = torch.linalg.cholesky_ex(psd.permute(wide, order))
    upper = factor.mT
    x, _ = ns.newton_schulz(upper, ns.quintic_schedule(), storage, products(a))
    u = ns.refined_factor(x, storage, products(a))
    inverse = torch.linalg.solve_triangular(upper, u, upper=True)
    back = order.argsort(dim=-1)
    root, inverse = (psd.permute(psd.symmetrize(m), back) for m in (u.mT @ upper, inverse))
    return root, inverse, info


class _Sqrtm(Batched):
    @staticmethod
    def forward(a: Tensor, iterate: bool) -> Found:
        if iterate:
            root, _, info = _polar_root(a)
            if not bool(info.any()):
                none = root.new_empty(*root.shape[:-2], 0)
                return root, none, none.clone()
        w, q, flag = psd.psd_eigh(a)
        return psd.sqrtm_from_eigh(w, q, flag).to(psd.result_dtype(a)), w, q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        return gradient(_sqrtm_grad, *ctx.saved_tensors, grad, ctx.dtype), None


def _sqrtm_grad(root: Tensor, w: Tensor, q: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    if w.shape[-1] == 0:  # by the iteration: no eigenvectors
        return psd.solve_sylvester(root, psd.symmetrize(grad)).to(dtype)
    return psd.sqrtm_grad(w, q, grad).to(dtype)


class _SqrtmInverse(Batched):
    @staticmethod
    def forward(a: Tensor, iterate: bool) -> Found:
        if iterate:
            root, inverse, info = _polar_root(a)
            inverse = inverse.masked_fill((info != 0)[..., None, None], torch.nan)
            return inverse, root, root.new_empty(*root.shape[:-2], 0)
        w, q, flag = psd.psd_eigh(a)
        dtype = psd.result_dtype(a)
        inverse = psd.sqrtm_inverse_from_eigh(w, q, flag, torch.finfo(dtype).eps)
        return inverse.to(dtype), w, q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        return gradient(_sqrtm_inverse_grad, *ctx.saved_tensors, grad, ctx.dtype), None


def _sqrtm_inverse_grad(
    inverse: Tensor, w: Tensor, q: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    if q.shape[-1] == 0:  # by the iteration: w is the root
        return psd.solve_sylvester(w, -inverse @ psd.symmetrize(grad) @ inverse).to(dtype)
    return psd.sqrtm_inverse_grad(w, q, grad).to(dtype)


def sqrtm(a: Tensor, *, method: Method = "auto") -> Tensor:
    r"""Principal square root of symmetric positive semi-definite matrices, $S S = a$.

    The gradient $X$ solves $S X + X S = G$ and holds for repeated eigenvalues. Where two null
    directions of `a` meet, the root has no derivative and the gradient is 0.

    "newton_schulz" takes the polar factor of a Cholesky factor, and the gradient by squared Smith,
    in products of float32 (float64 for float64). Its relative error in float32 is at most 2e-6 at a
    condition number of 1e2, 1e-5 at 1e4 and 1e-4 at 1e6, that of its gradient 2e-6, 5e-5 and 3e-3;
    give float64 beyond. It waits for the device once, and decomposes where a matrix is singular.

    Args:
        a: (..., d, d), any floating dtype; only the symmetric part counts. Negative eigenvalues
            of the size of rounding, d eps |a|, count as 0.
        method: "auto", "newton_schulz" or "eigh": see the module.

    Returns:
        (..., d, d), symmetric, float32 or float64; NaN for a matrix that is not semi-definite.
        Differentiable once.

    Raises:
        TypeError: `a` is not of a floating-point dtype.
        ValueError: `a` is not square, or `method` is unknown.
    """
    check_square(a=a)
    with no_autocast(a):
        root: Tensor = _Sqrtm.apply(a, iterates(method, a))[0]  # type: ignore[no-untyped-call]
    return root


def sqrtm_inverse(a: Tensor, *, method: Method = "auto") -> Tensor:
    r"""Inverse of the principal root, $S^{-1} = a^{-1/2}$: whitens rows of covariance `a`.

    The gradient $X$ solves $S X + X S = -S^{-1} G S^{-1}$. The relative error is about that of
    `sqrtm` times condition^(1/2), whichever the method.

    Args:
        a: Symmetric positive definite, (..., d, d), any floating dtype; only the symmetric part
            counts. Add a multiple of the identity to a covariance of fewer rows than dimensions.
        method: "auto", "newton_schulz" or "eigh": see the module.

    Returns:
        (..., d, d), symmetric, float32 or float64; NaN for a matrix that is not definite: whose
        least eigenvalue is below eps times the largest, eps that of the result's dtype
        ("newton_schulz": that fails to factor). Nothing waits for the device to raise an error.
        Differentiable once.

    Raises:
        TypeError: `a` is not of a floating-point dtype.
        ValueError: `a` is not square, or `method` is unknown.
    """
    check_square(a=a)
    with no_autocast(a):
        found: Found = _SqrtmInverse.apply(a, iterates(method, a))  # type: ignore[no-untyped-call]
    return found[0]
