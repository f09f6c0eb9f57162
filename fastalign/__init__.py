"""Vision-language model alignment: DeepAlign, CAL, MIR and MoCa over fused kernels.

Importing it costs little beyond torch and needs neither triton, a GPU nor transformers: kernels are
loaded on CUDA alone, and the modules that need more than torch on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastalign import linalg, losses, nn, objectives, ops
from fastalign.adapters import AdapterConfig, attach, detach, load_adapter, save_adapter
from fastalign.models import VLM
from fastalign.train import TrainConfig, train

if TYPE_CHECKING:
    from fastalign import data, demo, diagnostics, metrics

__version__ = "0.1.0"
__all__ = [
    "VLM",
    "AdapterConfig",
    "TrainConfig",
    "attach",
    "data",
    "demo",
    "detach",
    "diagnostics",
    "integrations",
    "linalg",
    "load_adapter",
    "losses",
    "metrics",
    "nn",
    "objectives",
    "ops",
    "save_adapter",
    "train",
]
_LAZY = frozenset({"data", "demo", "diagnostics", "integrations", "metrics"})


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fastalign.{name}")
    raise AttributeError(f"module 'fastalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
