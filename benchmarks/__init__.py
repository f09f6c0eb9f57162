"""What a benchmark is, and how one case of it is timed.

`benchmarks/<op>.py` holds a `Benchmark` called BENCHMARK; `python -m benchmarks` runs them all.
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.testing import Case, cases, cotangent_like, relative_error, value_and_grads

Inputs = Sequence[Any]
Run = Callable[[], Any]

FIELDS = (
    "op",
    "case",
    "impl",
    "device",
    "median_us",
    "p10_us",
    "p90_us",
    "peak_mib",
    "bound_us",
    "max_error",
)


@dataclass(frozen=True)
class Benchmark:
    """One op: what is timed is the value and the gradient of every floating-point input.

    Args:
        op: Name of the op, also that of its cases.
        fastalign: The public function.
        eager: The same in plain torch; also compiled, and in float64 the exact result.
        bound: From inputs to a call that moves or multiplies as much as the op at least must.
        peers: Other packages' functions, by name.
    """

    op: str
    fastalign: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    bound: Callable[[Inputs], Run]
    peers: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)


def copy_of(nbytes: int, device: torch.device) -> Run:
    """A copy that reads and writes `nbytes` in all, the bound of an op that only moves data."""
    source = torch.randint(256, (max(nbytes // 2, 1),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(benchmark: Benchmark, device: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of every case of one op on one device, see FIELDS; large cases on CUDA only."""
    found = cases(benchmark.op, bench=True, quick=quick)
    timed = [case for case in found if device == "cuda" or not case.large]
    return [row for case in timed for row in _measure_case(benchmark, case, device, quick)]


def _measure_case(
    benchmark: Benchmark, case: Case, device: str, quick: bool
) -> list[dict[str, Any]]:
    inputs = case.inputs(device)
    functions = {"fastalign": benchmark.fastalign, "eager": benchmark.eager}
    if not quick:  # compiling takes longer than all the rest
        torch._dynamo.reset()
        functions["compile"] = torch.compile(benchmark.eager, dynamic=False)
    functions |= {f"peer:{name}": fn for name, fn in benchmark.peers.items()}

    exact = value_and_grads(benchmark.eager, inputs, torch.float64)
    errors: dict[str, float | None] = {}
    for name, fn in functions.items():  # also compiles
        results = zip(value_and_grads(fn, inputs), exact, strict=True)
        errors[name] = max(relative_error(got, true) for got, true in results)
    del exact
    runs = {name: _step(fn, inputs) for name, fn in functions.items()}
    runs["bound"] = benchmark.bound(inputs)
    errors["bound"] = None
    peaks = {name: _peak_mib(run, device) for name, run in runs.items()}
    times = _interleaved_us(runs, device, rounds=5 if quick else 30, seconds=1 if quick else 20)
    quantiles = {
        name: torch.tensor(us).quantile(torch.tensor([0.5, 0.1, 0.9])).tolist()
        for name, us in times.items()
    }
    bound_us = quantiles["bound"][0]
    return [
        dict(
            zip(
                FIELDS,
                (
                    benchmark.op,
                    str(case),
                    name,
                    device_name(device),
                    *quantiles[name],
                    peaks[name],
                    bound_us,
                    errors[name],
                ),
                strict=True,
            )
        )
        for name in runs
    ]


def _step(fn: Callable[..., Tensor], inputs: Inputs) -> Run:
    """A call of `fn` with its gradients, on leaves and a cotangent made beforehand."""
    arguments = [
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in inputs
    ]
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    cotangent = cotangent_like(fn(*arguments).detach())
    return lambda: torch.autograd.grad(fn(*arguments), leaves, cotangent)


def _interleaved_us(
    runs: Mapping[str, Run], device: str, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Microseconds of each run, taken in turn so that a drifting clock favours none.

    Stops after `rounds`, or after `seconds` once there are three.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if device == "cuda" else None
    for run in runs.values():
        run()
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > seconds:
            break
        for name, run in runs.items():
            times[name].append(_time_us(run, flush))
    return times


def _time_us(run: Run, flush: Tensor | None) -> float:
    """One run's time; on CUDA between events, after writing `flush` over the L2 cache."""
    if flush is None:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.fill_(1)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return 1e3 * float(first.elapsed_time(last))


def _peak_mib(run: Run, device: str) -> float:
    """Most memory that one run holds at a time beyond what it starts with."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak / 2**20


def device_name(device: str) -> str:
    """The name that results are filed under."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_cpu_model()} ({torch.get_num_threads()} threads)"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
