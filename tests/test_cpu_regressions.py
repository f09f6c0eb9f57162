"""Each op on the CPU, value with gradients: a smoke test, and a timing to compare with an earlier.

    pytest tests/test_cpu_regressions.py --benchmark-enable --benchmark-autosave
    pytest tests/test_cpu_regressions.py --benchmark-enable --benchmark-compare

Without the option each runs once. Memory and error are the same every time, so they are held to
those of plain torch; times are not.
"""

import importlib
from pathlib import Path

import pytest
import torch

from fastalign.testing import cases

ROOT = Path(__file__).parents[1]
OPS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\nBENCHMARK = " in path.read_text()
)


@pytest.fixture(params=OPS)
def op(request, harness):
    """The benchmark of an op and the inputs of its quick case."""
    (case,) = cases(request.param, bench=True, quick=True)
    return importlib.import_module(f"benchmarks.{request.param}").BENCHMARK, case.inputs("cpu")


def test_time(op, harness, benchmark):
    described, inputs = op
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN takes time
    step = harness._step(described.fastalign, inputs, described.differentiate)
    results = benchmark(step)
    leaves = harness._leaves(harness._arguments(inputs, described.differentiate))
    wanted = leaves or [described.eager(*inputs)]  # of an op that gives constants, the value
    assert [(x.shape, x.dtype) for x in results] == [(x.shape, x.dtype) for x in wanted]
    assert all(x.isfinite().all() and x.any() for x in results)


def test_memory_and_error_are_at_most_those_of_plain_torch(op, harness):
    described, inputs = op
    functions = {"fastalign": described.fastalign, "eager": described.eager}
    peaks = {}
    for name, fn in functions.items():
        step = harness._step(fn, inputs, described.differentiate)
        peaks[name] = harness._peak_mib(step, "cpu")
    assert 0 < peaks["fastalign"] <= 1.01 * peaks["eager"]
    errors = harness._errors(described, functions, inputs)
    assert errors["fastalign"] <= 1.1 * errors["eager"] + 2 * torch.finfo(torch.float32).eps
