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

# mypy: allow-untyped-calls

from typing import Any

import torch
import triton
from torch import Tensor

from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op
from fastalign_kernels._structure_kernels import (
    _structure_firsts,
    _structure_loss,
    _structure_mirror,
    _structure_norms,
    _structure_product,
    _structure_radial,
    _structure_tiles,
)

NEGATIVES = ("keep", "clip", "clip_teacher")
PANEL_BYTES = 64 << 20
_GROUP = 8  # tiles of a column that run together, so that their rows stay in the L2 cache
_FLOAT16_POWER = 2.0**14  # |R| <= 2, so that c R' stays below 65504
_SLOTS = 1024


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
