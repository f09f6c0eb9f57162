"""Kernels of structure distillation; `structure_distill.py` has their equations and launchers."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

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
