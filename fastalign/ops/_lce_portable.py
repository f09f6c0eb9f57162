"""Weighted cross-entropy of a linear head on any device but CUDA: chunks of rows, three products.

The equations are those of `fastalign_kernels.linear_cross_entropy`, in float32 (float64 where an
input has it). Rows whose label is ignored are left out before the first product. A head of another
type is widened block by block, so that no wide copy of it exists.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastalign.ops._autocast import no_autocast

CHUNK_BYTES = 128 << 20  # of a chunk's logits
PASS_BYTES = 16 << 20  # of the numbers that are worked on at a time, which bounds the temporaries
BLOCK_BYTES = 16 << 20  # of rows of the head in another type
ROWS = 128  # of a chunk, at least: with fewer the products are no longer bound by arithmetic

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def chunk_rows(v: int, d: int, needs_weight: bool) -> int:
    """Rows of a chunk, at most: each chunk reads the head, and adds to dW, once.

    Beside dW its logits may take half as much memory, as its copy will in the backward pass.
    """
    return max(CHUNK_BYTES // (4 * max(v, 1)), d // 2 if needs_weight else 0, ROWS)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the head in `dtype`, in order; a block is overwritten by the next one."""
    v, d = weight.shape
    if weight.dtype == dtype:
        yield slice(0, v), weight
        return
    size = max(BLOCK_BYTES // (max(d, 1) * dtype.itemsize), 1)
    scratch = weight.new_empty((min(size, v), d), dtype=dtype)
    for first in range(0, v, size):
        last = min(first + size, v)
        yield slice(first, last), scratch[: last - first].copy_(weight[first:last])


def _row_pass(
    logits: Tensor, labels: Tensor, factors: Tensor, bias: Tensor | None, scale: float,
    softcap: float | None, gradient: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows of h W^T, (n, v) -> ce (n,), correct (n,); in `logits` dz over `scale`."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1.0 - logits.square() if gradient else None
        logits *= softcap
    top, place = logits.max(1, keepdim=True)
    logits -= top
    own = labels[:, None]
    below = logits.gather(1, own)
    total = logits.exp_().sum(1, keepdim=True)
    if gradient:
        logits *= factors[:, None] / total
        logits.scatter_add_(1, own, -factors[:, None])
        if slope is not None:
            logits *= slope
    return (total.log_() - below).squeeze(1), (place == own).squeeze(1)


@torch.library.custom_op("fastalign::linear_cross_entropy_portable_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor, bias: Tensor | None,
    ignore_index: int, logit_scale: float, softcap: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, whole: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """ce (t,), correct (t,), gradients of sum(factors ce) over the last output, or (0,).

    With `whole` dz stands for dW: in its first rows, one for each label that counts.
    """
    outputs: Outputs = _fake_fwd(
        hidden, weight, labels, factors, bias, ignore_index, logit_scale, softcap,
        needs_hidden, needs_weight, needs_bias, whole,
    )  # fmt: skip
    ce, correct, dhidden, dweight, dbias, scale = outputs
    scale.fill_(logit_scale)
    dtype, (v, d) = ce.dtype, weight.shape
    for x in (ce, correct, dhidden, dbias):
        x.zero_()
    rows = _counted(labels, ignore_index)
    if not len(rows):
        if not whole:
            dweight.zero_()
        return outputs
    size = len(rows) if whole else chunk_rows(v, d, needs_weight)
    size = -(-len(rows) // -(-len(rows) // size))  # of about one size
    buffer = dweight if whole else ce.new_empty((size, v))
    step = max(PASS_BYTES // (v * dtype.itemsize), 1)
    gradient = needs_hidden or needs_weight or needs_bias
    wide_bias = None if bias is None else bias.to(dtype)
    with no_autocast(hidden):
        for first in range(0, len(rows), size):
            index = rows[first : first + size]
            h, logits = hidden[index].to(dtype), buffer[: len(index)]
            for block, w in _blocks(weight, dtype):
                torch.mm(h, w.T, out=logits[:, block])
            for part, at in zip(torch.split(logits, step), torch.split(index, step), strict=True):
                ce[at], correct[at] = _row_pass(
                    part, labels[at].long(), factors[at], wide_bias, logit_scale, softcap, gradient
                )
            if needs_bias:
                dbias += logits.sum(0)
            if needs_weight and not whole:
                torch.addmm(dweight, logits.T, h, beta=int(first > 0), out=dweight)
            if needs_hidden:
                dh = h  # its rows have done their work
                for block, w in _blocks(weight, dtype):
                    dh.addmm_(logits[:, block], w, beta=int(block.start > 0))
                dhidden[index] = dh
    return outputs


def _counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Rows whose label is not ignored."""
    return (labels != ignore_index).nonzero().squeeze(1)


@linear_cross_entropy_fwd.register_vmap
def _vmap_fwd(info: Any, in_dims: Any, *arguments: Any) -> Any:
    from fastalign_kernels._op import one_by_one

    return one_by_one(linear_cross_entropy_fwd)(info, in_dims, *arguments)


@linear_cross_entropy_fwd.register_fake
def _fake_fwd(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor, bias: Tensor | None,
    ignore_index: int, logit_scale: float, softcap: float | None,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool, whole: bool,
) -> Outputs:  # fmt: skip
    ce = torch.empty_like(factors)
    correct = ce.new_empty(ce.shape, dtype=torch.bool)
    (t, d), v = hidden.shape, weight.shape[0]
    dhidden = ce.new_empty((t, d) if needs_hidden else (0,))
    dweight = ce.new_empty(((t if whole else v), (v if whole else d)) if needs_weight else (0,))
    dbias = ce.new_empty((v,) if needs_bias else (0,))
    return ce, correct, dhidden, dweight, dbias, ce.new_empty(())


@torch.library.custom_op("fastalign::linear_cross_entropy_portable_bwd", mutates_args=())
def linear_cross_entropy_bwd(
    dloss: Tensor, gradient: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """A gradient of the forward pass times dloss and `scale`, in `dtype`."""
    out, factor = torch.empty_like(gradient, dtype=dtype), dloss * scale
    size = max(PASS_BYTES // max(gradient[:1].nbytes, 1), 1)
    for x, y in zip(torch.split(gradient, size), torch.split(out, size), strict=True):
        torch.mul(x, factor, out=y)
    return out


@linear_cross_entropy_bwd.register_vmap
def _vmap_bwd(info: Any, in_dims: Any, *arguments: Any) -> Any:
    from fastalign_kernels._op import one_by_one

    return one_by_one(linear_cross_entropy_bwd)(info, in_dims, *arguments)


@linear_cross_entropy_bwd.register_fake
def _fake_bwd(dloss: Tensor, gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


@torch.library.custom_op("fastalign::linear_cross_entropy_portable_bwd_weight", mutates_args=())
def linear_cross_entropy_bwd_weight(
    dloss: Tensor, dz: Tensor, hidden: Tensor, labels: Tensor, scale: Tensor, ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dz of `whole` -> dW (v, d) in `dtype`."""
    rows = _counted(labels, ignore_index)
    with no_autocast(hidden):
        h, dz = hidden[rows].to(dz.dtype) * (dloss * scale), dz[: len(rows)]
        if dtype == dz.dtype:
            return torch.mm(dz.T, h)
        out = hidden.new_empty((dz.shape[1], h.shape[1]), dtype=dtype)
        size = max(BLOCK_BYTES // max(h[:1].nbytes, 1), 1)
        for part, block in zip(torch.split(dz, size, 1), torch.split(out, size), strict=True):
            block.copy_(torch.mm(part.T, h))
    return out


@linear_cross_entropy_bwd_weight.register_vmap
def _vmap_bwd_weight(info: Any, in_dims: Any, *arguments: Any) -> Any:
    from fastalign_kernels._op import one_by_one

    return one_by_one(linear_cross_entropy_bwd_weight)(info, in_dims, *arguments)


@linear_cross_entropy_bwd_weight.register_fake
def _fake_bwd_weight(
    dloss: Tensor, dz: Tensor, hidden: Tensor, labels: Tensor, scale: Tensor, ignore_index: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return hidden.new_empty((dz.shape[1], hidden.shape[1]), dtype=dtype)
