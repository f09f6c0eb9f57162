r"""Newton-Schulz iteration for the polar factor, with minimax coefficients of fifth degree.

Each step maps every singular value x of X to p(x) = a x + b x^3 + c x^5, products only:

    A = X^T X;   P = b A + c A^2;   X <- a X + X P

On the interval that holds the singular values, p is the odd quintic nearest to 1 in the maximum
norm; its error bounds the interval of the next step (Amsel et al. 2025, "The Polar Express").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Quintic = tuple[float, float, float]

# 12 repeats take the certificate below 1e-6 at any width; more would only chase rounding.
_MAX_REPEATS = 12


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


class Storage(NamedTuple):
    """How the matrices are kept between products; the products themselves sum in float32 or wider.

    Args:
        dtype: Of X, A and P.
        x: Power of two that X is kept times.
        a: Power of two that A and P are kept times.
        inflation: Of the intervals, for the rounding of this dtype: see `quintic_schedule`.
    """

    dtype: torch.dtype
    x: float = 1.0
    a: float = 1.0
    inflation: float = 0.004

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which the products sum."""
        return torch.promote_types(self.dtype, torch.float32)

    def keep(self, x: Tensor, scale: float) -> Tensor:
        return (x * scale).to(self.dtype)


# The scales put entries of 1e-8 to 8 (X) and of 6e-8 to 64 (A, P) within float16.
STORAGE = {
    torch.float16: Storage(torch.float16, x=8192.0, a=1024.0),
    torch.bfloat16: Storage(torch.bfloat16, inflation=0.03),
    torch.float32: Storage(torch.float32),
    torch.float64: Storage(torch.float64),
}


def gram(
    x: Tensor,
    y: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha x^T x + beta y, (..., n, d) -> (..., d, d), summed in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    product = alpha * (wide.mT @ wide)
    if y is not None:
        product = product + beta * y
    return product.to(out_dtype or x.dtype)


def matmul(
    x: Tensor,
    p: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """alpha x p + beta x, (..., n, d), (..., d, d) -> (..., n, d), summed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    product = alpha * (x.to(wide) @ p.to(wide))
    if beta:
        product = product + beta * x
    return product.to(out_dtype or x.dtype)


class Products(NamedTuple):
    """The two products that everything below is made of; kernels have the same arguments."""

    gram: Callable[..., Tensor] = gram
    matmul: Callable[..., Tensor] = matmul


PRODUCTS = Products()


def split_product(f: Tensor, g: Tensor, storage: Storage, products: Products = PRODUCTS) -> Tensor:
    """f^T g, (..., d, r), (..., d, s) -> (..., r, s) in the wide dtype, to nearly its accuracy.

    In half precision each factor is the sum of a rounded part and a rest 2^11 times smaller, of
    which three products count; both parts are kept near 1 by powers of two.
    """
    f, g = f.to(storage.wide).mT, g.to(storage.wide)
    if storage.dtype == storage.wide:
        return products.matmul(f, g)
    rest = 2.0**11
    parts, units = [], []
    for factor in (f, g):
        largest = factor.abs().amax((-2, -1), keepdim=True)
        unit = torch.exp2(largest.clamp_min(torch.finfo(factor.dtype).tiny).log2().floor() - 6)
        high = storage.keep(factor / unit, 1.0)
        parts.append((high, storage.keep(factor / unit - high, rest)))
        units.append(unit)
    (f_high, f_low), (g_high, g_low) = parts
    wide = {"out_dtype": storage.wide}
    product = products.matmul(f_high, g_low, **wide) + products.matmul(f_low, g_high, **wide)
    product = product / rest + products.matmul(f_high, g_high, **wide)
    return product * units[0] * units[1]


def newton_schulz(
    m: Tensor,
    schedule: tuple[Quintic, ...],
    storage: Storage = STORAGE[torch.float32],
    products: Products = PRODUCTS,
) -> tuple[Tensor, Tensor]:
    """Polar factor of m to the accuracy of the schedule, and the scale m was divided by.

    Args:
        m: (..., n, d) with n >= d, float32 or float64.
        schedule: Coefficients, one triple a step.
        storage: Dtype and scales of what is kept between products.
        products: Where the products are computed.

    Returns:
        storage.x * X, (..., n, d), in the dtype of the storage, and the scale (..., 1, 1), an upper
        bound of |m|_2 in the dtype of m; 0 for a zero matrix, whose X is 0.
    """
    tiny = torch.finfo(m.dtype).tiny
    gram, matmul = products
    # The largest entry comes first, so that no square of the norm leaves the range; for a zero
    # matrix each divisor has the least value it has for others, or less.
    largest = m.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    unit = m / largest
    norm = torch.linalg.matrix_norm(unit, keepdim=True).clamp_min(1)
    x = storage.keep(unit / norm, storage.x)
    a1 = gram(x, alpha=storage.x**-2, out_dtype=storage.wide)
    a2 = gram(storage.keep(a1, storage.a), alpha=storage.a**-2, out_dtype=storage.wide)
    bound = ((1 + storage.inflation) * torch.linalg.matrix_norm(a2, keepdim=True).sqrt().sqrt()).to(
        m.dtype
    )
    safe = bound.clamp_min(1e-6)
    x = storage.keep(unit / (norm * safe), storage.x)
    for step, (a, b, c) in enumerate(schedule):
        if step:
            kept = gram(x, alpha=storage.a / storage.x**2)
            p = gram(kept, kept, alpha=c / storage.a, beta=b)
        else:  # the norm's products serve the first step
            wide = safe.to(storage.wide)
            p = storage.keep(b / wide**2 * a1 + c / wide**4 * a2, storage.a)
        x = matmul(x, p, alpha=1 / storage.a, beta=a)
    return x, largest * norm * bound


def _deviation(x: Tensor, storage: Storage, products: Products) -> tuple[Tensor, Tensor]:
    """storage.a D with D = X^T X - I, formed in the wide dtype, and |X|_F^2 in float64."""
    a = products.gram(x, alpha=storage.x**-2, out_dtype=storage.wide)
    square_norm = a.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return storage.keep(a - eye, storage.a), square_norm


def corrected_trace(
    x: Tensor,
    m: Tensor,
    storage: Storage = STORAGE[torch.float32],
    products: Products = PRODUCTS,
) -> tuple[Tensor, Tensor]:
    """<X, M> - <X D, M> / 2 with D = X^T X - I, and |X|_F^2; both (...) float64.

    <X, M> alone errs in first order where the singular values of X are not 1. One Newton-Schulz
    step on X, of which only the trace is formed, leaves the second order; the result is never
    above the nuclear norm of M while |X|_2 <= 2.
    """
    d, square_norm = _deviation(x, storage, products)
    xd = products.matmul(x, d, alpha=1 / storage.a)
    wide = torch.promote_types(storage.wide, m.dtype)
    corrected = (x.to(wide) - xd.to(wide) / 2) * m
    return corrected.sum((-2, -1), dtype=torch.float64) / storage.x, square_norm


def refined_factor(
    x: Tensor, storage: Storage = STORAGE[torch.float32], products: Products = PRODUCTS
) -> Tensor:
    """X (I - D / 2 + 3 D^2 / 8), wide: an error e of a singular value of X becomes one of e^3."""
    d, _ = _deviation(x, storage, products)
    xd = products.matmul(x, d, alpha=1 / storage.a)
    xdd = products.matmul(xd, d, alpha=1 / storage.a)
    x, xd, xdd = (t.to(storage.wide) for t in (x, xd, xdd))
    return (x - xd / 2 + 0.375 * xdd) / storage.x


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


class NuclearNorm(NamedTuple):
    """What `nuclear_norm` finds.

    Args:
        value: Nuclear norm, (...) float64, never above the true one but for rounding.
        bound: What it may lack, (...) float64, apart from rounding.
        x: The stored iterate, storage.x * X, (..., n, d) with n >= d.
    """

    value: Tensor
    bound: Tensor
    x: Tensor


def nuclear_norm(
    m: Tensor,
    storage: Storage = STORAGE[torch.float32],
    products: Products = PRODUCTS,
    rtol: float = 1e-5,
) -> NuclearNorm:
    """Nuclear norm of (..., n, d), n >= d; once more, with more steps, while it may lack rtol.

    One number is read back from the device each time.
    """
    repeats = 0
    while True:
        schedule = quintic_schedule(repeats=repeats, inflation=storage.inflation)
        x, scale = newton_schulz(m, schedule, storage, products)
        value, square_norm = corrected_trace(x, m, storage, products)
        bound = trace_certificate(schedule, scale.double(), square_norm, m.shape[-1])
        ratio = (bound / (rtol * value)).nan_to_num(0.0)
        excess = float(ratio.max()) if ratio.numel() else 0.0
        if excess <= 1 or repeats == _MAX_REPEATS:
            return NuclearNorm(value, bound, x)
        # One repeat divides what is lacking by about 4.
        repeats = min(_MAX_REPEATS, repeats + max(1, math.ceil(math.log(excess, 4))))
