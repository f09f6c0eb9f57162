"""Structure distillation by torch operations: no whole similarity matrix, half the products.

The equations are those of `fastalign_kernels.structure_distill`, in float32 (float64 for float64
inputs) on rows that were divided by their norm. Panels of rows, from the diagonal on, stand for
the symmetric R = S_h - S_g. Where it has fewer multiplications, n > d + dt, the d-side is taken:

    |R|^2 = |H^T H|^2 + |G^T G|^2 - 2 |G^T H|^2        R H = H (H^T H) - G (G^T H)

It subtracts large numbers from large ones, and so runs in float64.
"""

from collections.abc import Iterator
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops._autocast import no_autocast

NOTHING, MATRIX, GRADIENT = range(3)
"""What a forward pass keeps for the backward one: nothing, R, or the gradient by the loss."""

PANEL = 256  # rows: as few as let a product run at full speed that adds to a gradient
BAND = 96  # rows, where none does
CHUNK = 1024  # rows of the d-side


def _groups(
    cu_seqlens: Tensor | None, images: int, longest: int
) -> Iterator[tuple[slice, slice, int]]:
    """Images to work on at once, their rows, and the rows of each; small images share a step."""
    if cu_seqlens is None:
        size = max(PANEL // max(longest, 1), 1)
        for first in range(0, images if longest else 0, size):
            last = min(first + size, images)
            yield slice(first, last), slice(first * longest, last * longest), longest
        return
    ends = cu_seqlens.tolist()
    for image, (first, last) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if last > first:
            yield slice(image, image + 1), slice(first, last), last - first


def _images(rows: Tensor, n: int) -> Tensor:
    """(b n, d) to (b, n, d), a view of contiguous rows."""
    return rows.reshape(len(rows) // n, n, rows.shape[1])


def _norms(x: Tensor) -> Tensor:
    """|x| of the rows, (..., 1), by way of norms of 64: one long sum errs ten times as much.

    The diagonal of R is what two such norms leave of 1 - 1, so that their error is that of a loss
    near 0.
    """
    whole = x.shape[-1] // 64 * 64
    parts = torch.linalg.vector_norm(x[..., :whole].reshape(*x.shape[:-1], -1, 64), dim=-1)
    rest = torch.linalg.vector_norm(x[..., whole:], dim=-1, keepdim=True)
    return torch.cat([parts, rest], -1).square_().sum(-1, keepdim=True).sqrt_()


def _rows(x: Tensor, dtype: torch.dtype, cosine: bool) -> tuple[Tensor, Tensor]:
    """A copy of the rows (..., d), over their norms with `cosine`; and 1 / |x|, (..., 1), or 0."""
    stored, x = x, x.to(dtype, copy=True)
    if not cosine:
        return x, x.new_ones(*x.shape[:-1], 1)
    if dtype == torch.float32 and native.takes_cuda(stored):
        inverse = native.inverse_norms(stored.reshape(-1, x.shape[-1])).view(*x.shape[:-1], 1)
        return x.mul_(inverse), inverse
    norm = _norms(x)
    if ((norm > 1e-15) & (norm < 1e15)).all():
        inverse = norm.reciprocal_()
        return x.mul_(inverse), inverse
    # Squares may leave the type: by the largest entry first, and a zero row stays zero.
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    zero = largest == 0
    largest.masked_fill_(zero, 1.0)
    inverse = _norms(x.div_(largest)).reciprocal_().masked_fill_(zero, 0.0)
    return x.mul_(inverse), inverse / largest


@torch.library.custom_op("fastalign::structure_distill_portable_fwd", mutates_args=())
def structure_distill_fwd(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
    cosine: bool, negatives: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Packed (N, d) and (N, dt) -> losses (images,), what is kept, (0,), f without dloss (images,).

    Without `cu_seqlens` all images have `longest` rows; with it none has more.
    """
    losses, residual, t, factor = _fake_fwd(
        student, teacher, cu_seqlens, images, longest, cosine, negatives, keep
    )
    losses.zero_()
    factor.zero_()
    dtype, width = losses.dtype, student.shape[1] + teacher.shape[1]
    with no_autocast(student):
        for group, rows, n in _groups(cu_seqlens, images, longest):
            h, g = (_images(x[rows], n) for x in (student, teacher))
            kept = _images(residual[rows], n) if keep else residual
            # The d-side knows no single similarity, and cancels in float64.
            if n > width and negatives == "keep" and dtype == torch.float32 and keep != MATRIX:
                for i in range(len(h)):
                    total = _by_width(h[i], g[i], cosine, kept[i] if keep else kept, keep)
                    losses[group.start + i] = total / (n * n)
            else:
                total = _by_panels(h, g, cosine, dtype, negatives, kept, keep)
                losses[group] = total / (n * n)
            factor[group] = 4.0 / (n * n)
    return losses, residual, t, factor


@structure_distill_fwd.register_vmap
def _vmap_fwd(info: Any, in_dims: Any, *arguments: Any) -> Any:
    from fastalign_kernels._op import one_by_one

    return one_by_one(structure_distill_fwd)(info, in_dims, *arguments)


@structure_distill_fwd.register_fake
def _fake_fwd(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
    cosine: bool, negatives: str, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    width = {NOTHING: 0, MATRIX: longest, GRADIENT: student.shape[1]}[keep]
    losses = student.new_empty((images,), dtype=dtype)
    residual = losses.new_empty((student.shape[0] if keep else 0, width))
    return losses, residual, losses.new_empty((0,)), torch.empty_like(losses)


def _by_panels(
    student: Tensor, teacher: Tensor, cosine: bool, dtype: torch.dtype, negatives: str,
    kept: Tensor, keep: int,
) -> Tensor:  # fmt: skip
    """|R|^2 of images (b, n, d), and in `kept` R, or R h - t h over |h|."""
    (h, inverse), (g, _) = (_rows(x, dtype, cosine) for x in (student, teacher))
    n = h.shape[1]
    total = h.new_zeros(len(h))
    if keep == GRADIENT:
        kept.zero_()
    size = PANEL if keep == GRADIENT else BAND
    for first in range(0, n, size):
        last = min(first + size, n)
        r = torch.bmm(h[:, first:last], h[:, first:].mT)
        negative = r < 0 if negatives == "clip" else None
        if negatives == "keep":
            r.baddbmm_(g[:, first:last], g[:, first:].mT, alpha=-1)
        else:
            if negative is not None:
                r.masked_fill_(negative, 0.0)
            r -= torch.bmm(g[:, first:last], g[:, first:].mT).clamp_min_(0.0)
        square, rest = torch.split(r, [last - first, n - last], 2)
        total += _sum_of_squares(square) + 2.0 * _sum_of_squares(rest)
        if negative is not None:
            r.masked_fill_(negative, 0.0)
        if keep == MATRIX:
            kept[:, first:last, first:n] = r
            kept[:, last:n, first:last] = rest.mT
        elif keep == GRADIENT:
            _add_product(kept, r, h, first, last)
    if keep == GRADIENT and cosine:
        _take_radial(kept, h, inverse)
    return total


def _sum_of_squares(x: Tensor) -> Tensor:
    """(b, m, n) to (b,); by rows, as one long sum would err more."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=2)
    return norms.square_().sum(1)


def _add_product(out: Tensor, r: Tensor, h: Tensor, first: int, last: int) -> None:
    """Adds R h of rows first..last, whose columns from `first` on are `r`, and of its mirror."""
    out[:, first:last].baddbmm_(r, h[:, first:])
    if last < h.shape[1]:
        out[:, last:].baddbmm_(r[:, :, last - first :].mT, h[:, first:last])


def _by_width(student: Tensor, teacher: Tensor, cosine: bool, kept: Tensor, keep: int) -> Tensor:
    """The same of one image through (d, d), (dt, dt) and (dt, d); `keep` is never MATRIX."""
    d, dt = student.shape[1], teacher.shape[1]
    hh, gg, gh = (
        student.new_zeros(size, dtype=torch.float64) for size in ((d, d), (dt, dt), (dt, d))
    )
    chunks = list(zip(torch.split(student, CHUNK), torch.split(teacher, CHUNK), strict=True))
    for chunk in chunks:
        h, g = (_rows(x, torch.float64, cosine)[0] for x in chunk)
        hh.addmm_(h.T, h)
        gg.addmm_(g.T, g)
        gh.addmm_(g.T, h)
    if keep == GRADIENT:
        for out, chunk in zip(torch.split(kept, CHUNK), chunks, strict=True):
            (h, inverse), (g, _) = (_rows(x, torch.float64, cosine) for x in chunk)
            product = torch.mm(h, hh).addmm_(g, gh, alpha=-1)
            if cosine:
                _take_radial(product, h, inverse)
            out.copy_(product)
    total: Tensor = hh.square().sum() + gg.square().sum() - 2.0 * gh.square().sum()
    return total.clamp_min(0.0)  # rounding may leave it just below


def _take_radial(product: Tensor, h: Tensor, inverse: Tensor) -> None:
    """R h to (R h - t h) / |student| in place, for unit rows h."""
    # Rows that the cache holds.
    for p, unit, by in zip(*(torch.split(x, BAND, -2) for x in (product, h, inverse)), strict=True):
        t = (p * unit).sum(-1, keepdim=True)
        p.addcmul_(t, unit, value=-1).mul_(by)


@torch.library.custom_op("fastalign::structure_distill_portable_bwd", mutates_args=())
def structure_distill_bwd(
    dlosses: Tensor, student: Tensor, residual: Tensor, t: Tensor, factor: Tensor,
    cu_seqlens: Tensor | None, longest: int, cosine: bool,
) -> Tensor:  # fmt: skip
    """dlosses (images,) and R of the forward pass -> dh (N, d) in the type of `student`."""
    dh = torch.empty_like(student)
    scale = dlosses * factor
    with no_autocast(student):
        for group, rows, n in _groups(cu_seqlens, len(dlosses), longest):
            h, inverse = _rows(_images(student[rows], n), residual.dtype, cosine)
            product = torch.bmm(_images(residual[rows], n)[:, :, :n], h)
            factors = scale[group, None, None]
            if cosine:
                _take_radial(product, h, inverse.mul_(factors))
            else:
                product.mul_(factors)
            dh[rows] = product.flatten(0, 1)
    return dh


@structure_distill_bwd.register_vmap
def _vmap_bwd(info: Any, in_dims: Any, *arguments: Any) -> Any:
    from fastalign_kernels._op import one_by_one

    return one_by_one(structure_distill_bwd)(info, in_dims, *arguments)


@structure_distill_bwd.register_fake
def _fake_bwd(dlosses: Tensor, student: Tensor, *_: object) -> Tensor:
    return torch.empty_like(student)
