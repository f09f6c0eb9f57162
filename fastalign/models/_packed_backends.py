"""The libraries that attend within the segments of a packed row, each behind one function.

All compute the same: `Call` in, output (1, h, T, width) out, where channels beyond those of `value`
are padding. What a library cannot do has been refused before, by `_packed_limits.obstacle`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.models._segments import Segments
from fastalign.ops._autocast import no_autocast


@dataclass(frozen=True)
class Call:
    """What is asked for: T > 0 tokens, and `window` only where it hides something.

    Attributes:
        query: (1, h, T, dh).
        key: (1, hkv, T, dh).
        value: (1, hkv, T, dv).
        segments: The samples of the row.
        scale: Factor of the scores.
        window: Sliding window in positions.
        softcap: Bound of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    segments: Segments
    scale: float
    window: int | None
    softcap: float | None

    def ungrouped(self) -> "Call":
        """Keys and values repeated to one head a query head."""
        group = self.query.shape[1] // self.key.shape[1]
        if group == 1:
            return self
        key, value = (x.repeat_interleave(group, 1) for x in (self.key, self.value))
        return replace(self, key=key, value=value)

    def even(self, multiple: int = 8) -> list[Tensor]:
        """Query, key and value with zero channels added up to one width that kernels take.

        Zeros change neither the scores nor the other channels of the output. Kernels load 16 bytes
        at a time without a check, so a tensor where 8 channels may begin elsewhere is copied.
        """
        tensors = (self.query, self.key, self.value)
        width = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
        padded = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)
        return [x if _aligned(x) else x.clone(memory_format=_CONTIGUOUS) for x in padded]

    def rows(self) -> list[Tensor]:
        """What `even` gives, as (T, heads, channels)."""
        return [x[0].transpose(0, 1) for x in self.even()]

    @property
    def left(self) -> int:
        """Tokens before its own that each query sees, -1 for all."""
        return -1 if self.window is None else self.window - 1


_CONTIGUOUS = torch.contiguous_format


def _aligned(x: Tensor) -> bool:
    """Whether channels lie side by side, and each row of them begins at a multiple of 8."""
    return x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1]))


@lru_cache(maxsize=1)
def varlen_parameters() -> frozenset[str]:
    """What torch's `varlen_attn` takes: it had no scale, window or grouped heads at first."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen(call: Call) -> Tensor:
    from torch.nn.attention import varlen

    options: dict[str, Any] = {}
    if "enable_gqa" in varlen_parameters():
        options["enable_gqa"] = True
    else:
        call = call.ungrouped()
    q, k, v = call.rows()
    offsets, longest = call.segments.cu_seqlens, max(call.segments.lengths)
    out = varlen.varlen_attn(
        *(q, k, v, offsets, offsets, longest, longest),
        scale=call.scale,
        window_size=(call.left, 0),  # none to the right: causal
        **options,
    )
    assert isinstance(out, Tensor)  # no auxiliary output was asked for
    return out.transpose(0, 1)[None]


def flash_attn(call: Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    q, k, v = call.rows()
    longest = max(call.segments.lengths)
    out: Tensor = flash_attn_varlen_func(
        *(q, k, v),
        cu_seqlens_q=call.segments.cu_seqlens,
        cu_seqlens_k=call.segments.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=call.scale,
        causal=True,
        window_size=(call.left, 0),
        softcap=0.0 if call.softcap is None else call.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return out.transpose(0, 1)[None]


def flash_attn_4(call: Call) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    q, k, v = call.rows()
    longest = max(call.segments.lengths)
    out = flash_attn_varlen_func(
        *(q, k, v),
        cu_seqlens_q=call.segments.cu_seqlens,
        cu_seqlens_k=call.segments.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=call.scale,
        causal=True,
        window_size=(None if call.left < 0 else call.left, 0),
        softcap=0.0 if call.softcap is None else call.softcap,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # with the log-sum-exp, or not
    return attended.transpose(0, 1)[None]


def xformers(call: Call) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    q, k, v = (x.transpose(1, 2) for x in call.ungrouped().even())  # (1, T, h, d)

    def bias() -> Any:
        lengths = [n for n in call.segments.lengths if n]
        mask = BlockDiagonalCausalMask.from_seqlens(lengths, device=q.device)
        return mask if call.window is None else mask.make_local_attention(call.window)

    mask = call.segments.once("xformers", call.window, bias)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask, scale=call.scale)
    return out.transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _softcap_mod(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # A tensor: a captured number becomes a symbol once a second model brings another one.
    cap = torch.tensor(softcap, dtype=torch.float32).to(device)

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def flex(call: Call) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation it forms all T x T scores: right, and fit for a check on the CPU.
    run: Any = _compiled_flex() if call.query.is_cuda else flex_attention
    q, k, v = call.ungrouped().even(multiple=16)
    score_mod = None if call.softcap is None else _softcap_mod(call.softcap, q.device)
    blocks = call.segments.block_mask(call.window)
    out: Tensor = run(q, k, v, score_mod=score_mod, block_mask=blocks, scale=call.scale)
    return out


def sdpa(call: Call) -> Tensor:
    """One `scaled_dot_product_attention` a segment; with a softcap, which it lacks, `_capped`."""
    # Off the CPU only flash kernels read grouped heads, and they take neither float32 nor a mask.
    if call.softcap is not None or call.query.device.type != "cpu":
        call = call.ungrouped()
    lengths = list(call.segments.lengths)
    masks: list[Tensor | None] = [None] * len(lengths)
    if call.window is not None or call.softcap is not None:
        masks = list(call.segments.masks(call.window))
    queries, keys, values = (torch.split(x, lengths, 2) for x in (call.query, call.key, call.value))
    grouped = call.key.shape[1] != call.query.shape[1]
    outputs = []
    for q, k, v, mask in zip(queries, keys, values, masks, strict=True):
        if q.shape[2] and call.softcap is not None and mask is not None:
            outputs.append(_capped(q, k, v, mask, call.scale, call.softcap))
        elif q.shape[2]:
            outputs.append(
                F.scaled_dot_product_attention(
                    *(q, k, v, mask), is_causal=mask is None, scale=call.scale, enable_gqa=grouped
                )
            )
    return torch.cat(outputs, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Attention of one segment with a softcap, written out in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q):
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
        capped = softcap * torch.tanh(scores / softcap)
        weights = capped.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ v.to(wide)).to(q.dtype)
