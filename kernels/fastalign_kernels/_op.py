"""Launchers become `torch.ops.fastalign.<name>`: one opaque node each for torch.compile."""

# mypy: allow-untyped-calls

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# FRAGMENT: the compiled extension adds operators to the same namespace.
_LIBRARY = torch.library.Library("fastalign", "FRAGMENT")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels read and write; they compute in float32."""


def op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a launcher the operator `torch.ops.fastalign.<its name>`.

    `define` and `impl` cost about a quarter of the call overhead of `torch.library.custom_op`. The
    operator itself has no gradient: an autograd.Function calls it, which is why Autograd falls
    through. Under vmap it runs once for each element of the batch.

    Args:
        schema: Arguments and returns, `"(Tensor x, float eps) -> Tensor"`; the first argument is a
            tensor, and no output aliases an input.
        fake: The same arguments to empty outputs of the right shape, dtype and strides.

    Returns:
        A decorator that gives back the registered operator.
    """

    def register(launch: Callable[..., Any]) -> Callable[..., Any]:
        name = launch.__name__
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _on_device_of_first(launch), "CUDA")
        _LIBRARY.impl(name, launch, "CPU")  # Triton's interpreter
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"fastalign::{name}", fake, lib=_LIBRARY)
        operator: Callable[..., Any] = getattr(torch.ops.fastalign, name).default
        torch.library.register_vmap(f"fastalign::{name}", one_by_one(operator), lib=_LIBRARY)
        return operator

    return register


def _on_device_of_first(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` with its first argument's GPU current: Triton launches on the current one."""

    def guarded(first: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return launch(first, *rest)

    return guarded


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The vmap rule that calls `operator` for each element and stacks what it returns."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        outputs = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, i)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = tuple(torch.stack(output) for output in zip(*outputs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
