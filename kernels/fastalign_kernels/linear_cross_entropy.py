"""z = cap(scale (h W^T + b))    ce_i = logsumexp(z_i) - z_i[y_i]    L = sum f ce

    dz_ij = f_i (p_ij - [j = y_i]) cap'(z_ij)    cap(z) = c tanh(z / c), cap' = 1 - (cap / c)^2
    dh = scale dz W    dW = scale dz^T h    db = scale sum_i dz_i

The factors f are known first, so that the gradient is made in the forward pass: by chunks of rows,
their logits in float32, one pass over each row by a kernel, and two more products; dW's may wait
for the backward pass. Nothing is computed twice. The products are torch's (cuBLAS), of matrices in
the type of the inputs, with sums and results in float32: they are what the op costs. The kernel
reads a row twice and writes dz, in the type of the next products, over the logits, row by row from
the left, where it stays behind what is still to be read.

Rows with the label `ignore_index` are not left out, as counting them would stall the host; their dz
is 0 and their h is taken as 0. A label outside [0, v) gives NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

CHUNK_BYTES = 256 << 20  # of a chunk's logits
BLOCK_BYTES = 32 << 20  # of the float32 rows of dW that are made at a time: less than an L2 cache
_ROWS = 128  # a multiple of the rows of a tile of cuBLAS
_FLOAT16_POWER = 14  # dz of at most 2^14, where small ones are not yet rounded to 0


@triton.jit
def _tanh(x):
    """Near 0 by its series, as the quotient knows only the difference from 1."""
    square = x * x
    series = 1.0 + square * (
        -1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))
    )
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.3, x * series, tl.where(x < 0.0, -far, far))


@triton.jit
def _logit(x, bias_ptr, cols, mask, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Of a product with the head, -inf outside `mask`.

    Always by the same steps, and so the same number.
    """
    if BIAS:
        x += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x *= scale
    if SOFTCAP:
        x = softcap * _tanh(x / softcap)
    return tl.where(mask, x, float("-inf"))


@triton.jit(do_not_specialize=("ignore_index",))
def _linear_cross_entropy_rows(
    logits_ptr,
    dz_ptr,
    labels_ptr,
    factors_ptr,
    power_ptr,
    bias_ptr,
    ce_ptr,
    correct_ptr,
    v,
    ignore_index,
    scale,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: ce, whether its label has the largest logit, and dz over the row's logits.

    STRIDE numbers of dz take the place of one logit.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    x_ptr = logits_ptr + row * v
    dz_ptr += row * v * STRIDE
    if label == ignore_index:
        tl.store(ce_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if GRADIENT:
            zero = tl.zeros((BLOCK,), dz_ptr.dtype.element_ty)
            for start in range(0, v, BLOCK):
                tl.store(dz_ptr + start + cols, zero, mask=start + cols < v)
        return

    inside = (label >= 0) & (label < v)
    own = tl.load(x_ptr + label, mask=inside, other=0.0)
    own = _logit(own, bias_ptr, label, inside, scale, softcap, BIAS, SOFTCAP)
    own = tl.where(inside, own, float("nan"))
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    beaten = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, v, BLOCK):
        at = start + cols
        mask = at < v
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        z = _logit(x, bias_ptr, at, mask, scale, softcap, BIAS, SOFTCAP)
        larger = tl.maximum(top, z)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(top - shift) + tl.exp(z - shift)
        top = larger
        # As argmax: of equal logits the first one, and NaN is larger than any.
        above = (z > own) | (z != z) | ((z == own) & (at < label))
        beaten = beaten | above.to(tl.int32)
    largest = tl.max(top)
    total = tl.sum(sums * tl.exp(top - largest))
    tl.store(ce_ptr + row, tl.log(total) - (own - largest))
    tl.store(correct_ptr + row, inside & (tl.max(beaten) == 0))

    if GRADIENT:
        factor = tl.load(factors_ptr + row) * tl.load(power_ptr)
        factor = tl.where(inside, factor, float("nan"))
        inverse = factor / total
        for start in range(0, v, BLOCK):
            at = start + cols
            mask = at < v
            x = tl.load(x_ptr + at, mask=mask, other=0.0)
            z = _logit(x, bias_ptr, at, mask, scale, softcap, BIAS, SOFTCAP)
            dz = tl.exp(z - largest) * inverse
            dz = tl.where(at == label, dz - factor, dz)
            if SOFTCAP:
                dz *= tl.where(mask, 1.0 - (z / softcap) * (z / softcap), 0.0)
            # Narrower numbers lie over the logits to their left, which all threads have read then.
            tl.debug_barrier()
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _config(v: int) -> dict[str, int]:
    """Launch shape for rows of `v` logits: 16 a thread."""
    block = min(max(triton.next_power_of_2(v), 32), 4096)
    return {"BLOCK": block, "num_warps": max(block // 512, 1)}


def chunk_rows(v: int, d: int, needs_weight: bool) -> int:
    """Rows of a chunk, at most: those whose logits fit in CHUNK_BYTES, or more.

    Each chunk reads and writes the float32 dW, 8 bytes an entry and row of it, which on an H100
    takes as long as the FLOPs of some 800 rows. Beside dW logits may take half its bytes, as its
    copy in the type of the weights will in the backward pass.
    """
    rows = max(CHUNK_BYTES // (4 * max(v, 1)), d // 2 if needs_weight else 0)
    return max(rows // _ROWS, 1) * _ROWS


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """`out` becomes a b, or gets it added; sums and `out` are float32, whatever the type of a."""
    if a.dtype != out.dtype and not a.is_cuda:  # torch has it on CUDA only
        a, b = a.float(), b.float()
    kind: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, **kind, out=out)
    else:
        torch.mm(a, b, **kind, out=out)


def _power(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two, float32: 1 but for float16, whose dz it moves into reach."""
    if dtype != torch.float16:
        return torch.ones((), device=factors.device)
    largest = factors.abs().amax()
    return torch.ldexp(torch.ones_like(largest), _FLOAT16_POWER - torch.frexp(largest).exponent)


def _fake_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor, bias: Tensor | None,
    ignore_index: int, logit_scale: float, softcap: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (t, d), v = hidden.shape, weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    ce = hidden.new_empty(t, dtype=torch.float32)
    correct = ce.new_empty(t, dtype=torch.bool)
    dhidden = ce.new_empty((t, d) if needs_hidden else (0,))
    dweight = ce.new_empty((v, d) if needs_weight else (0,))
    if needs_weight and whole:
        dweight = ce.new_empty((t, v * (4 // dtype.itemsize)), dtype=dtype)
    dbias = ce.new_empty((v,) if needs_bias else (0,))
    return ce, correct, dhidden, dweight, dbias, ce.new_empty(())


@op(
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor factors, Tensor? bias, "
    "SymInt ignore_index, float logit_scale, float? softcap, bool needs_hidden, "
    "bool needs_weight, bool needs_bias, bool whole) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
)
def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor, bias: Tensor | None,
    ignore_index: int, logit_scale: float, softcap: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(t, d), (v, d), (t,), f (t,) -> ce (t,), correct (t,), dh, dW, db, s, in float32.

    The gradients are those of L over s, a number; where one is not needed it is (0,). With `whole`
    all rows are one chunk, and dz in the type of the inputs stands for dW: the first v columns, the
    others are scratch.
    """
    outputs = _fake_fwd(
        hidden, weight, labels, factors, bias, ignore_index, logit_scale, softcap,
        needs_hidden, needs_weight, needs_bias, whole,
    )  # fmt: skip
    ce, correct, dhidden, dweight, dbias, scale = outputs
    (t, d), v = hidden.shape, weight.shape[0]
    if not t or not v:
        for x in outputs:
            x.zero_()
        return outputs
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    weight, labels = weight.to(dtype).contiguous(), labels.contiguous()
    factors = factors.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    power = _power(factors, dtype)
    torch.div(torch.full_like(scale, logit_scale), power, out=scale)
    ignored = (labels == ignore_index)[:, None]
    rows = t if whole else min(chunk_rows(v, d, needs_weight), t)
    rows = triton.cdiv(t, triton.cdiv(t, rows))  # of about one size
    logits = dweight.view(torch.float32) if whole else ce.new_empty(rows, v)
    dz = logits.view(dtype)
    dbias.zero_()
    for first in range(0, t, rows):
        chunk = slice(first, min(first + rows, t))
        n = chunk.stop - first
        h, g = hidden[chunk].to(dtype), dz[:n, :v]
        with torch.autocast(h.device.type, enabled=False):
            _product(h, weight.T, logits[:n])
            _linear_cross_entropy_rows[(n,)](
                logits, dz, labels[chunk], factors[chunk], power,
                weight if bias is None else bias,  # a pointer, never read
                ce[chunk], correct[chunk], v, ignore_index, logit_scale, softcap or 1.0,
                BIAS=bias is not None, SOFTCAP=softcap is not None,
                GRADIENT=needs_hidden or needs_weight or needs_bias,
                STRIDE=4 // dtype.itemsize, **_config(v),
            )  # fmt: skip
            if needs_hidden:
                _product(g, weight, dhidden[chunk])
            if needs_weight and not whole:
                # NaN of an ignored row would meet its zeros.
                _product(g.T, h.masked_fill(ignored[chunk], 0.0), dweight, add=first > 0)
            if needs_bias:
                dbias += g.sum(0, dtype=torch.float32)
    if needs_hidden:
        dhidden.masked_fill_(ignored, 0.0)  # also where the head is not finite
    return outputs


@op(
    "(Tensor dloss, Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda dloss, gradient, scale, dtype: torch.empty_like(gradient, dtype=dtype),
)
def linear_cross_entropy_bwd(
    dloss: Tensor, gradient: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """A gradient of the forward pass times dloss and s, two numbers, in `dtype`."""
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, dloss * scale, out=out)


def _vocabulary(dz: Tensor) -> int:
    """v of dz from the forward pass, which lies over float32 logits."""
    return dz.shape[1] * dz.element_size() // 4


@op(
    "(Tensor dloss, Tensor dz, Tensor hidden, Tensor labels, Tensor scale, SymInt ignore_index, "
    "ScalarType dtype) -> Tensor",
    fake=lambda dloss, dz, hidden, labels, scale, ignore_index, dtype: hidden.new_empty(
        (_vocabulary(dz), hidden.shape[1]), dtype=dtype
    ),
)
def linear_cross_entropy_bwd_weight(
    dloss: Tensor, dz: Tensor, hidden: Tensor, labels: Tensor, scale: Tensor, ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dz of `whole`, (t, d), (t,) -> dW (v, d) in `dtype`, rounded once: from float32 blocks."""
    v, d = _vocabulary(dz), hidden.shape[1]
    out = hidden.new_empty((v, d), dtype=dtype)
    if not hidden.numel():
        return out.zero_()
    h = hidden.to(dz.dtype).masked_fill((labels == ignore_index)[:, None], 0.0)
    factor = dloss * scale
    size = max(BLOCK_BYTES // (4 * d), _ROWS)
    scratch = out.new_empty((min(size, v), d), dtype=torch.float32)
    with torch.autocast(h.device.type, enabled=False):
        for first in range(0, v, size):
            block = out[first : first + size]
            part = block if dtype == torch.float32 else scratch[: len(block)]
            _product(dz[:, first : first + len(block)].T, h, part)
            torch.mul(part, factor, out=block)
    return out
