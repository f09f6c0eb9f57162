"""Structure distillation: loss and gradient from one triangular pass over the patch pairs.

    A  = h h^T        r_i = 1 / |h_i|, 0 for a zero row        S = r A r, likewise of the teacher
    R  = S_h - S_g                                             loss = |R|^2 / n^2
    R' = c r_i r_j R_ij                                        kept, in the type of h
    t_i = r_i^2 sum_j R'_ij A_ij                               from R' after it was rounded
    dh = f (R' h - t h)                                        f = dloss 4 / (n^2 c)

R and R' are symmetric: tiles on and above the diagonal are computed, their mirror images stored.
t, the part of the gradient along h, comes from the very numbers that R' h is made of: dh stays
orthogonal to h however coarse the type. c is a power of two that keeps R' inside float16.

Images are cut into tiles of BLOCK rows, and the tiles of all images are numbered through: tile q is
tile `i` of image `b`. A panel is a run of tiles with all their columns, (tiles BLOCK, columns
BLOCK), zero outside its images. Where R' is small, all tiles are one panel, kept for the backward
pass; else the gradient is added up in float32 panel by panel, and R' is never whole.

Sums leave a program as partial sums in a place of its own: no atomics, the same result every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

NEGATIVES = ("keep", "clip", "clip_teacher")
PANEL_BYTES = 64 << 20
_GROUP = 8  # tiles of a column that run together, so that their rows stay in the L2 cache
_FLOAT16_POWER = 2.0**14  # |R| <= 2, so that c R' stays below 65504
_SLOTS = 1024
# Counts that gain nothing from a kernel of their own for 1 or for multiples of 16.
_COUNTS = ("n", "first", "count", "columns", "total")


@triton.jit
def _inverse_norm(x_ptr, row, d, BLOCK: tl.constexpr):
    """1 / |x| of one row; 0 below 1e-18, where the square leaves float32."""
    cols = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        x = tl.load(x_ptr + row * d + k + cols, mask=k + cols < d, other=0.0).to(tl.float32)
        squares += x * x
    total = tl.sum(squares)
    small = total < 1e-36  # false for NaN, which stays NaN
    return tl.where(small, 0.0, 1.0 / tl.sqrt_rn(tl.where(small, 1.0, total)))


@triton.jit
def _structure_norms(h_ptr, g_ptr, rh_ptr, rg_ptr, d, dt, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(rh_ptr + row, _inverse_norm(h_ptr, row, d, BLOCK))
    else:
        tl.store(rg_ptr + row, _inverse_norm(g_ptr, row, dt, BLOCK))


@triton.jit
def _structure_firsts(cu_ptr, tiles_ptr, images, BLOCK: tl.constexpr, IMAGES: tl.constexpr):
    """The first tile of each image, (IMAGES,), padded with a number that no tile has."""
    image = tl.arange(0, IMAGES)
    mask = image < images
    row = tl.load(cu_ptr + image, mask=mask, other=0)
    rows = (tl.load(cu_ptr + image + 1, mask=mask, other=0) - row).to(tl.int32)
    tiles = tl.cdiv(rows, BLOCK)
    firsts = tl.cumsum(tiles, 0) - tiles
    tl.store(tiles_ptr + image, tl.where(mask, firsts, 2147483647))


@triton.jit
def _locate(q, cu_ptr, tiles_ptr, n, columns, RAGGED: tl.constexpr, IMAGES: tl.constexpr):
    """Tile q: its image, that image's first tile, first row and number of rows.

    Ragged images hold their first tiles in `tiles_ptr`, padded with numbers that no tile has.
    """
    if RAGGED:
        firsts = tl.load(tiles_ptr + tl.arange(0, IMAGES))
        image = tl.sum((q >= firsts).to(tl.int32)) - 1
        tile = tl.load(tiles_ptr + image)
        row = tl.load(cu_ptr + image).to(tl.int64)
        rows = (tl.load(cu_ptr + image + 1).to(tl.int64) - row).to(tl.int32)
    else:
        image = q // columns
        tile = image * columns
        row = image.to(tl.int64) * n
        rows = n
    return image, tile, row, rows


@triton.jit
def _gram(
    x,
    row_i,
    row_j,
    left_i,
    left_j,
    d,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """(BLOCK, BLOCK) products of the rows from row_i on with those from row_j on.

    `left` rows belong to the image; the others are the last one again, or, through a descriptor,
    what follows in memory: the caller masks them.
    """
    products = tl.zeros((BLOCK, BLOCK), tl.float32)
    if DESCRIPTOR:
        i, j = row_i.to(tl.int32), row_j.to(tl.int32)
        for k in range(0, d, BLOCK_K):
            products = tl.dot(x.load([i, k]), x.load([j, k]).T, products, input_precision="tf32x3")
    else:
        steps, k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
        at_i = x + (row_i + tl.minimum(steps, left_i - 1))[:, None] * d + k[None, :]
        at_j = x + (row_j + tl.minimum(steps, left_j - 1))[None, :] * d + k[:, None]
        for start in range(0, d, BLOCK_K):
            if EVEN:
                a, b = tl.load(at_i), tl.load(at_j)
            else:
                inside = start + k < d
                a = tl.load(at_i, mask=inside[None, :], other=0.0)
                b = tl.load(at_j, mask=inside[:, None], other=0.0)
            products = tl.dot(a, b, products, input_precision="tf32x3")
            at_i += BLOCK_K
            at_j += BLOCK_K
    return products


@triton.jit(do_not_specialize=_COUNTS)
def _structure_tiles(
    h,
    g,
    rh_ptr,
    rg_ptr,
    power_ptr,
    cu_ptr,
    tiles_ptr,
    panel_ptr,
    t_ptr,
    loss_ptr,
    n,
    d,
    dt,
    first,
    count,
    columns,
    total,
    COSINE: tl.constexpr,
    NEGATIVES: tl.constexpr,
    PANEL: tl.constexpr,
    RADIAL: tl.constexpr,
    RAGGED: tl.constexpr,
    IMAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tile (i, j), i <= j, of one image: its part of the loss, of R' and of t.

    `first` and `count` are the panel's tiles, `total` all rows of t, `columns` tiles of the longest
    image. PANEL stores R', RADIAL the partial sums of t.
    """
    program = tl.program_id(0)
    start = program // (GROUP * columns) * GROUP
    size = tl.minimum(count - start, GROUP)
    local = start + program % (GROUP * columns) % size
    j = program % (GROUP * columns) // size
    q = first + local
    image, tile, row, rows = _locate(q, cu_ptr, tiles_ptr, n, columns, RAGGED, IMAGES)
    i = q - tile
    slot = q.to(tl.int64) * columns + j
    if (i > j) | (j * BLOCK >= rows):
        tl.store(loss_ptr + slot, 0.0)
        return

    row_i, left_i = row + i * BLOCK, rows - i * BLOCK
    row_j, left_j = row + j * BLOCK, rows - j * BLOCK
    a = _gram(h, row_i, row_j, left_i, left_j, d, BLOCK, BLOCK_K, EVEN, DESCRIPTOR)
    a_g = _gram(g, row_i, row_j, left_i, left_j, dt, BLOCK, BLOCK_K, EVEN, DESCRIPTOR)
    steps = tl.arange(0, BLOCK)
    in_i, in_j = steps < left_i, steps < left_j
    inside = in_i[:, None] & in_j[None, :]
    a = tl.where(inside, a, 0.0)
    if COSINE:
        rh_i = tl.load(rh_ptr + row_i + steps, mask=in_i, other=0.0)
        rh_j = tl.load(rh_ptr + row_j + steps, mask=in_j, other=0.0)
        rg_i = tl.load(rg_ptr + row_i + steps, mask=in_i, other=0.0)
        rg_j = tl.load(rg_ptr + row_j + steps, mask=in_j, other=0.0)
        weight = rh_i[:, None] * rh_j[None, :]
        s = a * weight
        s_g = a_g * (rg_i[:, None] * rg_j[None, :])
    else:
        s, s_g = a, a_g
    # Comparisons, not maxima: those drop NaN.
    if NEGATIVES != 0:
        s_g = tl.where(s_g < 0.0, 0.0, s_g)
    if NEGATIVES == 1:
        r = tl.where(inside, tl.where(s < 0.0, 0.0, s) - s_g, 0.0)
    else:
        r = tl.where(inside, s - s_g, 0.0)
    tl.store(loss_ptr + slot, tl.sum(r * r) * tl.where(i == j, 1.0, 2.0))

    if PANEL:
        if NEGATIVES == 1:
            r = tl.where(s < 0.0, 0.0, r)
        r *= tl.load(power_ptr)
        if COSINE:
            r *= weight
        kept = r.to(panel_ptr.dtype.element_ty)
        width = columns * BLOCK
        at = panel_ptr + (local.to(tl.int64) * BLOCK + steps)[:, None] * width
        tl.store(at + (j * BLOCK + steps)[None, :], kept)
        mirror = tile + j - first
        if (i != j) & (mirror < count):
            at = panel_ptr + (mirror.to(tl.int64) * BLOCK + steps)[:, None] * width
            tl.store(at + (i * BLOCK + steps)[None, :], tl.trans(kept))
        if RADIAL:
            along = kept.to(tl.float32) * a
            at = t_ptr + j.to(tl.int64) * total + q.to(tl.int64) * BLOCK + steps
            tl.store(at, tl.sum(along, 1) * rh_i * rh_i)
            if i != j:
                at = t_ptr + i.to(tl.int64) * total + (tile + j).to(tl.int64) * BLOCK + steps
                tl.store(at, tl.sum(along, 0) * rh_j * rh_j)


@triton.jit(do_not_specialize=("n", "columns"))
def _structure_loss(
    loss_ptr,
    power_ptr,
    cu_ptr,
    tiles_ptr,
    out_ptr,
    factor_ptr,
    n,
    columns,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Sums the tiles' parts of one image; f without dloss."""
    image = tl.program_id(0)
    if RAGGED:
        tile = tl.load(tiles_ptr + image)
        rows = (tl.load(cu_ptr + image + 1) - tl.load(cu_ptr + image)).to(tl.int32)
    else:
        tile, rows = image.to(tl.int64) * columns, n
    steps = tl.arange(0, SLOTS)
    sums = tl.zeros((SLOTS,), tl.float32)
    first = tile.to(tl.int64) * columns
    last = first + tl.cdiv(rows, BLOCK).to(tl.int64) * columns
    for slot in range(first, last, SLOTS):
        sums += tl.load(loss_ptr + slot + steps, mask=slot + steps < last, other=0.0)
    size = tl.maximum(rows, 1).to(tl.float32)
    tl.store(out_ptr + image, tl.sum(sums) / size / size)
    tl.store(factor_ptr + image, 4.0 / size / size / tl.load(power_ptr))


@triton.jit(do_not_specialize=_COUNTS)
def _structure_product(
    panel,
    h,
    h_ptr,
    t_ptr,
    scale_ptr,
    out_ptr,
    cu_ptr,
    tiles_ptr,
    n,
    d,
    first,
    count,
    columns,
    total,
    RADIAL: tl.constexpr,
    ADD: tl.constexpr,
    RAGGED: tl.constexpr,
    IMAGES: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(BLOCK, BLOCK_N) of f (R' h - t h); with ADD of R' h, added to `out`.

    The columns of R' start at the panel's first tile of the image: those before it belong to the
    mirror images of earlier panels.
    """
    program = tl.program_id(0)
    across = tl.cdiv(d, BLOCK_N)
    start = program // (GROUP * across) * GROUP
    size = tl.minimum(count - start, GROUP)
    local = start + program % (GROUP * across) % size
    column = program % (GROUP * across) // size * BLOCK_N
    q = first + local
    image, tile, row, rows = _locate(q, cu_ptr, tiles_ptr, n, columns, RAGGED, IMAGES)
    i = q - tile
    if i * BLOCK >= rows:
        return

    steps = tl.arange(0, BLOCK)
    cols = column + tl.arange(0, BLOCK_N)
    begin = tl.maximum(first - tile, 0) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    if DESCRIPTOR:
        line, top = local * BLOCK, row.to(tl.int32)
        for k in range(begin, rows, BLOCK_K):
            x = h.load([top + k, column])
            acc = tl.dot(panel.load([line, k]), x, acc, input_precision="tf32x3")
    else:
        ks = tl.arange(0, BLOCK_K)
        lines = (local.to(tl.int64) * BLOCK + steps)[:, None] * (columns * BLOCK)
        for k in range(begin, rows, BLOCK_K):
            # The rows after the last meet zeros of R': the last once more, so that they are finite.
            at = h_ptr + (row + tl.minimum(k + ks, rows - 1))[:, None] * d + cols[None, :]
            x = tl.load(at) if EVEN else tl.load(at, mask=cols[None, :] < d, other=0.0)
            r = tl.load(panel + lines + (k + ks)[None, :])
            acc = tl.dot(r, x, acc, input_precision="tf32x3")

    own = (row + i * BLOCK + steps)[:, None] * d + cols[None, :]
    inside = (i * BLOCK + steps < rows)[:, None] & (cols < d)[None, :]
    if ADD:
        acc += tl.load(out_ptr + own, mask=inside, other=0.0)
    else:
        if RADIAL:
            t = tl.zeros((BLOCK,), tl.float32)
            at = t_ptr + q.to(tl.int64) * BLOCK + steps
            for _ in range(0, tl.cdiv(rows, BLOCK)):
                t += tl.load(at)
                at += total
            acc -= t[:, None] * tl.load(h_ptr + own, mask=inside, other=0.0).to(tl.float32)
        acc *= tl.load(scale_ptr + image)
    tl.store(out_ptr + own, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("n", "first", "count", "columns"))
def _structure_mirror(
    panel_ptr,
    h_ptr,
    out_ptr,
    cu_ptr,
    tiles_ptr,
    n,
    d,
    first,
    count,
    columns,
    RAGGED: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Adds a panel's mirror image, R'^T h, to the later rows of its last image."""
    across = tl.cdiv(d, BLOCK_N)
    last = first + count - 1
    image, tile, row, rows = _locate(last, cu_ptr, tiles_ptr, n, columns, RAGGED, IMAGES)
    i = (last - tile + 1 + tl.program_id(0) // across).to(tl.int64)
    if i * BLOCK >= rows:
        return

    # Tiles before the last of an image are full, so that no row has to be masked.
    steps, ks = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    cols = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    top = row + (first - tile).to(tl.int64) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    begin = tl.maximum(tile - first, 0).to(tl.int64) * BLOCK
    for k in range(begin, count * BLOCK, BLOCK_K):
        lines = (k + ks).to(tl.int64)
        at = h_ptr + (top + lines)[:, None] * d + cols[None, :]
        x = tl.load(at) if EVEN else tl.load(at, mask=cols[None, :] < d, other=0.0)
        r = tl.load(panel_ptr + lines[None, :] * (columns * BLOCK) + (i * BLOCK + steps)[:, None])
        acc = tl.dot(r, x, acc, input_precision="tf32x3")
    own = out_ptr + (row + i * BLOCK + steps)[:, None] * d + cols[None, :]
    inside = (i * BLOCK + steps < rows)[:, None] & (cols < d)[None, :]
    tl.store(own, acc + tl.load(own, mask=inside, other=0.0), mask=inside)


@triton.jit
def _structure_radial(h_ptr, rh_ptr, out_ptr, d, BLOCK: tl.constexpr):
    """Takes the part along h from a row of R' h: what is left is R' h - t h."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    along = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        mask = k + cols < d
        h = tl.load(h_ptr + row * d + k + cols, mask=mask, other=0.0).to(tl.float32)
        along += h * tl.load(out_ptr + row * d + k + cols, mask=mask, other=0.0)
    r = tl.load(rh_ptr + row)
    t = tl.sum(along) * r * r
    for k in range(0, d, BLOCK):
        mask = k + cols < d
        h = tl.load(h_ptr + row * d + k + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(out_ptr + row * d + k + cols, mask=mask, other=0.0)
        tl.store(out_ptr + row * d + k + cols, x - t * h, mask=mask)


def _block(images: int, longest: int, itemsize: int, aligned: bool) -> int:
    """Rows of a tile: 128, or 64 where tiles of 128 would leave a GPU without work.

    200 tiles are about one and a half for each multiprocessor of an H100. The three products that
    stand for one in float32 spill at 128, and so do the many loads of rows that are not `aligned`
    to 16 bytes.
    """
    tiles = triton.cdiv(longest, 128)
    enough = images * tiles * (tiles + 1) // 2 >= 200
    return 128 if enough and itemsize <= 2 and aligned else 64


def _sizes(student: Tensor, teacher: Tensor) -> tuple[int, bool]:
    """Bytes of the wider element, and whether all rows are of 16 bytes or a multiple."""
    both = (student, teacher)
    aligned = all(x.shape[1] * x.element_size() % 16 == 0 for x in both)
    return max(x.element_size() for x in both), aligned


def _config(block: int, itemsize: int, descriptor: bool) -> dict[str, int]:
    """Launch shape of the products for tiles of `block` rows of `itemsize` bytes an element.

    Four warps for 128 rows would spill inside the loop.
    """
    return {
        "BLOCK": block,
        "BLOCK_K": 64 if itemsize <= 2 else 32,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": 4 if descriptor or block == 64 else 3,
    }


def _columns(d: int, itemsize: int) -> int:
    """BLOCK_N of the product with h."""
    width: int = triton.next_power_of_2(d)
    return min(max(width, 16), 128 if itemsize <= 2 else 64)


def _row_config(d: int) -> dict[str, int]:
    return {"BLOCK": min(triton.next_power_of_2(d), 2048), "num_warps": 4}


def _use_descriptors(*matrices: Tensor) -> bool:
    """Whether tensor descriptors (TMA) can load the tiles: sm_90 and later, rows of 16 bytes."""
    first = matrices[0]
    return (
        first.is_cuda
        and torch.cuda.get_device_capability(first.device)[0] >= 9
        and all(x.shape[1] * x.element_size() % 16 == 0 for x in matrices)
        and all(x.data_ptr() % 16 == 0 for x in matrices)
    )


def _descriptor(x: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


class _Tiling:
    """How the images of one call are cut, with what every launch of it needs."""

    def __init__(
        self, rows: Tensor, block: int, cu_seqlens: Tensor | None, images: int, longest: int
    ) -> None:
        self.block, self.longest = block, longest
        self.columns = triton.cdiv(longest, block)
        self.tiles = images * self.columns
        self.width = triton.next_power_of_2(images)
        self.ragged = cu_seqlens is not None
        self.cu = self.firsts = rows  # not read
        if cu_seqlens is not None:
            self.tiles = min(self.tiles, len(rows) // block + images)
            self.cu = cu_seqlens.contiguous()
            self.firsts = torch.empty(self.width, dtype=torch.int32, device=rows.device)
            _structure_firsts[(1,)](self.cu, self.firsts, images, BLOCK=block, IMAGES=self.width)

    def options(self, itemsize: int, descriptor: bool) -> dict[str, Any]:
        """What a product is compiled for."""
        return {
            "RAGGED": self.ragged,
            "IMAGES": self.width,
            "DESCRIPTOR": descriptor,
            "GROUP": _GROUP,
            **_config(self.block, itemsize, descriptor),
        }


def _power(dtype: torch.dtype, rh: Tensor, rg: Tensor, cosine: bool) -> Tensor:
    """c, a power of two, float32: 1 but for float16, whose R' it moves into reach."""
    if dtype != torch.float16 or not rh.numel():
        return torch.ones((), device=rh.device)
    if cosine:  # the shortest row that counts
        bound = 2.0 * rh.amax().square()
    else:  # the longest rows: no entry of R' exceeds the sum of their squares
        shortest = (torch.where(r > 0, r, torch.inf).amin() for r in (rh, rg))
        bound = sum((r.pow(-2) for r in shortest), start=rh.new_zeros(()))
    exponent = torch.frexp(bound).exponent
    return torch.ldexp(torch.full_like(bound, 2.0 * _FLOAT16_POWER), -exponent)


def _norms(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    rh, rg = (torch.empty(len(x), dtype=torch.float32, device=x.device) for x in (student, teacher))
    d, dt = student.shape[1], teacher.shape[1]
    _structure_norms[(len(rh), 2)](student, teacher, rh, rg, d, dt, **_row_config(max(d, dt)))
    return rh, rg


NOTHING, MATRIX, GRADIENT = range(3)
"""What a forward pass keeps for the backward one: nothing, R', or R' h - t h."""


def _fake_fwd(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
    cosine: bool, negatives: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows, d = student.shape
    losses = student.new_empty((images,), dtype=torch.float32)
    residual, t = student.new_empty((0,)), losses.new_empty((0,))
    if keep == GRADIENT:
        residual = losses.new_empty((rows, d))
    elif keep == MATRIX:
        block = _block(images, longest, *_sizes(student, teacher))
        columns = (longest + block - 1) // block
        tiles = images * columns
        if cu_seqlens is not None:
            tiles = torch.sym_min(tiles, rows // block + images)
        residual = student.new_empty((tiles, block, columns * block))
        if cosine:
            t = losses.new_empty((columns, tiles * block))
    return losses, residual, t, torch.empty_like(losses)


@op(
    "(Tensor student, Tensor teacher, Tensor? cu_seqlens, SymInt images, SymInt longest, "
    "bool cosine, str negatives, int keep) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
)
def structure_distill_fwd(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
    cosine: bool, negatives: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Packed (N, d) and (N, dt) -> losses (images,), what is kept, t, f without dloss (images,).

    Without `cu_seqlens` all images have `longest` rows; with it none has more.
    """
    student, teacher = student.contiguous(), teacher.contiguous()
    (rows, d), dt = student.shape, teacher.shape[1]
    losses = torch.empty(images, dtype=torch.float32, device=student.device)
    t = losses.new_empty(0)
    if not rows:
        kept = _fake_fwd(student, teacher, cu_seqlens, images, longest, cosine, negatives, keep)
        zeros = [torch.zeros_like(x) for x in kept]
        return zeros[0], zeros[1], zeros[2], zeros[3]
    itemsize, aligned = _sizes(student, teacher)
    block = _block(images, longest, itemsize, aligned)
    tiling = _Tiling(student, block, cu_seqlens, images, longest)
    columns, tiles = tiling.columns, tiling.tiles
    rh, rg = t, t
    if cosine or student.dtype == torch.float16:
        rh, rg = _norms(student, teacher)
    power = _power(student.dtype, rh, rg, cosine)
    per_panel, panel, dh = tiles, student.new_empty(0), t
    if keep == MATRIX:
        panel = student.new_empty(tiles, block, columns * block)
        if cosine:
            t = losses.new_empty(columns, tiles * block)
    elif keep == GRADIENT:
        size = block * columns * block * student.element_size()
        per_panel = min(max(PANEL_BYTES // size, 1), tiles)
        panel = student.new_empty(per_panel, block, columns * block)
        dh = torch.zeros(rows, d, dtype=torch.float32, device=student.device)

    parts = losses.new_empty(tiles * columns)
    h, g = student, teacher
    options = tiling.options(itemsize, _use_descriptors(student, teacher))
    if options["DESCRIPTOR"]:
        h, g = (_descriptor(x, block, options["BLOCK_K"]) for x in (student, teacher))
    for first in range(0, tiles, per_panel):
        count = min(per_panel, tiles - first)
        _structure_tiles[(count * columns,)](
            h, g, rh, rg, power, tiling.cu, tiling.firsts, panel, t, parts,
            longest, d, dt, first, count, columns, tiles * block,
            COSINE=cosine, NEGATIVES=NEGATIVES.index(negatives), PANEL=keep != NOTHING,
            RADIAL=keep == MATRIX and cosine,
            EVEN=d % options["BLOCK_K"] == 0 and dt % options["BLOCK_K"] == 0,
            **options,
        )  # fmt: skip
        if keep == GRADIENT:
            _add_panel(tiling, panel, student, dh, first, count)
    if keep == GRADIENT and cosine:
        _structure_radial[(rows,)](student, rh, dh, d, **_row_config(d))
    factor = torch.empty_like(losses)
    _structure_loss[(images,)](
        parts, power, tiling.cu, tiling.firsts, losses, factor, longest, columns,
        RAGGED=tiling.ragged, BLOCK=block, SLOTS=_SLOTS,
    )  # fmt: skip
    return losses, dh if keep == GRADIENT else panel, t, factor


def _product(
    tiling: _Tiling, panel: Tensor, student: Tensor, t: Tensor, scale: Tensor, out: Tensor,
    first: int, count: int, add: bool,
) -> None:  # fmt: skip
    """`out` becomes f (R' h - t h), or with `add` gets the panel's part of R' h."""
    d, itemsize = student.shape[1], student.element_size()
    options = tiling.options(itemsize, _use_descriptors(student))
    width, deep = _columns(d, itemsize), options["BLOCK_K"]
    matrix, h = panel, student
    if options["DESCRIPTOR"]:
        matrix = _descriptor(panel.flatten(0, 1), tiling.block, deep)
        h = _descriptor(student, deep, width)
    _structure_product[(count * triton.cdiv(d, width),)](
        matrix, h, student, t, scale, out, tiling.cu, tiling.firsts,
        tiling.longest, d, first, count, tiling.columns, tiling.tiles * tiling.block,
        RADIAL=t.numel() > 0, ADD=add, EVEN=d % width == 0, BLOCK_N=width, **options,
    )  # fmt: skip


def _add_panel(
    tiling: _Tiling, panel: Tensor, student: Tensor, out: Tensor, first: int, count: int
) -> None:
    """Adds R' h of the panel's tiles to their rows, and of their mirror images to the later."""
    nothing = out.new_empty(0)
    _product(tiling, panel, student, nothing, nothing, out, first, count, add=True)
    if first + count == tiling.tiles or tiling.columns == 1:
        return
    d, itemsize = student.shape[1], student.element_size()
    options, width = tiling.options(itemsize, False), _columns(d, itemsize)
    del options["DESCRIPTOR"], options["GROUP"]
    _structure_mirror[((tiling.columns - 1) * triton.cdiv(d, width),)](
        panel, student, out, tiling.cu, tiling.firsts,
        tiling.longest, d, first, count, tiling.columns,
        EVEN=d % width == 0, BLOCK_N=width, **options,
    )  # fmt: skip


@op(
    "(Tensor dlosses, Tensor student, Tensor residual, Tensor t, Tensor factor, "
    "Tensor? cu_seqlens, SymInt longest, bool cosine) -> Tensor",
    fake=lambda dlosses, student, *_: student.new_empty(student.shape),
)
def structure_distill_bwd(
    dlosses: Tensor, student: Tensor, residual: Tensor, t: Tensor, factor: Tensor,
    cu_seqlens: Tensor | None, longest: int, cosine: bool,
) -> Tensor:  # fmt: skip
    """dlosses (images,) and R' of the forward pass -> dh (N, d) in the type of `student`."""
    student = student.contiguous()
    dh = torch.empty_like(student)
    if len(student):
        block, scale = residual.shape[1], dlosses.float() * factor
        tiling = _Tiling(student, block, cu_seqlens, len(dlosses), longest)
        radial = t if cosine else t[:0]
        _product(tiling, residual, student, radial, scale, dh, 0, tiling.tiles, add=False)
    return dh
