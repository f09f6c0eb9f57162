"""What the functions of linalg share: checks, the choice of the method, transforms, products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_floating, check_one_of
from fastalign.ops.syrk import syrk
from fastalign.reference import newton_schulz as ns

Method = Literal["auto", "newton_schulz", "eigh"]
METHODS = ("auto", "newton_schulz", "eigh")


class Certified(NamedTuple):
    """A value and what it may lack.

    Args:
        value: (...).
        bound: Upper bound of the exact value minus `value`, (...), apart from rounding and from
            what is added to singular matrices: what the iteration left out. 0 for decompositions.
    """

    value: Tensor
    bound: Tensor


def check_square(**matrices: Tensor) -> None:
    check_floating(**matrices)
    for name, matrix in matrices.items():
        if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
            raise ValueError(
                f"{name} must be square matrices (..., d, d) with d >= 1: "
                f"got shape {tuple(matrix.shape)}"
            )


def iterates(method: str, x: Tensor) -> bool:
    """Whether `method` means Newton-Schulz for `x`; the one place where "auto" is decided."""
    check_one_of("method", method, METHODS)
    if method == "auto":
        return x.is_cuda and x.dtype != torch.float64
    return method == "newton_schulz"


def wide_storage(x: Tensor) -> ns.Storage:
    """float32, or float64 for float64: what a matrix without order in it needs for 1e-5.

    In float16 the trace of rows with a few massive dimensions errs by 5e-4.
    """
    return ns.STORAGE[torch.promote_types(x.dtype, torch.float32)]


def graded_storage(x: Tensor) -> ns.Storage:
    """float16 where it is fast: enough for the trace of triangular factors in falling order."""
    return ns.STORAGE[torch.float16] if x.is_cuda and x.dtype != torch.float64 else wide_storage(x)


def factor_storage(x: Tensor) -> ns.Storage:
    """A factor is as accurate as what is stored: float16 for 16-bit input, where it is fast."""
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    return ns.STORAGE[torch.float16] if x.is_cuda and narrow else wide_storage(x)


def _baddbmm(
    x: Tensor,
    p: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha x p + beta x by cuBLAS, which sums float16 in float32."""
    shape = (*x.shape[:-1], p.shape[-1])
    x, p = x.reshape(-1, *x.shape[-2:]), p.reshape(-1, *p.shape[-2:])
    if out_dtype not in (None, x.dtype):
        # The narrow products with a wide result serve alpha = 1, beta = 0 only.
        product = torch.bmm(x, p, out_dtype=out_dtype)
    elif beta:
        product = torch.baddbmm(x, x, p, beta=beta, alpha=alpha)
    else:
        product = torch.bmm(x, p).mul_(alpha)
    return product.reshape(shape)


def products(x: Tensor) -> ns.Products:
    """The products of the iteration for the device of `x`."""
    return ns.Products(syrk, _baddbmm if x.is_cuda else ns.matmul)


class Batched(torch.autograd.Function):
    """A function of matrices whose batch, and so vmap's too, is the leading dimensions.

    Its `forward` gets plain tensors under every transform, and may read their values.
    """

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        moved = [
            argument
            if not isinstance(argument, Tensor)
            else argument.expand(info.batch_size, *argument.shape)
            if dim is None
            else argument.movedim(dim, 0)
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        output = cls.apply(*moved)  # type: ignore[no-untyped-call]
        return output, 0 if isinstance(output, Tensor) else (0,) * len(output)


class _Gradient(Batched):
    @staticmethod
    def forward(operator: Callable[..., Any], *arguments: Any) -> Any:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        with no_autocast(tensors[0]):
            return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(
            "gradients of fastalign.linalg can be taken once: for second derivatives use the "
            "function of the same name in fastalign.reference.psd"
        )


def gradient(operator: Callable[..., Any], *arguments: Any) -> Any:
    """`operator(*arguments)` in a backward pass, refusing to be differentiated again."""
    if torch.compiler.is_compiling():  # refuses second derivatives by itself
        return operator(*arguments)
    return _Gradient.apply(operator, *arguments)  # type: ignore[no-untyped-call]


def tall(m: Tensor) -> Tensor:
    """m, or its transpose where that has more rows."""
    return m if m.shape[-2] >= m.shape[-1] else m.mT
