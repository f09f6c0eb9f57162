"""scikit-learn, where it is needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def sklearn(module: str) -> Any:
    """A module of scikit-learn.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            'this diagnostic needs scikit-learn: pip install "fastalign[diagnostics]"'
        ) from error
