"""Affine calibration of vision tokens: checks, gradient and the choice of the path."""

from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops._check import check_floating, check_one_of, check_same, check_shape
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference.calibrate import calibrate as reference


class Calibrate(torch.autograd.Function):
    """The kernels with their gradient; backward reads x of vision rows only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        from fastalign_kernels.calibrate import calibrate_fwd

        y: Tensor = calibrate_fwd(x, vision_mask, scale, shift)
        return y

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        from fastalign_kernels.calibrate import calibrate_bwd

        dx, dscale, dshift = once(calibrate_bwd, dy, *ctx.saved_tensors)
        return dx, None, dscale, dshift


class CalibrateNative(Calibrate):
    """The same by the compiled kernels of the CPU."""

    @staticmethod
    def forward(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y: Tensor = native.calibrate_fwd(x, vision_mask, scale, shift)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        dx, dscale, dshift = once(native.calibrate_bwd, dy, *ctx.saved_tensors)
        return dx, None, dscale, dshift


def calibrate(x: Tensor, vision_mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    r"""Modality calibration $u \circ x + v$ of the vision tokens (MoCa).

    Text tokens pass bit for bit. With `scale` 1 and `shift` 0 so do the vision tokens.

    Args:
        x: Hidden states, (..., d), float16, bfloat16 or float32, on CPU also float64.
        vision_mask: (...) bool, true for vision tokens, on the device of `x`.
        scale: u, (d,), any of these dtypes: float32 parameters go with bfloat16 activations.
        shift: v, (d,), in the dtype of `scale`.

    Returns:
        (..., d) in the dtype of `x`, computed in float32 or wider. Differentiable in `x`, `scale`
        and `shift`, by a kernel (CUDA, and the CPU's compiled ones) once; the sums over tokens are
        taken in float32, in one fixed order.

    Raises:
        TypeError: `x`, `scale` or `shift` is no floating-point tensor.
        ValueError: Shapes, dtypes or devices do not fit, or a dtype is not supported on CUDA.
    """
    check_floating(x=x, scale=scale, shift=shift)
    if x.dim() == 0:
        raise ValueError("x must have at least 1 dimension, (..., d): got a scalar")
    if vision_mask.dtype != torch.bool:
        raise TypeError(
            f"vision_mask must be bool: got {vision_mask.dtype}; use vision_mask.bool()"
        )
    check_shape("vision_mask", vision_mask, tuple(x.shape[:-1]), "(...)")
    check_shape("scale", scale, tuple(x.shape[-1:]), "(d,)")
    check_shape("shift", shift, tuple(x.shape[-1:]), "(d,)")
    check_same("dtype", scale=scale, shift=shift)
    check_same("device", x=x, vision_mask=vision_mask, scale=scale, shift=shift)
    y: Tensor
    if native.takes(x, scale, shift):
        y = CalibrateNative.apply(x, vision_mask, scale, shift)  # type: ignore[no-untyped-call]
        return y
    if not on_triton(x):
        return reference(x, vision_mask, scale, shift)

    from fastalign_kernels.calibrate import DTYPES

    check_one_of("the dtype of x on CUDA", x.dtype, DTYPES)
    check_one_of("the dtype of scale on CUDA", scale.dtype, DTYPES)
    y = Calibrate.apply(x, vision_mask, scale, shift)  # type: ignore[no-untyped-call]
    return y
