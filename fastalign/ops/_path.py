"""Which kernels a tensor meets."""

import importlib.util

from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed; it has no build for some machines that have a GPU."""


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels run on `x`; else it is the compiled ones or torch operations."""
    return x.is_cuda and TRITON
