"""The CUDA kernels of csrc on the CPU, where csrc/cuda/emulate.sh has compiled them for it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops.hadamard_reweight import HadamardReweight, _backward

BUILT = Path(__file__).parents[1] / "csrc/cuda/emulated.so"
LIBRARY = Path(os.environ.get("EMULATED_KERNELS", BUILT))  # csrc/sanitize.sh has another
OPERATORS = ("hadamard_reweight_fwd", "hadamard_reweight_bwd", "inverse_norms")

UNUSABLE: str | None = None
if native.OBSTACLE is not None:
    UNUSABLE = f"the compiled kernels are not in use: {native.OBSTACLE}"
elif not LIBRARY.is_file():
    UNUSABLE = "csrc/cuda/emulate.sh was not run"
else:
    torch.ops.load_library(str(LIBRARY))

emulated = pytest.mark.skipif(UNUSABLE is not None, reason=str(UNUSABLE))

kernels = SimpleNamespace(
    **{name: native.register(name, "emulated") for name in OPERATORS if UNUSABLE is None}
)
"""The operators by their names; empty where they are not there."""


class HadamardReweightEmulated(HadamardReweight):
    """As `HadamardReweightNative` on CUDA."""

    @staticmethod
    def forward(h: Tensor, w: Tensor) -> Tensor:
        y: Tensor = kernels.hadamard_reweight_fwd(h, w)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return _backward(ctx, dy, kernels.hadamard_reweight_bwd)
