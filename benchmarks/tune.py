"""Launch configurations of the kernels, timed against the one that each kernel has now.

    python -m benchmarks.tune [--op NAME]

CANDIDATES lists what is tried for each function that configures a launch, at every benchmark case
of its op. A candidate stands in for the function's result while a CUDA graph of the op with its
gradients is captured; the graphs are replayed in turn, so that a drifting clock favours none. Those
that take over 3 % less time than the current configuration are printed ready to paste.
"""

import argparse
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import (
    Benchmark,
    Function,
    Inputs,
    Run,
    _arguments,
    _interleaved_us,
    _leaves,
    device_name,
    quantiles,
)
from benchmarks.__main__ import find
from benchmarks._gpu_stage import FAILED, PASSED, Options, Unit, absent
from fastalign.testing import Case, cases, cotangent_like, relative_error

GAIN = 0.03  # of the median time: less is noise
CURRENT = "current"
Candidate = dict[str, int] | int


@dataclass(frozen=True)
class Table:
    """What is tried for one function of a kernel module.

    Args:
        candidates: Each replaces the function's result; a dict, only the entries that it has.
        function: Its name in `fastalign_kernels.<op>`.
        gradients: Positions of the inputs that are differentiated: those whose kernels the function
            configures. All floating-point ones when None; none of an op that gives constants.
    """

    candidates: tuple[Candidate, ...]
    function: str = "_config"
    gradients: tuple[int, ...] | None = None


def grid(
    per_thread: tuple[int, int] | None = None, **options: tuple[int, ...]
) -> tuple[Candidate, ...]:
    """Every combination of the options.

    Args:
        per_thread: Fewest and most elements of a tile for each thread; a tile is the product of all
            options but num_warps.
        options: Values by name.
    """
    found: list[Candidate] = []
    for values in itertools.product(*options.values()):
        config = dict(zip(options, values, strict=True))
        if per_thread is not None:
            tile = math.prod(n for name, n in config.items() if name != "num_warps")
            fewest, most = (n * 32 * config["num_warps"] for n in per_thread)
            if not fewest <= tile <= most:
                continue
        found.append(config)
    return tuple(found)


# By op. A new kernel module is tuned by its line here.
CANDIDATES: dict[str, tuple[Table, ...]] = {
    # A row has to fit in one block.
    "hadamard_reweight": (Table(grid(num_warps=(2, 4, 8, 16, 32))),),
    "label_logits": (
        Table(grid((8, 32), BLOCK=(1024, 2048, 4096), num_warps=(2, 4, 8)), gradients=(0,)),
        Table(
            grid((16, 32), TOKENS=(8, 16, 32), BLOCK=(128, 256, 512), num_warps=(2, 4, 8)),
            function="_config_weight",
            gradients=(1,),
        ),
    ),
    "linear_cross_entropy": (
        Table(grid((8, 32), BLOCK=(1024, 2048, 4096, 8192), num_warps=(4, 8, 16)), gradients=(0,)),
        # Rows of a chunk: with dW, which each of them reads and writes, and without.
        Table((256, 512, 1024, 2048), function="chunk_rows", gradients=(0, 1)),
        Table((128, 256, 512, 1024), function="chunk_rows", gradients=(0,)),
    ),
    "calibrate": (
        Table(grid((16, 32), ROWS=(4, 8, 16), BLOCK=(256, 512, 1024), num_warps=(2, 4, 8))),
    ),
    # A program holds one block, not a loop over a row: 2 to 32 tokens a thread.
    "contrast_weights": (
        Table(grid((2, 32), BLOCK=(128, 256, 512, 1024), num_warps=(1, 2, 4)), gradients=()),
    ),
    "structure_distill": (
        Table(grid(BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)), gradients=(0,)),
        Table((64, 128), function="_block", gradients=(0,)),
        Table((64, 128, 256), function="_columns", gradients=(0,)),
    ),
    "syrk": (
        Table(grid(BLOCK_K=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)), gradients=()),
        Table((64, 128), function="_block", gradients=()),
    ),
}


def changed(result: Any, candidate: Candidate) -> Any:
    """What a function returns with `candidate` in force, when it returned `result`."""
    return {**result, **candidate} if isinstance(candidate, dict) else candidate


@contextmanager
def configured(module: Any, function: str, candidate: Candidate | None) -> Iterator[list[Any]]:
    """For as long as the context lasts, `candidate` in the result of `module.function`.

    Args:
        module: A kernel module.
        function: Name of a function in it.
        candidate: See `Table`; None changes nothing.

    Yields:
        A list that collects what the function returned by itself.
    """
    original = getattr(module, function)
    returned: list[Any] = []

    def replacement(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        returned.append(result)
        return result if candidate is None else changed(result, candidate)

    setattr(module, function, replacement)
    try:
        yield returned
    finally:
        setattr(module, function, original)


def label(candidate: Candidate) -> str:
    """A candidate as it is pasted: {"BLOCK": 512, "num_warps": 4}."""
    if not isinstance(candidate, dict):
        return str(candidate)
    return "{" + ", ".join(f'"{name}": {n}' for name, n in candidate.items()) + "}"


def step(
    fn: Function, inputs: Inputs, gradients: tuple[int, ...] | None
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `fn` with some gradients; the cotangent is made beforehand."""
    arguments = _arguments(inputs, gradients)
    leaves = _leaves(arguments)
    cotangent = cotangent_like(fn(*arguments).detach())

    def run() -> tuple[Tensor, ...]:
        out = fn(*arguments)
        grads = torch.autograd.grad(out, leaves, cotangent) if leaves else ()
        return out.detach(), *grads

    return run


def graphed(run: Callable[[], Any], pool: Any) -> Run:
    """The replay of a CUDA graph of `run`: no host time in what is measured.

    Graphs share `pool`, for nobody reads what they leave.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def tune(
    fn: Function,
    inputs: Inputs,
    module: Any,
    table: Table,
    device: str,
    seconds: float = 4.0,
) -> dict[str, Any]:
    """Time the current configuration and every candidate at one case.

    A candidate that cannot be launched, or whose results differ from the current one's by more than
    a unit of the inputs' type in their last place, is kept with the reason and not timed.

    Returns:
        "current": what the function returned; "rows": of the current one and of every candidate
        "config", "median_us", "p10_us", "p90_us", or "config" and "refused"; "better": labels of
        those that win by more than GAIN, the fastest first.
    """
    run = step(fn, inputs, table.gradients)
    eps = max(
        torch.finfo(x.dtype).eps for x in inputs if isinstance(x, Tensor) and x.is_floating_point()
    )

    def under(candidate: Candidate | None) -> tuple[Tensor, ...]:
        with configured(module, table.function, candidate):
            return run()

    with configured(module, table.function, None) as returned:
        expected = [x.double() for x in run()]
    pool = torch.cuda.graph_pool_handle() if device == "cuda" else None
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    tried = [c for c in table.candidates if any(changed(r, c) != r for r in returned)]
    for name, candidate in [(CURRENT, None), *((label(c), c) for c in tried)]:
        ready = partial(under, candidate)
        try:
            pairs = zip(ready(), expected, strict=True)
            error = max(relative_error(got, wanted) for got, wanted in pairs)
            if not error <= eps:
                refused[name] = f"differs by {error:.1e}"
                continue
            runs[name] = graphed(ready, pool) if device == "cuda" else ready
        except torch.AcceleratorError:
            raise  # nothing runs after it in this process
        except Exception as problem:  # too much shared memory, or whatever the compiler refuses
            refused[name] = f"{type(problem).__name__}: {str(problem)[:200]}"
    times = _interleaved_us(runs, device, rounds=20, seconds=seconds)
    timed = {name: quantiles(times[name]) for name in runs}
    limit = (1 - GAIN) * timed[CURRENT]["median_us"] if CURRENT in timed else 0.0
    better = [name for name, row in timed.items() if row["median_us"] < limit]
    return {
        "current": returned[0] if returned else None,
        "rows": [{"config": name, **row} for name, row in timed.items()]
        + [{"config": name, "refused": reason} for name, reason in refused.items()],
        "better": sorted(better, key=lambda name: timed[name]["median_us"]),
    }


def print_better(op: str, function: str, case: str, device: str, found: dict[str, Any]) -> None:
    """The winners, as lines to paste into the kernel's module; or that there is none."""
    rows = {row["config"]: row for row in found["rows"]}
    now = rows[CURRENT]["median_us"]
    where = f"fastalign_kernels.{op}.{function}, {case}"
    if not found["better"]:
        print(f"    {where}: {label(found['current'])} stays, {now:.1f} us", flush=True)
        return
    print(f"    # {where} on {device}; now {label(found['current'])}, {now:.1f} us")
    for name in found["better"][:3]:
        median = rows[name]["median_us"]
        print(f"    return {name}  # {median:.1f} us, {1 - median / now:.0%} less", flush=True)


def _unit(
    op: str, benchmark: Benchmark, table: Table, case: Case, options: Options
) -> dict[str, Any]:
    if not options.cuda:
        return absent("needs CUDA: without it the kernels are not run")
    module = importlib.import_module(f"fastalign_kernels.{op}")
    found = tune(benchmark.fastalign, case.inputs(options.device), module, table, options.device)
    if CURRENT not in {row["config"] for row in found["rows"] if "median_us" in row}:
        return {"status": FAILED, "error": "the current configuration was refused", **found}
    print_better(op, table.function, str(case), device_name(options.device), found)
    return {"status": PASSED, **found}


def units(options: Options, op: str | None = None) -> Iterator[Unit]:
    """One unit for each case of each table, of all ops that have a benchmark or of one."""
    for name, benchmark in find().items():
        for table in CANDIDATES.get(name, ()) if op in (None, name) else ():
            for case in cases(name, bench=True, quick=options.tiny):
                run = partial(_unit, name, benchmark, table, case, options)
                if not case.quick or options.tiny:
                    yield Unit(f"{name}.{table.function} {case}", run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", choices=sorted(CANDIDATES), help="this op only")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device was found: the kernels run on nothing else")
    results = [unit.run() for unit in units(Options("cuda", False), arguments.op)]
    return 1 if any(result["status"] == FAILED for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
