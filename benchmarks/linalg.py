"""The trace of the root of a product of covariances, beside what others compute it with.

    python -m benchmarks.linalg [--json FILE] [--save] [--rounds N] [--dims D ...] [--quick]
    python -m benchmarks.linalg --accuracy [--dims D ...]

Two float32 covariances of 4 d rows of one power law each, which share part of their directions.
Rows are timed in turn, each from the covariances to the trace; the ratio is of its median to
fastalign's, and the error relative to singular values in float64.

- "scipy sqrtm": the accurate mode of MIR's released code, scipy.linalg.sqrtm of the product;
- "coupled, 5 steps": that of its fast mode, Y <- (Y + Z^-1 A) / 2 and Z <- (Z + Y^-1 A) / 2 from
  (A, I), which is a fixed point: what comes is A's own trace, not its root's;
- "torchmetrics": eigenvalues of the product, as in its FID, in float64; up to d = 1024 on a CPU.

With `--accuracy` nothing is timed: relative errors on spectra that are hard for a root, float16
products being emulated by rounding what is stored.
"""

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks._turns import Row, parser, run, time_rows
from fastalign import linalg
from fastalign.reference import newton_schulz as ns
from fastalign.reference import psd

OP, OURS = "trace_sqrtm_product", "fastalign"
DIMS, QUICK = (1024, 2048), (96,)
Trace = Callable[[Tensor, Tensor], float]


def covariances(d: int, device: str) -> tuple[Tensor, Tensor]:
    """Two (d, d) float32, of traces 4 and 1 as vision and text have in MIR's scale."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, d + 1).float().rsqrt()
    mixing = torch.randn(d, d, generator=generator) / d**0.5
    found = []
    for trace, share in ((4.0, 0.3), (1.0, 0.5)):
        rows = torch.randn(4 * d, d, generator=generator) * spread
        cov = (rows + share * rows @ mixing).double().T.cov()
        found.append((trace / cov.trace() * cov).float().to(device))
    return found[0], found[1]


def exact(a: Tensor, b: Tensor) -> float:
    """Singular values of the product of eigenvector factors, in float64."""
    found = (torch.linalg.eigh(m.double()) for m in (a, b))
    f, g = (q * w.clamp_min(0).sqrt() for w, q in found)
    return float(torch.linalg.svdvals(f.T @ g).sum())


def _public(a: Tensor, b: Tensor, method: Any = "auto") -> float:
    return float(linalg.trace_sqrtm_product(a, b, method=method))


def _scipy_sqrtm(a: Tensor, b: Tensor) -> float:
    import scipy.linalg

    return float(scipy.linalg.sqrtm((a @ b).numpy()).trace().real)


def _torchmetrics(a: Tensor, b: Tensor) -> float:
    from torchmetrics.image.fid import _compute_fid

    a, b = a.double(), b.double()
    mean = a.new_zeros(len(a))
    return float((a.trace() + b.trace() - _compute_fid(mean, a, mean, b)) / 2)


def _coupled(a: Tensor, b: Tensor) -> float:
    product = a @ b
    y, z = product, torch.eye(len(a), device=a.device)
    for _ in range(5):
        y = (y + torch.linalg.solve(z, product)) / 2
        z = (z + torch.linalg.solve(y, product)) / 2
    return float(y.trace())


def ways(d: int, device: str) -> dict[str, Trace]:
    """What is timed, by the name of its row."""
    found: dict[str, Trace] = {OURS: _public}
    cuda = device == "cuda"
    for method in ("newton_schulz", "eigh"):
        if method != ("newton_schulz" if cuda else "eigh"):  # the other is fastalign's own choice
            found[f"fastalign {method}"] = partial(_public, method=method)
    found["torch eigh, svdvals"] = exact
    if importlib.util.find_spec("scipy") and not cuda:
        found["scipy sqrtm"] = _scipy_sqrtm
    if importlib.util.find_spec("torchmetrics") and (cuda or d <= 1024):
        found["torchmetrics"] = _torchmetrics
    return found | {"coupled, 5 steps": _coupled}


def measure(d: int, device: str, rounds: int) -> list[Row]:
    """All rows of one width."""
    a, b = covariances(d, device)
    runs = {name: partial(way, a, b) for name, way in ways(d, device).items()}
    truth = exact(a, b)
    errors = {name: abs(run() / truth - 1) for name, run in runs.items()}
    case = f"d = {d}, float32"
    return time_rows(OP, case, runs, device, rounds, lambda name: OURS, peaks=False, errors=errors)


def spectra(d: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of covariances in float64, of independent directions, by the name of their row."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(d, dtype=torch.float64)

    def normal(n: int) -> Tensor:
        return torch.randn(n, d, generator=generator, dtype=torch.float64)

    def turned(values: Tensor) -> Tensor:
        q = torch.linalg.qr(normal(d))[0]
        return psd.symmetrize((q * values) @ q.T)

    def power(condition: float) -> Tensor:
        return (index + 1) ** (-torch.tensor(condition).log() / torch.tensor(d).log())

    few = torch.ones_like(index)
    few[[3, 17, 50, 90]] = torch.tensor([32.0, 18.0, 10.0, 7.0], dtype=torch.float64)
    found = {
        "Wishart, 2 d and 3 d rows": tuple(x.T @ x / len(x) for x in map(normal, (2 * d, 3 * d)))
    }
    for condition in (1e4, 1e6, 1e8, 1e10):
        found[f"power law, condition {condition:.0e}"] = tuple(
            turned(power(condition)) for _ in "ab"
        )
    exponential = (1e-8) ** (index / (d - 1))
    found["exponential, condition 1e+08"] = tuple(turned(exponential) for _ in "ab")
    found["power laws, 1e+08 and 1e+04"] = turned(power(1e8)), turned(power(1e4))
    large = (few.outer(few) * turned(power(1e4)) for _ in "ab")
    found["power law 1e+04, massive dimensions"] = tuple(large)
    third = power(1e4) * (index < d // 3)
    found["power law 1e+04, rank d / 3"] = tuple(turned(third) for _ in "ab")
    return found


def _in_float16(a: Tensor, b: Tensor) -> float:
    with patch("fastalign.linalg._trace.graded_storage", lambda x: ns.STORAGE[torch.float16]):
        return _public(a, b, "newton_schulz")


def print_accuracy(d: int) -> None:
    """Relative errors of the trace of float32 covariances, one line a spectrum."""
    found: dict[str, Trace] = {
        "eigh": partial(_public, method="eigh"),
        "float32": partial(_public, method="newton_schulz"),
        "float16": _in_float16,
    }
    if importlib.util.find_spec("scipy"):
        found["scipy"] = _scipy_sqrtm
    print(f"\nd = {d}" + " " * 32 + "".join(f"{name:>10}" for name in found))
    for name, (a, b) in spectra(d).items():
        truth = exact(a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the singular pair
            errors = [abs(way(a.float(), b.float()) / truth - 1) for way in found.values()]
        print(f"{name:38}" + "".join(f"{error:10.1e}" for error in errors), flush=True)


def main(argv: list[str] | None = None) -> int:
    options = parser("linalg", __doc__, 5)
    options.add_argument("--dims", type=int, nargs="+", default=DIMS, help="widths d")
    options.add_argument("--accuracy", action="store_true", help="errors on hard spectra, no times")
    chosen = options.parse_args(argv)
    if not chosen.accuracy:
        return run(chosen, chosen.dims, QUICK, measure)
    for d in QUICK if chosen.quick else chosen.dims:
        print_accuracy(d)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
