"""The objectives inside other training loops, and aligned models inside lmms-eval.

`transformers` holds `AlignmentTrainer` and the mixin behind it, `trl` its supervised fine-tuning
trainer, `lmms_eval` the model that serves a base with an adapter. Each module needs the library
that it is named after; this package needs none of them.
"""

import importlib
from typing import Any

_LAZY = ("lmms_eval", "transformers", "trl")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"fastalign.integrations.{name}")
    raise AttributeError(f"module 'fastalign.integrations' has no attribute {name!r}")
