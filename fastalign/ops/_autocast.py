"""Arithmetic in the dtype that the code names, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from turning float32 products on the device of `x` into bfloat16."""
    if not _available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


@torch.compiler.assume_constant_result  # type: ignore[no-untyped-call,untyped-decorator]
def _available(device_type: str) -> bool:
    """A function of its own, as torch.compile of torch 2.10 cannot trace what it asks."""
    return torch.amp.is_autocast_available(device_type)
