"""Double precision that is double throughout.

The RMSNorms and rotary embeddings of transformers cast to float32 even in a float64 model. What
follows is then exact in float32, so that two different computations round to the same number and
compare equal. `true_float64` turns every such cast into float64, without touching a class.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _NoFloat32(TorchFunctionMode):
    """`float32` in the arguments of any torch function, and `Tensor.float()`, mean float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        return func(*map(_widened, args), **{k: _widened(v) for k, v in (kwargs or {}).items()})


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def true_float64() -> Iterator[None]:
    """Inside, nothing is rounded to float32: for models and batches in float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32():
            yield
    finally:
        torch.set_default_dtype(default)


class Narrow(TorchDispatchMode):
    """Names the operators whose results are floating point but not float64."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if (
                isinstance(leaf, Tensor)
                and leaf.is_floating_point()
                and leaf.dtype != torch.float64
            ):
                self.operators.add(str(func))
        return out
