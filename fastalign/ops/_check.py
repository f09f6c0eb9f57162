"""Argument checks shared by the ops and the losses.

Each raises before any arithmetic and says which argument broke which rule, what came, and the way
out. None reads a tensor's values on a GPU: a check never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

_ATTRIBUTES: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda t: tuple(t.shape),
    "dtype": lambda t: t.dtype,
    "device": lambda t: t.device,
}


def check_same(*attributes: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share the attributes with the first one.

    Args:
        attributes: Any of "shape", "dtype", "device"; all three when none is named.
        tensors: The tensors by the name the caller knows them by.
    """
    (first_name, first), *others = tensors.items()
    for attribute in attributes or tuple(_ATTRIBUTES):
        read = _ATTRIBUTES[attribute]
        for name, tensor in others:
            if read(tensor) != read(first):
                raise ValueError(
                    f"{name} must have the {attribute} of {first_name}: "
                    f"got {read(tensor)} and {read(first)}"
                )


def check_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {choices}: got {value!r}")


def check_floating(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is one, and of a floating-point dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must have a floating-point dtype: got {tensor.dtype}; "
                f"convert it with {name}.float()"
            )


def check_integer(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is one, of int32 or int64."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64: got {tensor.dtype}")


def check_dim(name: str, tensor: Tensor, *dims: int) -> None:
    """Raise ValueError unless `tensor` has one of these numbers of dimensions."""
    if tensor.dim() not in dims:
        rule = " or ".join(str(dim) for dim in dims)
        raise ValueError(
            f"{name} must have {rule} dimension(s): got {tensor.dim()}, shape {tuple(tensor.shape)}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], rule: str) -> None:
    """Raise ValueError unless `tensor` has this shape; `rule` spells it, for example "(t,)"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {rule} = {shape}: got {tuple(tensor.shape)}")


def check_last_dim(name: str, tensor: Tensor, size: int) -> None:
    """Raise ValueError unless the last dimension of `tensor` has this size."""
    if tensor.dim() == 0 or tensor.shape[-1] != size:
        raise ValueError(
            f"{name} must have a last dimension of {size}: got shape {tuple(tensor.shape)}"
        )


def check_width(**tensors: Tensor) -> None:
    """Raise ValueError unless the rows of every tensor have at least one entry."""
    for name, tensor in tensors.items():
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name} must have a width of at least 1: got {tuple(tensor.shape)}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless the number `value` is above zero; NaN is not."""
    if not value > 0:
        raise ValueError(f"{name} must be above 0: got {value!r}")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, rows: str) -> None:
    """Check the offsets of packed sequences: (b + 1,) integers, b >= 0.

    Their values (0 first, never falling, `total` last) are read on CPU only, where that costs no
    synchronisation, and not while torch.compile traces.

    Args:
        cu_seqlens: The offsets.
        total: Number of packed rows.
        rows: What a row belongs to, for the message, for example "student".
    """
    check_integer(cu_seqlens=cu_seqlens)
    check_dim("cu_seqlens", cu_seqlens, 1)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens must hold b + 1 offsets, the first of them 0: got none")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    falls = any(last > first for last, first in zip(offsets, offsets[1:], strict=False))
    if offsets[0] != 0 or offsets[-1] != total or falls:
        raise ValueError(
            f"cu_seqlens must rise from 0 to {total}, the number of rows of {rows}: got {offsets}"
        )
