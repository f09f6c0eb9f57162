"""Gradients that are not differentiable themselves, and say so."""

from typing import Any

import torch


def once(operator: Any, *arguments: Any) -> Any:
    """`operator(*arguments)` in a backward pass, refusing to be differentiated again.

    torch's `once_differentiable` does that for autograd only: torch.func.grad of torch.func.grad
    would get zeros.
    """
    if torch.compiler.is_compiling():  # refuses second derivatives by itself
        return operator(*arguments)
    return _Once.apply(operator, *arguments)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "gradients of fastalign's fused ops are once_differentiable: for second derivatives "
            "use the function of the same name in fastalign.reference"
        )
