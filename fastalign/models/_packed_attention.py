"""Attention over samples packed into one row: causal inside a sample, nothing across.

A query at position p of its sample sees the keys of its own sample at positions p' with
0 <= p - p' (< window). Positions are those of the unpacked sample, so they have gaps where tokens
were dropped, and the result is that of the full-length pass with the dropped tokens masked.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalign.models import _packed_backends as libraries
from fastalign.models._packed_limits import obstacle
from fastalign.models._segments import Segments
from fastalign.ops._check import check_dim, check_one_of, check_positive, check_same

BACKENDS = ("auto", "varlen", "flash-attn", "flash-attn-4", "xformers", "flex", "sdpa")
# What "auto" tries, in this order; sdpa takes everything. By name only: flash-attn-4, a beta that
# compiles at its first calls, flex, which does too and stalls a training step for seconds, and
# xformers, which offers nothing beyond these.
_AUTO = ("varlen", "flash-attn", "sdpa")
_RUN: dict[str, Callable[[libraries.Call], Tensor]] = {
    "varlen": libraries.varlen,
    "flash-attn": libraries.flash_attn,
    "flash-attn-4": libraries.flash_attn_4,
    "xformers": libraries.xformers,
    "flex": libraries.flex,
    "sdpa": libraries.sdpa,
}


def choose(device: torch.device, dtype: torch.dtype, **request: Any) -> str:
    """The back end that "auto" takes; `request` as in `obstacle`."""
    return next(name for name in _AUTO if obstacle(name, device, dtype, **request) is None)


def attention_backend(
    query: Tensor,
    *,
    window: int | None = None,
    segments: Segments | None = None,
    softcap: float | None = None,
) -> str:
    """The back end that `packed_attention` takes for such a query with `backend="auto"`.

    Args:
        query: Of which device, dtype and last dimension are read, (..., dh).
        window: Sliding window.
        segments: The samples; without them a window counts as shorter, and their positions as
            having gaps.
        softcap: Cap of the scores.
    """
    request = _request(query.shape[-1], window, segments, softcap)
    return choose(query.device, query.dtype, **request)


def _request(
    head_dim: int, window: int | None, segments: Segments | None, softcap: float | None
) -> dict[str, Any]:
    """What `obstacle` is asked about, but device and dtype."""
    windowed = window is not None and (segments is None or window < segments.span)
    gaps = windowed and (segments is None or not segments.counts_tokens(window or 0))
    return {
        "head_dim": head_dim,
        "windowed": windowed,
        "gaps": gaps,
        "softcap": softcap is not None,
    }


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Causal attention inside each segment of a packed row, $softmax(c(s\,q k^\top))\,v$.

    $c(x) = softcap \cdot \tanh(x / softcap)$, or x without `softcap`. On CUDA "auto" takes torch's
    varlen attention for float16 and bfloat16, flash-attn where a softcap is asked for and it is
    installed, and otherwise, like everywhere else, one `scaled_dot_product_attention` a segment;
    with a softcap that one is written out in float32. A window that cuts segments whose positions
    have gaps needs a mask, which only that one and flex take.

    Args:
        query: (1, h, T, dh), any floating dtype.
        key: (1, hkv, T, dh); h is a multiple of hkv, and each key head serves h / hkv query heads.
        value: (1, hkv, T, dv).
        segments: The samples of the row, on the device of `query`.
        scale: s; dh ** -0.5 by default.
        window: Keys at 0 <= p_query - p_key < window are seen; all earlier ones by default.
        softcap: Bound of the scores, > 0.
        backend: One of `BACKENDS`. One that is named runs or raises.

    Returns:
        (1, h, T, dv), the dtype of `query`. Differentiable where the back end is: all but flex on
        the CPU.

    Raises:
        ValueError: Shapes, dtypes or devices disagree, or the named back end cannot run this.
    """
    _check(query, key, value, segments, window, softcap)
    check_one_of("backend", backend, BACKENDS)
    window = None if window is None or window >= segments.span else window
    head_dim, width = query.shape[-1], value.shape[-1]
    request = _request(max(head_dim, width), window, segments, softcap)
    if backend == "auto":
        backend = choose(query.device, query.dtype, **request)
    elif why := obstacle(backend, query.device, query.dtype, **request):
        instead = choose(query.device, query.dtype, **request)
        raise ValueError(
            f"backend {backend!r} cannot run this attention: {why}; "
            f"backend='auto' takes {instead!r} here"
        )
    if query.shape[2] == 0:
        return query.new_empty((*query.shape[:-1], width))
    scale = head_dim**-0.5 if scale is None else scale
    call = libraries.Call(query, key, value, segments, scale, window, softcap)
    return _RUN[backend](call)[..., :width]


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    window: int | None,
    softcap: float | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_dim(name, tensor, 4)
    check_same("dtype", "device", query=query, key=key, value=value)
    check_same("device", query=query, segments=segments.cu_seqlens)
    b, heads, total, dim = query.shape
    if b != 1 or total != sum(segments.lengths):
        raise ValueError(
            f"query must be one row of the {sum(segments.lengths)} tokens that segments hold, "
            f"(1, h, T, dh): got {tuple(query.shape)}"
        )
    if key.shape[:3] != value.shape[:3] or (key.shape[0], *key.shape[2:]) != (1, total, dim):
        raise ValueError(
            f"key and value must be (1, hkv, {total}, {dim}) and (1, hkv, {total}, dv): "
            f"got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(
            f"query must have a multiple of the heads of key: got {heads} and {key.shape[1]}"
        )
    if window is not None:
        check_positive("window", window)
    if softcap is not None:
        check_positive("softcap", softcap)
