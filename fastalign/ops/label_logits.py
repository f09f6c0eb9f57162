"""The logit of each token's own label: checks, gradient and the choice of the path."""

from collections.abc import Callable
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops._check import (
    check_dim,
    check_floating,
    check_integer,
    check_last_dim,
    check_one_of,
    check_same,
    check_shape,
)
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference.label_logits import label_logits as reference

Gradients = tuple[Tensor | None, Tensor | None, None, Tensor | None]


class LabelLogits(torch.autograd.Function):
    """The kernels with their gradient; the dense gradient of `weight` only where it is needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        from fastalign_kernels.label_logits import label_logits_fwd

        y: Tensor = label_logits_fwd(hidden, weight, labels, bias)
        return y

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        hidden, weight, labels, _ = inputs
        ctx.save_for_backward(hidden, weight, labels)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        from fastalign_kernels.label_logits import label_logits_bwd_hidden, label_logits_bwd_weight

        return _backward(ctx, dy, label_logits_bwd_hidden, label_logits_bwd_weight)


class LabelLogitsNative(LabelLogits):
    """The same by the compiled kernels of the CPU."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = native.label_logits_fwd(hidden, weight, labels, bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        return _backward(ctx, dy, native.label_logits_bwd_hidden, native.label_logits_bwd_weight)


def _backward(
    ctx: Any, dy: Tensor, for_hidden: Callable[..., Tensor], for_weight: Callable[..., Any]
) -> Gradients:
    hidden, weight, labels = ctx.saved_tensors
    needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad
    dhidden = dweight = dbias = None
    if needs_hidden:
        dhidden = once(for_hidden, dy, weight, labels)
    if needs_weight or needs_bias:
        dweight, dbias = once(for_weight, dy, hidden, labels, weight.shape[0])
    return dhidden, dweight if needs_weight else None, None, dbias if needs_bias else None


def label_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    r"""Logit of each token's own label, $h_i^\top W_{l_i} + b_{l_i}$ (CAL, NeurIPS 2024).

    A row dot product: the (t, v) logits are never formed. Equal to
    `(hidden @ weight.T + bias).gather(1, labels[:, None])` where labels are not negative.

    Args:
        hidden: Hidden states, (t, d), float16, bfloat16 or float32, on CPU also float64.
        weight: Output embeddings, (v, d), in the dtype and on the device of `hidden`.
        labels: Vocabulary indices, (t,), int32 or int64; negative ones (-100) are ignored. A label
            that is not below v gives NaN on CUDA, where checking would wait for the device.
        bias: (v,) in the dtype of `hidden`, or None.

    Returns:
        (t,) float32 (float64 for float64 inputs), 0 for ignored labels. Differentiable in `hidden`,
        `weight` and `bias`, by a kernel (CUDA, and the CPU's compiled ones) once. The gradient of
        `weight` is dense, (v, d): writing it costs most. Equal labels add up in float32, in the
        order of the tokens, after a stable sort of the labels: the same result every time.

    Raises:
        TypeError: An argument is no tensor of the right kind.
        ValueError: Shapes, dtypes or devices do not fit, or the dtype is not supported on CUDA.
        IndexError: A label is not below v, on CPU.
    """
    check_floating(hidden=hidden, weight=weight)
    check_integer(labels=labels)
    check_dim("hidden", hidden, 2)
    check_dim("weight", weight, 2)
    check_last_dim("weight", weight, hidden.shape[1])
    check_shape("labels", labels, (hidden.shape[0],), "(t,)")
    check_same("dtype", "device", hidden=hidden, weight=weight)
    check_same("device", hidden=hidden, labels=labels)
    if bias is not None:
        check_floating(bias=bias)
        check_shape("bias", bias, (weight.shape[0],), "(v,)")
        check_same("dtype", "device", hidden=hidden, bias=bias)
    y: Tensor
    if native.takes(hidden):
        y = LabelLogitsNative.apply(hidden, weight, labels, bias)  # type: ignore[no-untyped-call]
        return y
    if not on_triton(hidden):
        return reference(hidden, weight, labels, bias)

    from fastalign_kernels.label_logits import DTYPES

    check_one_of("the dtype of hidden on CUDA", hidden.dtype, DTYPES)
    y = LabelLogits.apply(hidden, weight, labels, bias)  # type: ignore[no-untyped-call]
    return y
