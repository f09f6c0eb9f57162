"""The trace of the root on a CPU: LAPACK through scipy, which is faster at it than torch.

    a = L L^T;   C = L^T b L;   Tr((a b)^(1/2)) = sum of the roots of C's eigenvalues

in float64. Roots of eigenvalues have half the digits of the largest: 1e-8, below what float32
input leaves.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SMALL = 64  # rows from which on a decomposition costs more than calling it
_EPS = np.finfo(np.float64).eps


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("scipy") is not None


def usable(a: Tensor) -> bool:
    """Whether `trace_root` serves: float64 needs more digits, and small matrices one call."""
    plain = a.device.type == "cpu" and not torch.compiler.is_compiling()
    return plain and a.dtype != torch.float64 and a.shape[-1] >= _SMALL and _installed()


def trace_root(a: Tensor, b: Tensor) -> Tensor | None:
    """Tr((a b)^(1/2)), (..., d, d) -> (...) float64; None where a matrix is singular to rounding.

    About a fifth of the time goes into finding that out of `b`, too.
    """
    pairs = [m.detach().reshape(-1, *m.shape[-2:]) for m in (a, b)]
    traces = []
    for first, second in zip(*pairs, strict=True):
        trace = _trace_root(_fortran(first), _fortran(second))
        if trace is None:
            return None
        traces.append(trace)
    return torch.tensor(traces, dtype=torch.float64).reshape(a.shape[:-2])


def _fortran(a: Tensor) -> Any:
    """The symmetric part in float64, columns first: a new array."""
    wide = a.double().numpy()
    return ((wide + wide.T) / 2).T


def _trace_root(a: Any, b: Any) -> float | None:
    from scipy.linalg import eigvalsh, lapack

    factor = _cholesky(lapack, a, clean=1, overwrite_a=1)
    if factor is None or _cholesky(lapack, b, clean=0, overwrite_a=0) is None:
        return None
    inner, _ = lapack.dsygst(b, factor, itype=2, lower=1, overwrite_a=1)
    values = eigvalsh(inner, lower=True, overwrite_a=True, check_finite=False, driver="evr")
    return float(np.sqrt(np.clip(values, 0, None)).sum())


def _cholesky(lapack: Any, a: Any, **options: int) -> Any:
    """Lower factor, or None where a pivot is zero to rounding or not a number."""
    variance = a.diagonal().copy()
    factor, info = lapack.dpotrf(a, lower=1, **options)
    full = info == 0 and (factor.diagonal() ** 2 > 16 * len(a) * _EPS * variance).all()
    return factor if full else None
