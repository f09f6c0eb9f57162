"""Weighted cross-entropy of a linear head: checks, gradient and the choice of the path."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.ops import _lce_portable as portable_path
from fastalign.ops._check import (
    check_dim,
    check_floating,
    check_integer,
    check_last_dim,
    check_one_of,
    check_positive,
    check_same,
    check_shape,
)
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference import CrossEntropy

Grads = tuple[Tensor | None, ...]
Needs = tuple[bool, bool, bool]


def _path(portable: bool) -> Any:
    """The module of the operators: torch operations in chunks, or the kernels."""
    if portable:
        return portable_path
    from fastalign_kernels import linear_cross_entropy as kernels

    return kernels


def _is_whole(hidden: Tensor, needs: Needs) -> bool:
    """Whether dz, (t, v), is kept in place of dW, (v, d): it is the smaller of the two."""
    # A compiled graph may not know the number of rows.
    return needs[1] and not torch.compiler.is_compiling() and hidden.shape[0] <= hidden.shape[1]


class LinearCrossEntropy(torch.autograd.Function):
    """sum(factors ce), with ce and correct; the gradient is made in the forward pass.

    `needs` says for which of hidden, weight and bias. What is kept is in float32 (dz of the
    kernels in the type of the inputs); the backward pass multiplies by the loss's own gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor,
        ignore_index: int, logit_scale: float, softcap: float | None, needs: Needs, whole: bool,
        portable: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ce, *rest = _path(portable).linear_cross_entropy_fwd(
            hidden, weight, labels, factors, bias, ignore_index, logit_scale, softcap, *needs, whole
        )
        return (factors * ce).sum(), ce, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, bias, labels, _, ctx.ignore_index, *_, ctx.whole, ctx.portable = inputs
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
        rows = (hidden, labels) if ctx.whole else (None, None)
        ctx.save_for_backward(*output[3:], *rows)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> Grads:
        needs = ctx.needs_input_grad[:3]
        if dloss is None:
            return (None,) * 11
        found = once(
            _scaled, dloss, *ctx.saved_tensors, ctx.ignore_index, needs, ctx.whole, ctx.dtypes,
            ctx.portable,
        )  # fmt: skip
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 8


class LinearCrossEntropyRows(torch.autograd.Function):
    """ce and correct of each row; their gradient is only known backward, where all is recomputed.

    `factors` gives the type of ce.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor,
        ignore_index: int, logit_scale: float, softcap: float | None, portable: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ce, correct, *_ = _path(portable).linear_cross_entropy_fwd(
            hidden, weight, labels, factors, bias, ignore_index, logit_scale, softcap,
            False, False, False, False,
        )  # fmt: skip
        return ce, correct

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.ignore_index, ctx.logit_scale, ctx.softcap, ctx.portable = inputs
        ctx.save_for_backward(*tensors[:4])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dce: Tensor | None, *_: None) -> Grads:
        needs = ctx.needs_input_grad[:3]
        if dce is None:
            return (None,) * 9
        found = once(
            _of_rows, dce, *ctx.saved_tensors, ctx.ignore_index, ctx.logit_scale, ctx.softcap,
            needs, ctx.portable,
        )  # fmt: skip
        return *(x if need else None for x, need in zip(found, needs, strict=True)), *(None,) * 6


def _scaled(
    dloss: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, scale: Tensor,
    hidden: Tensor | None, labels: Tensor | None, ignore_index: int, needs: Needs, whole: bool,
    dtypes: tuple[torch.dtype | None, ...], portable: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the forward pass kept, times dloss, in the types of the inputs."""
    path, found = _path(portable), []
    for i, gradient in enumerate((dhidden, dweight, dbias)):
        if not needs[i]:
            found.append(gradient.new_empty(0))
        elif whole and i == 1:
            found.append(
                path.linear_cross_entropy_bwd_weight(
                    dloss, gradient, hidden, labels, scale, ignore_index, dtypes[i]
                )
            )
        else:
            found.append(path.linear_cross_entropy_bwd(dloss, gradient, scale, dtypes[i]))
    return tuple(found)


def _of_rows(
    dce: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    ignore_index: int, logit_scale: float, softcap: float | None, needs: Needs, portable: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of sum(dce ce)."""
    whole = _is_whole(hidden, needs)
    _, _, dhidden, dweight, dbias, scale = _path(portable).linear_cross_entropy_fwd(
        hidden, weight, labels, dce, bias, ignore_index, logit_scale, softcap, *needs, whole
    )
    dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
    return _scaled(
        torch.ones_like(scale), dhidden, dweight, dbias, scale, hidden, labels, ignore_index, needs,
        whole, dtypes, portable,
    )  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    details: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    details: Literal[True],
) -> CrossEntropy: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    details: bool = False,
) -> Tensor | CrossEntropy:
    r"""Weighted cross-entropy of a linear head, $\sum_i w_i CE_i / \sum_i w_i$ (CAL, NeurIPS 2024).

    The logits are $z = H W^T + b$, then times `logit_scale`, then $c \tanh(z / c)$ with softcap $c$
    (the order of Gemma and Cohere). Sums run over the labels that are not `ignore_index`.

    With "mean" and "sum" the weights of the rows in the loss are known, and the gradient is made in
    the forward pass: three products, nothing recomputed. Rows are taken in chunks, whose size
    depends on v and d, and no more logits exist at a time. Kept for the backward pass are the
    gradients, in float32; for that of `weight`, where t <= d, the (t, v) gradient of the logits
    instead, which is smaller, and then all rows are one chunk. With "none" the backward pass
    computes the logits once more. Without a gradient one product is all.

    Args:
        hidden: Rows that predict the labels, (t, d), float16, bfloat16 or float32, on CPU also
            float64.
        weight: Output embeddings, (v, d); their dtype may differ from that of `hidden`. On CUDA the
            products run in the wider of the two, and the other one is copied into it.
        labels: (t,) int64 or int32, in [0, v) or `ignore_index`; already shifted.
        token_weights: $w$, (t,), not negative; constants: no gradient flows to them. None: 1.
        bias: (v,) or None.
        ignore_index: Label of rows that take no part; even NaN in such a row goes nowhere. On CUDA
            they cost as much as others, since counting them would wait for the device: leave out
            before the call what is known to be ignored.
        logit_scale: Factor of the logits.
        softcap: Bound of the logits, above 0, or None.
        reduction: "mean" is the formula above; "sum", $\sum_i w_i CE_i$; "none", $w_i CE_i$ per row
            and 0 at ignored labels.
        details: Return a `CrossEntropy` (loss, per_token, correct) instead.

    Returns:
        Scalar, or (t,) with reduction "none". Without a label, or with weights that are all 0,
        it is 0 with gradient 0. Differentiable once in `hidden`, `weight` and `bias`. The same
        result every time.

    Raises:
        TypeError: An input has the wrong kind of dtype, or is a module instead of its weight.
        ValueError: Shapes, devices or options are wrong, or the dtype is not supported on CUDA; on
            CPU also a label outside [0, v), which gives NaN on CUDA.
    """
    check_one_of("reduction", reduction, ("mean", "sum", "none"))
    if isinstance(weight, torch.nn.Module):
        raise TypeError(
            f"weight must be the (v, d) tensor of the head: got the module {type(weight).__name__};"
            " pass its .weight, after merging an adapter such as LoRA into it"
        )
    check_floating(hidden=hidden, weight=weight)
    check_integer(labels=labels)
    check_dim("hidden", hidden, 2)
    check_dim("weight", weight, 2)
    check_last_dim("weight", weight, hidden.shape[1])
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    check_shape("labels", labels, (tokens,), "(t,)")
    check_same("device", hidden=hidden, weight=weight, labels=labels)
    if token_weights is not None:
        check_floating(token_weights=token_weights)
        check_shape("token_weights", token_weights, (tokens,), "(t,)")
        check_same("device", hidden=hidden, token_weights=token_weights)
    if bias is not None:
        check_floating(bias=bias)
        check_shape("bias", bias, (vocabulary,), "(v,)")
        check_same("device", hidden=hidden, bias=bias)
    if softcap is not None:
        check_positive("softcap", softcap)
    _check_labels(labels, vocabulary, ignore_index)
    if on_triton(hidden):
        from fastalign_kernels.linear_cross_entropy import DTYPES

        check_one_of("the dtype of hidden on CUDA", hidden.dtype, DTYPES)
        check_one_of("the dtype of weight on CUDA", weight.dtype, DTYPES)
    result = compute(
        not on_triton(hidden), hidden, weight, labels, token_weights, bias, ignore_index,
        logit_scale, softcap, reduction,
    )  # fmt: skip
    return result if details else result.loss


def compute(
    portable: bool,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> CrossEntropy:
    """`linear_cross_entropy` of checked arguments, by torch operations or by the kernels."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    factors = (labels != ignore_index).to(dtype)
    if token_weights is not None:
        factors = token_weights.detach().to(dtype).masked_fill(labels == ignore_index, 0.0)
    tail = (ignore_index, float(logit_scale), None if softcap is None else float(softcap))
    if reduction == "none":
        ce, correct = LinearCrossEntropyRows.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, labels, factors, *tail, portable
        )
        return CrossEntropy(factors * ce, ce.detach(), correct)
    if reduction == "mean":
        total = factors.sum()
        factors = factors / total.masked_fill(total == 0, 1.0)
    enabled = torch.is_grad_enabled()
    needs = (
        enabled and hidden.requires_grad,
        enabled and weight.requires_grad,
        enabled and bias is not None and bias.requires_grad,
    )
    whole = _is_whole(hidden, needs)
    loss, ce, correct, *_ = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, factors, *tail, needs, whole, portable
    )
    return CrossEntropy(loss, ce, correct)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be ignore_index = {ignore_index}: got "
            f"{labels[wrong][0].item()} at row {wrong.nonzero()[0].item()}"
        )
