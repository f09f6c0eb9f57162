"""The objectives inside other training loops.

`transformers` holds `AlignmentTrainer` and the mixin behind it, `trl` its supervised fine-tuning
trainer. Each module needs the library that it is named after; this package needs neither.
"""

import importlib
from typing import Any

_LAZY = ("transformers", "trl")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fastalign.integrations.{name}")
    raise AttributeError(f"module 'fastalign.integrations' has no attribute {name!r}")
