"""Hadamard reweighting of rows, forward and backward.

    y  = s u             u = w ∘ h,  s = |h| / |u|,  0 for a row with u = 0
    q  = <dy, u> / |u|   t = dy - q u / |u|
    dh = q h / |h| + s (w ∘ t)
    dw = s (h ∘ t)

One program per row; h, w and dy are read once and kept in registers, so the cost is their bytes.
A `w` of shape (d,), shared by the rows, gets its gradient through a partial sum of each program,
which torch adds up: no atomics, so the result is the same every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import _fakes
from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

MAX_DIM = 16384  # rows of h, w and dy must fit in registers
_PARTIALS = 512  # programs that share the rows of a (d,) w: enough to fill a GPU


@triton.jit
def _norm(x):
    """Norm of a row, scaled so that no square over- or underflows.

    The scale is the power of two below the largest magnitude: multiplying by it is exact.
    """
    largest = tl.maximum(tl.max(tl.abs(x)), 1e-30)
    scale = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    x = x * (1.0 / scale)
    return scale * tl.sqrt_rn(tl.sum(x * x))


@triton.jit
def _ratio(x, norm):
    """x / norm, and 0 for a zero row; NaN stays NaN."""
    zero = norm == 0
    return tl.div_rn(tl.where(zero, 0.0, x), tl.where(zero, 1.0, norm))


@triton.jit
def _hadamard_reweight_fwd(h_ptr, w_ptr, y_ptr, d, w_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < d
    h = tl.load(h_ptr + row * d + cols, mask=mask, other=0.0).to(tl.float32)  # (BLOCK,)
    w = tl.load(w_ptr + row * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
    u = w * h
    y = _ratio(_norm(h), _norm(u)) * u
    tl.store(y_ptr + row * d + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hadamard_reweight_bwd(
    dy_ptr,
    h_ptr,
    w_ptr,
    dh_ptr,
    dw_ptr,
    n,
    d,
    w_stride,
    rows,
    NEEDS_W: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < d
    dw_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(program * rows, tl.minimum(program * rows + rows, n)):
        dy = tl.load(dy_ptr + row * d + cols, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row * d + cols, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + row * w_stride + cols, mask=mask, other=0.0).to(tl.float32)
        u = w * h
        h_norm, u_norm = _norm(h), _norm(u)
        q = _ratio(tl.sum(dy * u), u_norm)
        t = dy - _ratio(q, u_norm) * u
        s = _ratio(h_norm, u_norm)
        dh = _ratio(q, h_norm) * h + s * w * t
        dw = s * h * t
        tl.store(dh_ptr + row * d + cols, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if NEEDS_W and SHARED:
            dw_sum += dw
        elif NEEDS_W:
            tl.store(dw_ptr + row * d + cols, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    if NEEDS_W and SHARED:
        tl.store(dw_ptr + program * d + cols, dw_sum, mask=mask)


def _config(d: int) -> dict[str, int]:
    """Launch shape for rows of `d`: the whole row in one block, 8 elements a thread.

    Above 8192 it is 16, and backward spills up to 200 bytes a thread.
    """
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 32)}


@op("(Tensor h, Tensor w) -> Tensor", fake=_fakes.hadamard_reweight_fwd)
def hadamard_reweight_fwd(h: Tensor, w: Tensor) -> Tensor:
    """(..., d), (..., d) or (d,) -> (..., d) in the dtype of h."""
    h, w = h.contiguous(), w.contiguous()
    d = h.shape[-1]
    y = torch.empty_like(h)
    if h.numel():
        w_stride = d if w.dim() == h.dim() else 0
        _hadamard_reweight_fwd[(h.numel() // d,)](h, w, y, d, w_stride, **_config(d))
    return y


@op(
    "(Tensor dy, Tensor h, Tensor w, bool needs_w) -> (Tensor, Tensor)",
    fake=_fakes.hadamard_reweight_bwd,
)
def hadamard_reweight_bwd(dy: Tensor, h: Tensor, w: Tensor, needs_w: bool) -> tuple[Tensor, Tensor]:
    """dy (..., d) -> dh and dw in the shapes and dtypes of h and w; dw (0,) if not `needs_w`."""
    dy, h, w = dy.contiguous(), h.contiguous(), w.contiguous()
    dh, d = torch.empty_like(h), h.shape[-1]
    if not h.numel():
        return dh, w.new_zeros(w.shape if needs_w else (0,))
    n, shared = h.numel() // d, w.dim() != h.dim()
    rows = triton.cdiv(n, _PARTIALS) if needs_w and shared else 1
    programs = triton.cdiv(n, rows)
    if shared:
        dw = w.new_empty((programs, d) if needs_w else (0,), dtype=torch.float32)
    else:
        dw = w.new_empty(w.shape if needs_w else (0,))
    _hadamard_reweight_bwd[(programs,)](
        dy, h, w, dh, dw, n, d, 0 if shared else d, rows, needs_w, shared, **_config(d)
    )
    return dh, dw.sum(0).to(w.dtype) if needs_w and shared else dw.to(w.dtype)
