"""Derive the coefficients of the Newton-Schulz iteration, and show what they do to an interval.

    python -m benchmarks.quintics [--steps K] [--lower L] [--inflation I]

Each line is one step: a, b and c of x <- a x + b x^3 + c x^5, fitted by Remez exchange, and the
interval that holds the singular values after it, all of them having begun in [L, 1].
"""

import argparse

from fastalign.reference.newton_schulz import Quintic, quintic_schedule


def intervals(schedule: tuple[Quintic, ...], lower: float) -> list[tuple[float, float]]:
    """Least and largest image of [lower, 1] after each step, in exact arithmetic.

    An end of the image is that of an end of the interval or of a stationary point in it.
    """
    upper, found = 1.0, []
    for a, b, c in schedule:
        root = (9 * b * b - 20 * a * c) ** 0.5
        inner = (((-3 * b + sign * root) / (10 * c)) ** 0.5 for sign in (-1, 1))
        points = [lower, upper, *(x for x in inner if lower < x < upper)]
        images = [a * x + b * x**3 + c * x**5 for x in points]
        lower, upper = min(images), max(images)
        found.append((lower, upper))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quintics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lower", type=float, default=1e-6, help="least singular value")
    parser.add_argument(
        "--inflation", type=float, default=0.004, help="for rounding; 0.03 serves bfloat16"
    )
    options = parser.parse_args(argv)
    schedule = quintic_schedule(options.steps, lower=options.lower, inflation=options.inflation)
    print(f"{'step':>4} {'a':>13} {'b':>14} {'c':>13} {'least':>12} {'largest':>12}")
    ends = intervals(schedule, options.lower)
    for step, ((a, b, c), (low, high)) in enumerate(zip(schedule, ends, strict=True), 1):
        print(f"{step:4d} {a:13.9f} {b:14.9f} {c:13.9f} {low:12.9f} {high:12.9f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
