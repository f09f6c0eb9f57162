"""C = alpha X^T X + beta Y with Y symmetric: one half is computed, and stored twice.

With X = A symmetric it is beta A + alpha A^2, the polynomial of a Newton-Schulz step. The step's
other product, a X + X P, has no symmetry: it is torch.baddbmm, whose a X cuBLAS adds itself.

A program computes one tile of C on or above the diagonal, scales the float32 sums, adds its tile of
Y and stores the result with its mirror image. A tile on the diagonal stores its upper triangle
twice: matrix instructions need not add (i, j) and (j, i) in one order. C is symmetric to the last
bit, and the lower triangle of Y does not count. Tiles run in squares of GROUP x GROUP, which read
2 GROUP panels of X between them, so that these stay in the L2 cache; the squares on and above the
diagonal are numbered column by column, and of those on it a few programs find nothing to do.

The cost is n d (d + BLOCK) FLOPs; the whole product's is 2 n d^2. Both operands are loaded as
(BLOCK_K, BLOCK) tiles of X, of which the first is transposed on its way to the matrix instruction;
descriptors fill with zeros what lies beyond n and d, in each matrix of a batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

_GROUP = 8  # side of the squares of tiles that run together


@triton.jit
def _gram(
    x,
    batch,
    i,
    j,
    n,
    d,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile (i, j) of X^T X, (BLOCK, BLOCK)."""
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    if DESCRIPTOR:
        for k in range(0, n, BLOCK_K):
            a = x.load([batch, k, i * BLOCK]).reshape(BLOCK_K, BLOCK)
            b = x.load([batch, k, j * BLOCK]).reshape(BLOCK_K, BLOCK)
            products = tl.dot(a.T, b, products, input_precision="tf32x3")
    else:
        # The first by transposed pointers: a tile that is transposed later loads synchronously.
        steps, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
        cols_i, cols_j = i * BLOCK + steps, j * BLOCK + steps
        rows = (batch.to(tl.int64) * n + ks) * d
        at_i = x + rows[None, :] + cols_i[:, None]
        at_j = x + rows[:, None] + cols_j[None, :]
        stride = tl.full((), BLOCK_K, tl.int64) * d
        for k in range(0, n, BLOCK_K):
            if EVEN:
                a, b = tl.load(at_i), tl.load(at_j)
            else:
                inside = k + ks < n
                a = tl.load(at_i, mask=(cols_i < d)[:, None] & inside[None, :], other=0.0)
                b = tl.load(at_j, mask=inside[:, None] & (cols_j < d)[None, :], other=0.0)
            products = tl.dot(a, b, products, input_precision="tf32x3")
            at_i += stride
            at_j += stride
    return products


@triton.jit(do_not_specialize=("n", "columns", "programs"))
def _syrk_fwd(
    x,
    y_ptr,
    c_ptr,
    n,
    d,
    columns,
    programs,
    alpha,
    beta,
    HAS_Y: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles (i, j) and (j, i), i <= j, of one C; `columns` tiles a side, `programs` a matrix.

    EVEN: n and d are multiples of the blocks.
    """
    batch = tl.program_id(0) // programs
    q = tl.program_id(0) % programs
    square = q // (GROUP * GROUP)
    # Column c of a triangle starts at c (c + 1) / 2; exact below 2^21 squares, d = 10^6.
    column = ((tl.sqrt_rn(8.0 * square + 1.0) - 1.0) / 2.0).to(tl.int32)
    i = (square - column * (column + 1) // 2) * GROUP + q % GROUP
    j = column * GROUP + q % (GROUP * GROUP) // GROUP
    if (i > j) | (j >= columns):
        return

    # C = alpha X^T X + beta Y
    c = alpha * _gram(x, batch, i, j, n, d, DESCRIPTOR, EVEN, BLOCK, BLOCK_K)
    steps = tl.arange(0, BLOCK)
    rows, cols = i * BLOCK + steps, j * BLOCK + steps
    inside = (rows < d)[:, None] & (cols < d)[None, :]
    first = batch.to(tl.int64) * d
    at = (first + rows)[:, None] * d + cols[None, :]
    if HAS_Y:
        c += beta * tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tile = c.to(c_ptr.dtype.element_ty)
    if i == j:
        tile = tl.where(steps[:, None] <= steps[None, :], tile, tl.trans(tile))
    tl.store(c_ptr + at, tile, mask=inside)
    if i != j:
        inside = (cols < d)[:, None] & (rows < d)[None, :]
        at = (first + cols)[:, None] * d + rows[None, :]
        tl.store(c_ptr + at, tl.trans(tile), mask=inside)


def _block(batch: int, d: int, itemsize: int, aligned: bool) -> int:
    """Side of a tile: 128, or 64 where tiles of 128 would leave a GPU without work.

    200 tiles are about one and a half for each multiprocessor of an H100. The three products that
    stand for one in float32 spill at 128, and so do the many loads of rows that are not `aligned`,
    see `_config`.
    """
    columns = triton.cdiv(d, 128)
    enough = batch * columns * (columns + 1) // 2 >= 200
    return 128 if enough and itemsize <= 2 and aligned else 64


def _config(block: int, itemsize: int, aligned: bool) -> dict[str, int]:
    """Launch shape for tiles of `block` columns of `itemsize` bytes an element.

    Rows that are not `aligned`, through a descriptor or by a width that is a multiple of 16, come
    element by element through registers, which hold 32 rows of two tiles. At 128, three stages of
    32 KiB are in shared memory on sm_80, all four on the later ones.
    """
    return {
        "BLOCK": block,
        "BLOCK_K": 64 if itemsize <= 2 and aligned else 32,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 4,
    }


def _use_descriptor(x: Tensor) -> bool:
    """Whether a tensor descriptor (TMA) can load the tiles: rows of 16 bytes on sm_90 and sm_100.

    Later ones, of desktops, have no shared memory for all stages.
    """
    return (
        x.is_cuda
        and x.numel() > 0
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and x.shape[-1] * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def _descriptor(x: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


@op(
    "(Tensor x, Tensor? y, float alpha, float beta, ScalarType out_dtype) -> Tensor",
    fake=lambda x, y, alpha, beta, out_dtype: x.new_empty(
        (*x.shape[:-2], x.shape[-1], x.shape[-1]), dtype=out_dtype
    ),
)
def syrk_fwd(
    x: Tensor, y: Tensor | None, alpha: float, beta: float, out_dtype: torch.dtype
) -> Tensor:
    """(..., n, d), symmetric (..., d, d) or None -> (..., d, d)."""
    x = x.contiguous()
    *leading, n, d = x.shape
    c = x.new_empty((*leading, d, d), dtype=out_dtype)
    if c.numel():
        batch, itemsize = c.numel() // d**2, x.element_size()
        descriptor = _use_descriptor(x)
        aligned = descriptor or d % 16 == 0
        config = _config(_block(batch, d, itemsize, aligned), itemsize, aligned)
        block, deep = config["BLOCK"], config["BLOCK_K"]
        columns = triton.cdiv(d, block)
        group = _GROUP if columns >= _GROUP else 1
        squares = triton.cdiv(columns, group)
        programs = squares * (squares + 1) // 2 * group**2
        rows: Any = _descriptor(x.view(batch, n, d), 1, deep, block) if descriptor else x
        _syrk_fwd[(batch * programs,)](
            rows, c if y is None else y.contiguous(), c, n, d, columns, programs, alpha, beta,
            HAS_Y=y is not None, DESCRIPTOR=descriptor, GROUP=group,
            EVEN=descriptor or (n % deep == 0 and d % block == 0),
            **config,
        )  # fmt: skip
    return c
