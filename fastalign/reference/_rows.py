"""Pieces that several references need: the arithmetic's dtype, unit rows, reductions."""

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dtype: float32, or float64 when any of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def unit(x: Tensor) -> Tensor:
    """x / |x| for each row of (..., d); a zero row stays zero and has gradient zero.

    Dividing by the largest entry first keeps the squares from over- or underflowing. It is a
    constant to autograd, exactly so, because x / |x| does not depend on the scale of x.
    """
    scale = torch.linalg.vector_norm(x.detach(), float("inf"), dim=-1, keepdim=True)
    zero = scale == 0
    x = x / scale.masked_fill(zero, 1.0)
    rnorm = x.square().sum(-1, keepdim=True).masked_fill(zero, 1.0).rsqrt()
    return x * rnorm.masked_fill(zero, 0.0)


def reduce(values: Tensor, reduction: str, count: int) -> Tensor:
    """Reduction "none", "sum" or "mean"; the mean is over `count` values, 0 when there is none."""
    if reduction == "none":
        return values
    total = values.sum()
    return total if reduction == "sum" else total / max(count, 1)
