"""CAL's token weights in one pass: clamp, then the mean of a window inside the token's sample.

    w_j = mean of clamp(delta_i, alpha, beta) over |i - j| <= W // 2, i in the sample of j

One program per block of tokens. delta is read from memory once, the neighbours of a token from the
cache that its block lies in, and w is written once: the cost is their bytes, up to windows wider
than a block. The sample of a token is found by bisection of the offsets, in the kernel: their few
bytes stay in the cache, where torch.searchsorted would be a launch of its own that writes 8 bytes
a token, for this one to read.

A window is summed, not taken as the difference of two running sums, so that a NaN stays in the
windows that hold it. Offsets are not checked, which would be a stall: no read leaves delta whatever
they are, and a token that is in no sample gets NaN.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op


@triton.jit
def _clamped(delta_ptr, at, mask, alpha, beta):
    """clamp(delta, alpha, beta); NaN stays NaN, and what is masked is alpha."""
    x = tl.load(delta_ptr + at, mask=mask, other=alpha).to(tl.float32)
    return tl.where(x < alpha, alpha, tl.where(x > beta, beta, x))


@triton.jit(do_not_specialize=("samples", "step"))
def _contrast_weights_fwd(
    delta_ptr,
    cu_ptr,
    w_ptr,
    tokens,
    samples,
    step,
    alpha,
    beta,
    PACKED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < tokens
    if PACKED:
        # The last sample whose first token is not after this one; `step` is a power of two.
        sample = tl.zeros((BLOCK,), tl.int32)
        while step > 0:
            later = sample + step
            exists = later < samples
            first = tl.load(cu_ptr + later, mask=exists, other=0).to(tl.int64)
            sample = tl.where(exists & (first <= token), later, sample)
            step = step // 2
        exists = sample < samples
        start = tl.load(cu_ptr + sample, mask=exists, other=0).to(tl.int64)
        end = tl.load(cu_ptr + sample + 1, mask=exists, other=0).to(tl.int64)
        low = tl.maximum(tl.maximum(start, 0), token - HALF)
        high = tl.minimum(tl.minimum(end, tokens), token + HALF + 1)
        lost = (token < start) | (token >= end)
    else:
        low = tl.maximum(token - HALF, 0)
        high = tl.minimum(token + HALF + 1, tokens)
        lost = ~mask
    total = _clamped(delta_ptr, token, mask, alpha, beta)
    for k in range(1, HALF + 1):
        left, right = token - k, token + k
        before, after = mask & (left >= low), mask & (right < high)
        total += tl.where(before, _clamped(delta_ptr, left, before, alpha, beta), 0.0)
        total += tl.where(after, _clamped(delta_ptr, right, after, alpha, beta), 0.0)
    w = tl.div_rn(total, tl.maximum(high - low, 1).to(tl.float32))
    tl.store(w_ptr + token, tl.where(lost, float("nan"), w), mask=mask)


def _config(tokens: int) -> dict[str, int]:
    """Launch shape: 8 tokens a thread, 16 bytes of the narrower types; rows are short."""
    return {"BLOCK": 512, "num_warps": 2}


def _half(window: int, tokens: int) -> int:
    """Neighbours on each side; a power of two where all of them are in reach of any token.

    It is compiled for, so that few values are better than the exact one.
    """
    return min(window // 2, int(triton.next_power_of_2(tokens)))


@op(
    "(Tensor delta, Tensor? cu_seqlens, float alpha, float beta, SymInt window) -> Tensor",
    fake=lambda delta, *_: delta.new_empty(delta.shape, dtype=torch.float32),
)
def contrast_weights_fwd(
    delta: Tensor, cu_seqlens: Tensor | None, alpha: float, beta: float, window: int
) -> Tensor:
    """(t,), offsets (b + 1,) or None -> weights (t,) float32, without gradient."""
    delta = delta.contiguous()
    tokens = len(delta)
    w = delta.new_empty(tokens, dtype=torch.float32)
    if tokens:
        packed = cu_seqlens is not None
        cu = delta if cu_seqlens is None else cu_seqlens.contiguous()  # a pointer, never read
        samples = len(cu) - 1 if packed else 1
        step = 1 << max(samples - 1, 0).bit_length() >> 1
        config = _config(tokens)
        _contrast_weights_fwd[(triton.cdiv(tokens, config["BLOCK"]),)](
            delta, cu, w, tokens, samples, step, alpha, beta,
            PACKED=packed, HALF=_half(window, tokens), **config,
        )  # fmt: skip
    return w
