"""Hadamard reweighting of rows: checks, gradient and the choice of the path."""

from collections.abc import Callable
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops._check import check_floating, check_one_of, check_same
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference.hadamard_reweight import hadamard_reweight as reference


class HadamardReweight(torch.autograd.Function):
    """The kernels with their gradient; norms are computed again in backward, not saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:
        from fastalign_kernels.hadamard_reweight import hadamard_reweight_fwd

        y: Tensor = hadamard_reweight_fwd(h, w)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        from fastalign_kernels.hadamard_reweight import hadamard_reweight_bwd

        return _backward(ctx, dy, hadamard_reweight_bwd)


class HadamardReweightNative(HadamardReweight):
    """The same by the compiled kernels."""

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:
        y: Tensor = native.hadamard_reweight_fwd(h, w)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return _backward(ctx, dy, native.hadamard_reweight_bwd)


def _backward(
    ctx: Any, dy: Tensor, kernel: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    needs_w = ctx.needs_input_grad[1]
    dh, dw = once(kernel, dy, *ctx.saved_tensors, needs_w)
    return dh, dw if needs_w else None


def hadamard_reweight(h: Tensor, w: Tensor) -> Tensor:
    r"""Modality-specific component $s \, (w \circ h)$ of each row (DeepAlign, CVPR 2026).

    $s = \sqrt{\sum_d h_d^2 / \sum_d (w_d h_d)^2}$ gives the result the energy of `h`, so that a
    positive factor on `w` changes nothing. A row with $w \circ h = 0$ gives 0, with gradient 0.

    Args:
        h: Representations, (..., d), float16, bfloat16 or float32, on CPU also float64;
            d <= 16384 on CUDA.
        w: Channel weights, in the shape of `h` or (d,) for all rows, on the device of `h`, of any
            of these dtypes. It is not detached: pass `w.detach()` for the published method.

    Returns:
        (..., d) in the dtype of `h`, computed in float32 or wider. Differentiable in `h` and `w`,
        by a kernel (CUDA, and the CPU's compiled ones) once.

    Raises:
        TypeError: An argument is no floating-point tensor.
        ValueError: `w` has another shape or device, `h` has no dimension, or the dtype or d is not
            supported on CUDA.
    """
    check_floating(h=h, w=w)
    check_same("device", h=h, w=w)
    if h.dim() == 0:
        raise ValueError("h must have at least 1 dimension, (..., d): got a scalar")
    if w.shape not in (h.shape, h.shape[-1:]):
        raise ValueError(
            f"w must have the shape of h or ({h.shape[-1]},): "
            f"got {tuple(w.shape)} and {tuple(h.shape)}"
        )
    y: Tensor
    if native.takes(h, w) or (not on_triton(h) and native.takes_cuda(h, w)):
        y = HadamardReweightNative.apply(h, w)  # type: ignore[no-untyped-call]
        return y
    if not on_triton(h):
        return reference(h, w)

    from fastalign_kernels.hadamard_reweight import DTYPES, MAX_DIM

    check_one_of("the dtype of h on CUDA", h.dtype, DTYPES)
    check_one_of("the dtype of w on CUDA", w.dtype, DTYPES)
    if h.shape[-1] > MAX_DIM:
        raise ValueError(f"h must have d <= {MAX_DIM} on CUDA: got {h.shape[-1]}; use h.cpu()")
    y = HadamardReweight.apply(h, w)  # type: ignore[no-untyped-call]
    return y
