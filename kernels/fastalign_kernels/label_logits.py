"""The logit of each token's own label, forward and backward, without the (t, v) product.

    y_i = <hidden_i, weight[l_i]> + bias[l_i]     0 where l_i < 0
    dhidden_i = dy_i weight[l_i]
    dweight_l = sum over l_i = l of dy_i hidden_i     dbias_l = sum over l_i = l of dy_i

Forward and dhidden read each of their rows once: the cost is 2 t d elements. dweight is dense, so
writing its v d zeros costs most; the sum groups equal labels by a stable sort of the t labels, and
one program per distinct label and column tile adds in that order. No atomics: the result is the
same every time. A label that many tokens share is one serial sum, 16 tokens a step.

A label >= v gives NaN: reading it would be out of bounds, and checking it on the host a stall.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign_kernels import _fakes
from fastalign_kernels._op import DTYPES as DTYPES
from fastalign_kernels._op import op

_TOKENS = 16  # tokens of one label that a step of dweight adds up


@triton.jit
def _label_logits_fwd(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    bias_ptr,
    y_ptr,
    d,
    v,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    valid = (label >= 0) & (label < v)
    width = tl.where(valid, d, 0)  # of what is read
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < width
        hidden = tl.load(hidden_ptr + row * d + cols, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + label * d + cols, mask=mask, other=0.0).to(tl.float32)
        total += hidden * weight
    y = tl.sum(total)
    if HAS_BIAS:
        y += tl.load(bias_ptr + label, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.where(label < v, y, float("nan")))


@triton.jit
def _label_logits_bwd_hidden(
    dy_ptr, weight_ptr, labels_ptr, dhidden_ptr, d, v, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    valid = (label >= 0) & (label < v)
    width = tl.where(valid, d, 0)  # of what is read
    dy = tl.load(dy_ptr + row, mask=valid, other=0.0)
    dy = tl.where(label < v, dy, float("nan"))
    for start in range(0, d, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + label * d + cols, mask=cols < width, other=0.0)
        dhidden = (dy * weight.to(tl.float32)).to(dhidden_ptr.dtype.element_ty)
        tl.store(dhidden_ptr + row * d + cols, dhidden, mask=cols < d)


@triton.jit
def _label_logits_bwd_weight(
    dy_ptr,
    hidden_ptr,
    sorted_ptr,
    order_ptr,
    end_ptr,
    dweight_ptr,
    dbias_ptr,
    d,
    v,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64)  # position in the sorted labels
    tile = tl.program_id(1).to(tl.int64)
    label = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if (label >= 0) & (label < v) & (label != before):
        end = tl.load(end_ptr + first)
        cols = tile * BLOCK + tl.arange(0, BLOCK)
        mask = cols < d
        dweight = tl.zeros((BLOCK,), tl.float32)
        dbias = tl.zeros((TOKENS,), tl.float32)
        for start in range(first, end, TOKENS):
            at = start + tl.arange(0, TOKENS)
            token = tl.load(order_ptr + at, mask=at < end, other=0)  # (TOKENS,) int64
            dy = tl.load(dy_ptr + token, mask=at < end, other=0.0)
            hidden = tl.load(
                hidden_ptr + token[:, None] * d + cols[None, :],
                mask=(at < end)[:, None] & mask[None, :],
                other=0.0,
            ).to(tl.float32)
            dweight += tl.sum(dy[:, None] * hidden, 0)
            dbias += dy
        tl.store(
            dweight_ptr + label * d + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=mask
        )
        if tile == 0:
            tl.store(dbias_ptr + label, tl.sum(dbias).to(dbias_ptr.dtype.element_ty))


def _config(d: int) -> dict[str, int]:
    """Launch shape for rows of `d`: tiles of at most 4096 columns, 16 elements a thread."""
    block = min(triton.next_power_of_2(d), 4096)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def _config_weight(d: int) -> dict[str, int]:
    """Launch shape of dweight: 16 tokens by at most 256 columns."""
    return {"TOKENS": _TOKENS, "BLOCK": min(triton.next_power_of_2(d), 256), "num_warps": 4}


@op(
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias) -> Tensor",
    fake=_fakes.label_logits_fwd,
)
def label_logits_fwd(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """(t, d), (v, d), (t,), (v,) -> (t,) float32."""
    hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
    t, d = hidden.shape
    y = hidden.new_empty(t, dtype=torch.float32)
    if t:
        has_bias = bias is not None
        bias = weight if bias is None else bias.contiguous()  # a pointer, never read
        _label_logits_fwd[(t,)](
            hidden, weight, labels, bias, y, d, len(weight), HAS_BIAS=has_bias, **_config(d)
        )
    return y


@op(
    "(Tensor dy, Tensor weight, Tensor labels) -> Tensor",
    fake=_fakes.label_logits_bwd_hidden,
)
def label_logits_bwd_hidden(dy: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """dy (t,) float32 -> dhidden (t, d) in the dtype of weight."""
    dy, weight, labels = dy.contiguous(), weight.contiguous(), labels.contiguous()
    t, (v, d) = len(dy), weight.shape
    dhidden = weight.new_empty(t, d)
    if t:
        _label_logits_bwd_hidden[(t,)](dy, weight, labels, dhidden, d, v, **_config(d))
    return dhidden


@op(
    "(Tensor dy, Tensor hidden, Tensor labels, SymInt v) -> (Tensor, Tensor)",
    fake=_fakes.label_logits_bwd_weight,
)
def label_logits_bwd_weight(
    dy: Tensor, hidden: Tensor, labels: Tensor, v: int
) -> tuple[Tensor, Tensor]:
    """dy (t,) float32 -> dweight (v, d) and dbias (v,) in the dtype of hidden."""
    dy, hidden = dy.contiguous(), hidden.contiguous()
    t, d = hidden.shape
    dweight, dbias = hidden.new_zeros(v, d), hidden.new_zeros(v)
    if t and d:
        ordered, order = labels.long().sort(stable=True)
        end = torch.searchsorted(ordered, ordered, right=True)  # after the last of its label
        config = _config_weight(d)
        _label_logits_bwd_weight[(t, triton.cdiv(d, config["BLOCK"]))](
            dy, hidden, ordered, order, end, dweight, dbias, d, v, **config
        )
    return dweight, dbias
