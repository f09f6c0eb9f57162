"""Affine calibration of the vision rows, forward and backward; text rows are copied bit for bit.

    y  = m ? scale ∘ x + shift : x
    dx = m ? scale ∘ dy : dy     dscale = sum over m of x ∘ dy     dshift = sum over m of dy

Tiles of rows by columns. x, dy and their results move once (backward reads x of vision rows only),
so the cost is their bytes. The column sums go through one partial row for each chunk of rows, which
torch adds up: no atomics, so the result is the same every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import _fakes
from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

_PROGRAMS = 1024  # of backward, at most: enough to fill a GPU, and partial sums of a few MiB


@triton.jit
def _calibrate_fwd(
    x_ptr, mask_ptr, scale_ptr, shift_ptr, y_ptr, n, d, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (cols < d)[None, :]
    offsets = rows[:, None] * d + cols[None, :]
    vision = tl.load(mask_ptr + rows, mask=rows < n, other=0) != 0  # (ROWS,)
    scale = tl.load(scale_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)  # (BLOCK,)
    shift = tl.load(shift_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)  # (ROWS, BLOCK)
    moved = (scale[None, :] * x.to(tl.float32) + shift[None, :]).to(x.dtype)
    tl.store(y_ptr + offsets, tl.where(vision[:, None], moved, x), mask=inside)


@triton.jit
def _calibrate_bwd(
    dy_ptr,
    x_ptr,
    mask_ptr,
    scale_ptr,
    dx_ptr,
    dscale_ptr,
    dshift_ptr,
    n,
    d,
    chunk,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + cols, mask=cols < d, other=0.0).to(tl.float32)
    dscale = tl.zeros((BLOCK,), tl.float32)
    dshift = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * chunk, program * chunk + chunk, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < n)[:, None] & (cols < d)[None, :]
        offsets = rows[:, None] * d + cols[None, :]
        vision = (tl.load(mask_ptr + rows, mask=rows < n, other=0) != 0)[:, None]  # (ROWS, 1)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0)  # (ROWS, BLOCK)
        x = tl.load(x_ptr + offsets, mask=inside & vision, other=0.0).to(tl.float32)
        dx = (scale[None, :] * dy.to(tl.float32)).to(dy.dtype)
        tl.store(dx_ptr + offsets, tl.where(vision, dx, dy), mask=inside)
        dy = tl.where(vision, dy.to(tl.float32), 0.0)
        dscale += tl.sum(x * dy, 0)
        dshift += tl.sum(dy, 0)
    tl.store(dscale_ptr + program * d + cols, dscale, mask=cols < d)
    tl.store(dshift_ptr + program * d + cols, dshift, mask=cols < d)


def _config(d: int) -> dict[str, int]:
    """Launch shape for rows of `d`: a tile of 4096 elements, 32 a thread."""
    block = min(triton.next_power_of_2(d), 512)
    return {"ROWS": 8, "BLOCK": block, "num_warps": max(block // 128, 1)}


@op(
    "(Tensor x, Tensor vision_mask, Tensor scale, Tensor shift) -> Tensor",
    fake=_fakes.calibrate_fwd,
)
def calibrate_fwd(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(..., d), (...) bool, (d,), (d,) -> (..., d) in the dtype of x."""
    x, vision_mask, scale, shift = (t.contiguous() for t in (x, vision_mask, scale, shift))
    y, n, d = torch.empty_like(x), vision_mask.numel(), x.shape[-1]
    if x.numel():
        config = _config(d)
        grid = (triton.cdiv(n, config["ROWS"]), triton.cdiv(d, config["BLOCK"]))
        _calibrate_fwd[grid](x, vision_mask, scale, shift, y, n, d, **config)
    return y


@op(
    "(Tensor dy, Tensor x, Tensor vision_mask, Tensor scale) -> (Tensor, Tensor, Tensor)",
    fake=_fakes.calibrate_bwd,
)
def calibrate_bwd(
    dy: Tensor, x: Tensor, vision_mask: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy (..., d) -> dx in the dtype of x, dscale and dshift (d,) in the dtype of scale."""
    dy, x, vision_mask, scale = (t.contiguous() for t in (dy, x, vision_mask, scale))
    dx, n, d = torch.empty_like(x), vision_mask.numel(), x.shape[-1]
    if not x.numel():
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    config = _config(d)
    tiles, steps = triton.cdiv(d, config["BLOCK"]), triton.cdiv(n, config["ROWS"])
    chunk = config["ROWS"] * triton.cdiv(steps, max(_PROGRAMS // tiles, 1))
    chunks = triton.cdiv(n, chunk)
    dscale, dshift = scale.new_empty((2, chunks, d), dtype=torch.float32)
    _calibrate_bwd[(chunks, tiles)](
        dy, x, vision_mask, scale, dx, dscale, dshift, n, d, chunk, **config
    )
    return dx, dscale.sum(0).to(scale.dtype), dshift.sum(0).to(scale.dtype)
