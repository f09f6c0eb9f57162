"""Arithmetic in the dtype that the code names, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked once: torch.compile of torch 2.10 cannot trace the question.
DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla"))
)


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Keep autocast from turning float32 products on the device of `x` into bfloat16."""
    if x.device.type not in DEVICES:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
