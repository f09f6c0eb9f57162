"""The symmetric product: checks, gradient, the choice of the path, and the portable one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_floating, check_one_of, check_same, check_shape
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference._rows import wide

PANEL = 128  # columns that the portable path computes at a time


class Syrk(torch.autograd.Function):
    """The kernel, with a gradient by one product in float32 or wider."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, y: Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
    ) -> Tensor:
        from fastalign_kernels.syrk import syrk_fwd

        c: Tensor = syrk_fwd(x, y, alpha, beta, out_dtype)
        return c

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.alpha, ctx.beta, _ = inputs
        ctx.y_dtype = None if y is None else y.dtype
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        dx = dy = None
        if ctx.needs_input_grad[0]:
            dx = once(_dx, dc, x, ctx.alpha)
        if ctx.needs_input_grad[1]:
            dy = once(_dy, dc, ctx.beta, ctx.y_dtype)
        return dx, dy, None, None, None


class SyrkPortable(Syrk):
    """The same in torch operations, on any device."""

    @staticmethod
    def forward(
        x: Tensor, y: Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
    ) -> Tensor:
        with no_autocast(x):
            return _panels(x, y, alpha, beta, out_dtype)


def _panels(
    x: Tensor, y: Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> Tensor:
    """Panels of columns down to the diagonal, each stored with its mirror image: half the product.

    As in the kernel, the lower triangle of `y` does not count.
    """
    (x,) = wide(x)
    d = x.shape[-1]
    c = None
    for start in range(0, max(d, 1), PANEL):
        stop = min(start + PANEL, d)
        panel = (x[..., :stop].mT @ x[..., start:stop]).mul_(alpha)
        if y is not None:
            panel = torch.add(panel, y[..., :stop, start:stop], alpha=beta)
        if c is None:  # of a panel, for vmap: batched where x or y is
            c = panel.new_empty((*x.shape[:-2], d, d), dtype=out_dtype)
        above, corner = panel[..., :start, :], panel[..., start:, :].triu()
        corner += corner.triu(1).mT
        c[..., :start, start:stop] = above
        c[..., start:stop, :start] = above.mT
        c[..., start:stop, start:stop] = corner
    assert c is not None
    return c


def _dx(dc: Tensor, x: Tensor, alpha: float) -> Tensor:
    """alpha X (dC + dC^T)."""
    with no_autocast(x):
        dc, rows = wide(dc, x)
        return (rows @ (dc + dc.mT)).mul_(alpha).to(x.dtype)


def _dy(dc: Tensor, beta: float, dtype: torch.dtype) -> Tensor:
    """beta (dC + dC^T) / 2, the gradient among symmetric matrices."""
    (dc,) = wide(dc)
    return ((dc + dc.mT) * (beta / 2)).to(dtype)


def syrk(
    x: Tensor,
    y: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Symmetric product $C = \alpha X^\top X + \beta Y$, at half the cost of a product.

    The name is that of BLAS's routine. With `x` a symmetric A and `y` the same, it is
    $\beta A + \alpha A^2$, the polynomial of a Newton-Schulz step; powers of two by which a stored
    float16 was scaled are undone in `alpha` and `beta`.

    Args:
        x: Rows, (..., n, d), any floating dtype; on CUDA float16, bfloat16 or float32 by a kernel
            and float64 in torch's own operations, no other. Copied where it is not contiguous.
        y: Symmetric matrices, (..., d, d), in the dtype of `x` or of the result; None for none.
            The entries below the diagonal do not count. Ignored where `beta` is 0.
        alpha, beta: Factors, numbers of the host.
        out_dtype: Of the result, that of `x` when None; torch.float32 also for narrower `x`, as a
            Gram matrix to be added up needs it.

    Returns:
        (..., d, d), equal to its transpose bit for bit, and the same every time; 0 for n = 0.
        Products are added up in float32 (float64 for float64), float32 ones on CUDA at the
        accuracy of float32 whatever TF32 setting torch has. Differentiable once in `x` and `y`;
        the gradient of `y` is symmetric.

    Raises:
        TypeError: `x` or `y` is not floating point.
        ValueError: Shapes, dtypes or devices do not fit, `beta` came without `y`, or a dtype is
            not supported.
    """
    check_floating(x=x)
    if x.dim() < 2:
        raise ValueError(f"x must be (..., n, d): got shape {tuple(x.shape)}")
    if out_dtype is None:
        out_dtype = x.dtype
    else:
        wider = torch.promote_types(x.dtype, torch.float32)
        check_one_of(f"out_dtype for x in {x.dtype}", out_dtype, (x.dtype, wider))
    if y is not None:
        check_floating(y=y)
        d = x.shape[-1]
        check_shape("y", y, (*x.shape[:-2], d, d), "(..., d, d) of x")
        check_same("device", x=x, y=y)
        check_one_of("the dtype of y, that of x or of the result,", y.dtype, (x.dtype, out_dtype))
    elif beta != 0:
        raise ValueError(f"beta must be 0 without y: got {beta}; pass y, the matrix it multiplies")
    if beta == 0:
        y = None
    function: type[Syrk] = SyrkPortable
    if on_triton(x) and x.dtype != torch.float64:
        from fastalign_kernels.syrk import DTYPES

        check_one_of("the dtype of x on CUDA", x.dtype, DTYPES)
        function = Syrk
    c: Tensor = function.apply(x, y, alpha, beta, out_dtype)  # type: ignore[no-untyped-call]
    return c
