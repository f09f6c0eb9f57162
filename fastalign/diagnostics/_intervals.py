"""Confidence intervals at 95 %."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVEL = 0.95


def ratio_interval(values: Tensor, counts: Tensor) -> tuple[float, tuple[float, float]]:
    r"""Mean per token over units of unequal length, $\sum_i x_i / \sum_i n_i$, and its interval.

    Units (windows, samples) count as drawn independently: the error is that of a ratio estimator,
    $\sqrt{m / (m - 1) \sum_i (x_i - r n_i)^2} / \sum_i n_i$, with Student's t of m - 1 degrees.

    Args:
        values: Sums of each unit, (m,).
        counts: Tokens of each unit, (m,), with a positive sum.

    Returns:
        The ratio, and its interval, of NaN where there is one unit.

    Raises:
        ImportError: SciPy is not installed.
    """
    x, n = values.double().cpu(), counts.double().cpu()
    ratio = float(x.sum() / n.sum())
    m = len(x)
    if m < 2:
        return ratio, (math.nan, math.nan)
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('intervals need SciPy: pip install "fastalign[hf]"') from error
    spread = float((x - ratio * n).square().sum() * m / (m - 1)) ** 0.5 / float(n.sum())
    half = float(stats.t.ppf((1 + LEVEL) / 2, m - 1)) * spread
    return ratio, (ratio - half, ratio + half)


def wilson_interval(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's interval of a share of independent trials, within [0, 1]."""
    z = float(torch.special.ndtri(torch.tensor((1 + LEVEL) / 2, dtype=torch.float64)))
    share = hits / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (middle - half) / scale, (middle + half) / scale
