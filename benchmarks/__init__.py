"""What a benchmark is, and how one case of it is timed.

`benchmarks/<op>.py` holds a `Benchmark` called BENCHMARK; `python -m benchmarks` runs them all.
"""

import importlib.util
import json
import platform
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.testing import Case, cases, cotangent_like, relative_error

Inputs = Sequence[Any]
Run = Callable[[], Any]
Function = Callable[..., Tensor]

RESULTS = Path(__file__).parent / "results"
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
TF32 = "peer:eager-tf32"


@dataclass(frozen=True)
class Peer:
    """Another package's function.

    Args:
        package: What must be importable.
        load: Imports it and gives the function, with the arguments of the op.
    """

    package: str
    load: Callable[[], Function]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True)
class Benchmark:
    """One op: what is timed is the value with its gradients.

    Args:
        op: Name of the op, also that of its cases.
        fastalign: The public function.
        eager: What one writes in plain torch, in float32; also compiled, and in float64 the exact
            result, so it must keep that dtype.
        bound: From inputs to a call that moves or multiplies as much as the op at least must.
        bfloat16: The same as `eager` in bfloat16 throughout, for ops built on matrix products:
            these are also timed so (on CUDA compiled too), and on CUDA in TF32.
        peers: Other packages' functions, by name.
        differentiate: Positions of the inputs that have a gradient; None: all floating-point ones;
            empty for an op that gives constants.
        portable: What the public function runs on a CPU without the compiled kernels; where they
            are in use it is timed beside them.
        compiled: The compiled kernels of CUDA, which the public function runs without Triton only;
            where they can be, they are timed on CUDA beside Triton's.
    """

    op: str
    fastalign: Function
    eager: Function
    bound: Callable[[Inputs], Run]
    bfloat16: Function | None = None
    peers: Mapping[str, Peer] = field(default_factory=dict)
    differentiate: tuple[int, ...] | None = None
    portable: Function | None = None
    compiled: Function | None = None

    def absent(self) -> dict[str, str]:
        """Package of each peer that is not installed, by the peer's name."""
        return {name: p.package for name, p in self.peers.items() if not p.installed}

    def functions(self, device: str, quick: bool) -> dict[str, Function]:
        """What is timed, by the name of its row; nothing is compiled for a quick run."""
        found = {"fastalign": self.fastalign, "eager": self.eager}
        cuda = device == "cuda"
        if self.portable is not None and not cuda and native.OBSTACLE is None:
            found["portable"] = self.portable
        if self.compiled is not None and cuda and native.CUDA_OBSTACLE is None:
            found["compiled"] = self.compiled
        if self.bfloat16 is not None:
            found |= {TF32: self.eager} if cuda else {}
            found["peer:eager-bf16"] = self.bfloat16
        if not quick:
            found["compile"] = torch.compile(self.eager, dynamic=False)
            if self.bfloat16 is not None and cuda:
                found["peer:compile-bf16"] = torch.compile(self.bfloat16, dynamic=False)
        usable = {name: p.load() for name, p in self.peers.items() if p.installed}
        return found | {f"peer:{name}": fn for name, fn in usable.items()}


def copy_of(nbytes: int, device: torch.device) -> Run:
    """A copy that reads and writes `nbytes` in all, the bound of an op that only moves data."""
    source = torch.randint(256, (max(nbytes // 2, 1),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(
    benchmark: Benchmark,
    device: str,
    quick: bool,
    case_filter: Callable[[Case], bool] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the cases of one op on one device, see FIELDS; large cases on CUDA only.

    Args:
        benchmark: The op.
        device: "cpu" or "cuda".
        quick: Small cases, few rounds, nothing compiled.
        case_filter: Which of the cases; None for all.
    """
    found = cases(benchmark.op, bench=True, quick=quick)
    timed = [case for case in found if device == "cuda" or not case.large]
    chosen = [case for case in timed if case_filter is None or case_filter(case)]
    return [row for case in chosen for row in _measure_case(benchmark, case, device, quick)]


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """How many times fastalign's median each other median is, by (op, case, device) and impl.

    These may be quoted: both medians are of runs taken in turn on one machine.
    """
    medians: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        key = (row["op"], row["case"], row["device"])
        medians.setdefault(key, {})[row["impl"]] = row["median_us"]
    return {
        key: {name: us / found["fastalign"] for name, us in found.items() if name != "fastalign"}
        for key, found in medians.items()
        if "fastalign" in found
    }


def results_file(device: str) -> Path:
    """Where `--save` keeps the rows of this device: its name in lower case and hyphens."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}.json"


def _measure_case(
    benchmark: Benchmark, case: Case, device: str, quick: bool
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    inputs, chosen = case.inputs(device), benchmark.differentiate
    functions = benchmark.functions(device, quick)
    errors = _errors(benchmark, functions, inputs)
    runs: dict[str, Run] = {}
    for name, fn in functions.items():
        with _precision(name):
            runs[name] = _step(fn, inputs, chosen)
    runs["bound"] = benchmark.bound(inputs)
    peaks = {}
    for name, run in runs.items():
        with _precision(name):
            peaks[name] = _peak_mib(run, device)
    times = _interleaved_us(runs, device, rounds=5 if quick else 30, seconds=1 if quick else 20)
    found = {name: quantiles(us) for name, us in times.items()}
    bound_us = found["bound"]["median_us"]
    device, op = device_name(device), benchmark.op
    values = (
        (
            op,
            str(case),
            name,
            device,
            *found[name].values(),
            peaks[name],
            bound_us,
            errors.get(name),
        )
        for name in runs
    )
    return [dict(zip(FIELDS, row, strict=True)) for row in values]


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """How the row of this name multiplies float32 matrices: in float32, unless it says TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == TF32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _errors(
    benchmark: Benchmark, functions: Mapping[str, Function], inputs: Inputs
) -> dict[str, float]:
    """Largest relative error of the value and of each gradient, against eager in float64."""
    exact = _value_and_grads(
        benchmark.eager, _arguments(inputs, benchmark.differentiate, torch.float64)
    )
    errors = {}
    for name, fn in functions.items():  # also compiles
        with _precision(name):
            results = _value_and_grads(fn, _arguments(inputs, benchmark.differentiate))
        found = [relative_error(got, true) for got, true in zip(results, exact, strict=True)]
        errors[name] = float(torch.tensor(found, dtype=torch.float64).max())  # NaN stays NaN
    return errors


def _arguments(
    inputs: Inputs, differentiate: tuple[int, ...] | None, dtype: torch.dtype | None = None
) -> list[Any]:
    """The inputs, in `dtype` those that are floating point, as leaves those to differentiate."""
    arguments = list(inputs)
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.is_floating_point():
            leaf = differentiate is None or i in differentiate
            arguments[i] = x.detach().to(dtype or x.dtype).requires_grad_(leaf)
    return arguments


def _leaves(arguments: Sequence[Any]) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]


def _value_and_grads(fn: Function, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    out, leaves = fn(*arguments), _leaves(arguments)
    grads = torch.autograd.grad(out, leaves, cotangent_like(out)) if leaves else ()
    return out.detach(), *grads


def _step(fn: Function, inputs: Inputs, differentiate: tuple[int, ...] | None = None) -> Run:
    """A call of `fn` with its gradients, on leaves and a cotangent made beforehand.

    It returns the gradients; or the value, in a tuple, where nothing is differentiated.
    """
    arguments = _arguments(inputs, differentiate)
    leaves = _leaves(arguments)
    if not leaves:
        return lambda: (fn(*arguments),)
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
    for name, run in runs.items():
        with _precision(name):
            run()
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > seconds:
            break
        for name in list(runs)[:: 1 if i % 2 else -1]:  # no run always follows the same one
            with _precision(name):
                times[name].append(_time_us(runs[name], flush))
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    found = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    )
    return dict(zip(("median_us", "p10_us", "p90_us"), found.tolist(), strict=True))


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
    """Most memory that one run holds at a time beyond what it starts with.

    On the CPU it is what torch's allocator hands out, so neither numpy's nor a library's own
    buffers; what is written in place or into `out` counts nothing.
    """
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
