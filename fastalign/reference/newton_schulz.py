r"""Newton-Schulz iteration for the polar factor, with minimax coefficients of fifth degree.

Each step maps every singular value x of X to p(x) = a x + b x^3 + c x^5, products only:

    A = X^T X;   X <- a X + X (b A + c A^2)

On the interval that holds the singular values, p is the odd quintic nearest to 1 in the maximum
norm; its error bounds the interval of the next step (Amsel et al. 2025, "The Polar Express").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

Quintic = tuple[float, float, float]

# With |A^2|_F^(1/4) as the bound of |X|_2, this much room for the rounding of A in half precision.
_HEADROOM = 1.004


def minimax_quintic(lower: float, upper: float) -> tuple[Quintic, float]:
    """(a, b, c) of the odd quintic nearest to 1 on [lower, upper], and its largest error.

    Remez exchange: four points at which the error alternates give a linear system, and the
    extrema of its solution, roots of a quadratic in x^2, are the next points.
    """
    points = [lower + (upper - lower) * (1 - math.cos(math.pi * j / 3)) / 2 for j in range(4)]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    a = b = c = error = 0.0
    for _ in range(50):
        x = torch.tensor(points, dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        moved = max(abs(inner[0] - points[1]), abs(inner[1] - points[2]))
        points[1:3] = inner
        if moved < 1e-14 * upper:
            break
    return (a, b, c), abs(error)


@lru_cache(maxsize=32)
def quintic_schedule(
    steps: int = 12,
    *,
    repeats: int = 0,
    lower: float = 1e-6,
    cushion: float = 0.024,
    inflation: float = 0.004,
) -> tuple[Quintic, ...]:
    """Coefficients of each step for singular values in [lower, 1].

    Args:
        steps: Number of steps before `repeats`.
        repeats: How often the second step, the steepest stable one, is run once more: each run
            divides the singular value from which on all is converged by about 4.
        lower: Least singular value that `steps` alone bring to 1.
        cushion: Least ratio of the ends of an interval that is fitted; smaller singular values
            grow more slowly, in exchange for coefficients that low precision survives.
        inflation: Relative growth of the upper end before each step, for rounding: 0.004 covers
            float16 and everything wider.
    """
    schedule: list[Quintic] = []
    upper = 1.0
    for _ in range(steps):
        upper *= 1 + inflation
        (a, b, c), error = minimax_quintic(max(lower, cushion * upper), upper)
        schedule.append((a, b, c))
        lower = min(a * lower + b * lower**3 + c * lower**5, 1 - error)
        upper = 1 + error
    return (*schedule[:1], *schedule[1:2] * repeats, *schedule[1:])


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x


def newton_schulz(
    m: Tensor,
    schedule: tuple[Quintic, ...],
    *,
    gram: Callable[[Tensor], Tensor] = _gram,
    matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
) -> tuple[Tensor, Tensor]:
    """Polar factor of m to the accuracy of the schedule, and the scale m was divided by.

    Args:
        m: (..., n, d) with n >= d, in the dtype of the iteration.
        schedule: Coefficients, one triple a step.
        gram: x -> x^T x, the symmetric product.
        matmul: The other product.

    Returns:
        X, (..., n, d), and the scale (..., 1, 1), an upper bound of |m|_2; 0 for a zero matrix,
        whose X is 0.
    """
    tiny = torch.finfo(m.dtype).tiny
    norm = torch.linalg.matrix_norm(m, keepdim=True)
    x = m / norm.clamp_min(tiny)
    a1 = gram(x)
    a2 = gram(a1)
    bound = _HEADROOM * torch.linalg.matrix_norm(a2, keepdim=True).sqrt().sqrt()
    safe = bound.clamp_min(tiny**0.25)
    x, a1, a2 = x / safe, a1 / safe**2, a2 / safe**4
    for step, (a, b, c) in enumerate(schedule):
        if step:
            a1 = gram(x)
            a2 = gram(a1)
        x = a * x + matmul(x, b * a1 + c * a2)
    return x, norm * bound


def corrected_trace(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """<X, M> - <X D, M> / 2 with D = X^T X - I, and |X|_F^2; both (...).

    <X, M> alone errs in first order where the singular values of X are not 1. One Newton-Schulz
    step on X, of which only the trace is formed, leaves the second order; the result is never
    above the nuclear norm of M while |X|_2 <= 2.
    """
    a = _gram(x)
    square_norm = a.diagonal(dim1=-2, dim2=-1).sum(-1)
    d = a - torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return ((x - x @ d / 2) * m).sum((-2, -1)), square_norm


def trace_certificate(
    schedule: tuple[Quintic, ...], scale: Tensor, square_norm: Tensor, dim: int
) -> Tensor:
    """Upper bound of |M|_* - `corrected_trace`, (...), from what the iteration leaves behind.

    A singular value x of M / scale that the steps did not bring to 1 has grown by at most the
    product of the slopes a, so it cannot be large; d - |X|_F^2 says how many there are. The
    constant 0.225 bounds x (1 - z) prod(a) / (1 - y^2) over all x, where y is the value after
    the steps and z = (3 y - y^3) / 2; 0.2 % of d is granted to rounding in |X|_F^2.
    """
    slope = math.prod(a for a, _, _ in schedule)
    missing = (1.002 * dim - square_norm).clamp_min(0)
    return 0.225 / slope * scale[..., 0, 0] * missing
