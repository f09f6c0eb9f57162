"""Whether a long run leaks, slows down or is not repeated by its seed.

    python -m benchmarks.soak [--objective NAME] [--steps N] [--json FILE] [--save]

The demo's base model, scenes and settings, trained three times from the same seed, each time in a
process of its own with one thread, with a checkpoint and a look at the memory every 50 steps. The
first tenth is warm-up: allocators, caches and the optimizer's moments. The exit status is 1 when a
rule is broken:

memory      the resident set of the first two runs grows by less than 1 MB: medians of five looks,
            after the warm-up and at the end. A look is taken at the same point of the loop, when
            the batch of the next step is made, after a collection of Python's garbage and after
            glibc's malloc_trim: what free() has taken back is then the system's, and the
            allocator's reserve is not taken for a leak.
heap        what Python allocated grows by less than 1 MB in the third run, which tracemalloc
            follows. This holds the lines of the log, which are kept for the result; their bytes
            are printed beside it.
tensors     no run has more tensors alive at the end than after the warm-up, or 10 KB more in them:
            batches differ in length.
objects     nor, by Python's collector, a hundred objects more.
throughput  steps take at most 5 % more CPU time in the last quarter than in the first: medians, and
            the median of the three runs. Other work on the machine slows a core down, too.
repetition  the three runs have equal files of weights and of the optimizer, by SHA-256, and equal
            lines of metrics.jsonl but for their rates and memory.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import device_name, results_file
from benchmarks.__main__ import merged, write
from fastalign.checkpoint import checkpoints
from fastalign.demo.base import build_processor, load_base
from fastalign.demo.dataset import SceneDataset, collate
from fastalign.demo.run import DemoConfig, arm_config
from fastalign.demo.scenes import scenes
from fastalign.demo.teacher import EfficientNetTeacher, teacher_features
from fastalign.train import train

MB = 1_000_000
# What growth is too much.
RULES = {"memory": MB, "heap": MB, "tensors": 1, "tensor_bytes": 10_000, "objects": 100}
SLOWER = 1.05
NOT_REPEATED = ("tokens_per_s", "images_per_s", "peak_mib")


@dataclass(frozen=True)
class Soak:
    """What is run.

    Attributes:
        objective: An arm of the demo.
        steps: Of each run.
        every: Steps between looks, and between checkpoints.
        warm_up: Steps before the first look that counts.
        scenes, batch_size, log_every: Of the run.
    """

    objective: str = "deepalign"
    steps: int = 2000
    every: int = 50
    warm_up: int = 200
    scenes: int = 640
    batch_size: int = 4
    log_every: int = 10

    def __str__(self) -> str:
        return f"{self.objective}, {self.steps} steps"


class Look(NamedTuple):
    """The memory of this process before a step."""

    step: int
    rss: int
    heap: int
    objects: int
    tensors: int
    tensor_bytes: int


@dataclass
class Gauge:
    """Collates a run's batches, and so is called once a step: takes times, and looks.

    Of the steps only: batches before and after them are the classifier's.
    """

    every: int
    steps: int
    looks: list[tuple[int, ...]] = field(default_factory=list)  # no objects of the collector's
    seconds: list[float] = field(default_factory=list)
    _calls: int = 0
    _clock: float = 0.0

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        if 0 < self._calls < self.steps:
            self.seconds.append(time.process_time() - self._clock)
            if self._calls % self.every == 0:
                self.looks.append(tuple(look(self._calls)))
        self._calls += 1
        self._clock = time.process_time()
        return collate(items)


def look(step: int) -> Look:
    """At the memory, once all that is free has been given back."""
    gc.collect()
    objects = gc.get_objects()
    alive = [x for x in objects if type(x) in (torch.Tensor, torch.nn.Parameter)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}
    counts = (len(objects), len(alive), sum(held.values()))
    del objects, alive, held
    heap = tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0
    with contextlib.suppress(AttributeError):  # of glibc; others keep what they keep
        ctypes.CDLL(None).malloc_trim(0)
    return Look(step, resident(), heap, *counts)


def resident() -> int:
    """Bytes of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status must say VmRSS: got none; a soak needs Linux")


def live(case: Soak, folder: Path, traced: bool, make: Callable[..., Any] | None = None) -> Any:
    """One run, in this process.

    Args:
        folder: Of the run.
        traced: Follow what Python allocates.
        make: Takes each batch of a step and gives it on: for a run that is to leak.
    """
    torch.set_num_threads(1)
    settings = arm_config(case.objective, 0, DemoConfig(steps=case.steps))
    settings = replace(
        settings,
        output_dir=str(folder),
        batch_size=case.batch_size,
        log_every=case.log_every,
        save_every=case.every,
    )
    data = scenes(case.scenes, seed=100)
    features = None
    if settings.objective == "deepalign":
        features = teacher_features(EfficientNetTeacher(), data.images)
    dataset = SceneDataset(data, build_processor(), teacher=features)
    gauge = Gauge(case.every, case.steps)

    def batches(items: Sequence[Any]) -> dict[str, Any]:
        if not (folder / "metrics.jsonl").exists():
            return collate(items)
        batch = gauge(items)
        return make(batch) if make else batch

    if traced:
        tracemalloc.start()
    try:
        done = train(settings, model=load_base(), dataset=dataset, collate=batches)
    finally:
        tracemalloc.stop()
    kept = [line for line in done.history if line["step"] > case.warm_up]
    return {
        "looks": [Look(*numbers) for numbers in gauge.looks],
        "seconds": gauge.seconds,
        "log_bytes": sum(size_of(line) for line in kept),
        "sha256": hashes(folder),
        "lines": lines(folder / "metrics.jsonl"),
    }


def size_of(line: dict[str, float]) -> int:
    """Bytes of a line of the log, without its names, which all lines share."""
    return sys.getsizeof(line) + sum(sys.getsizeof(value) for value in line.values())


def hashes(folder: Path) -> dict[str, str]:
    """Of all weights and moments that a run leaves, by the names of the files."""
    last = checkpoints(folder)[-1]
    files = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    files += [last / "trained.safetensors", last / "optimizer.safetensors"]
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            name = file.relative_to(folder).as_posix()
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests


def lines(file: Path) -> list[dict[str, float]]:
    """Of the log, without what another run may have otherwise."""
    read = [json.loads(text) for text in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in NOT_REPEATED} for line in read]


def drift(case: Soak, looks: Sequence[Look], name: str) -> int:
    """Growth of one number: the median of the last looks less that of the first that count."""
    values = [getattr(x, name) for x in looks if x.step >= case.warm_up]
    count = min(5, len(values) // 2)
    return round(statistics.median(values[-count:]) - statistics.median(values[:count]))


def slowdown(seconds: Sequence[float]) -> float:
    """Median step time of the last quarter by that of the first."""
    quarter = len(seconds) // 4
    return statistics.median(seconds[-quarter:]) / statistics.median(seconds[:quarter])


def slope(seconds: Sequence[float]) -> float:
    """Growth of the step time in a thousand steps, as a part of its median: least squares over
    medians of 20 steps, which neither a checkpoint nor a pause of the machine moves."""
    groups = [statistics.median(seconds[i : i + 20]) for i in range(0, len(seconds) - 19, 20)]
    if len(groups) < 2:
        return float("nan")
    found = statistics.linear_regression([20.0 * i for i in range(len(groups))], groups).slope
    return 1000 * found / statistics.median(seconds)


def judged(case: Soak, runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What was measured, and the rules that it breaks. The last run is the traced one."""
    timed = [run["seconds"][case.warm_up :] for run in runs]
    looks = [run["looks"] for run in runs]
    found: dict[str, Any] = {
        "memory": [drift(case, own, "rss") for own in looks[:-1]],
        "heap": [drift(case, looks[-1], "heap")],
        "tensors": [drift(case, own, "tensors") for own in looks],
        "tensor_bytes": [drift(case, own, "tensor_bytes") for own in looks],
        "objects": [drift(case, own, "objects") for own in looks],
        "throughput": [slowdown(seconds) for seconds in timed],
        "slope": [slope(seconds) for seconds in timed],
        "median_s": [statistics.median(seconds) for seconds in timed],
        "rss": [own[-1].rss for own in looks[:-1]],
        "log_bytes": [runs[-1]["log_bytes"]],
    }
    broken = [
        f"{name} grew by {max(found[name])}"
        for name, limit in RULES.items()
        if max(found[name]) >= limit
    ]
    if statistics.median(found["throughput"]) > SLOWER:
        broken.append(f"throughput: steps take {statistics.median(found['throughput']):.3f} times")
    for name in ("sha256", "lines"):
        if any(run[name] != runs[0][name] for run in runs):
            broken.append(f"repetition: {name} of runs of one seed differ")
    return found, broken


def show(case: Soak, found: dict[str, Any], broken: Sequence[str]) -> None:
    """As a table."""

    def row(name: str, unit: str, scale: float, form: str = "9.1f") -> None:
        values = " ".join(format(value * scale, form) for value in found[name])
        print(f"{name:14} {values} {unit}")

    print(f"\nsoak, {case}, {len(found['throughput'])} runs, on {device_name('cpu')}")
    row("memory", "KB from the warm-up to the end", 1e-3)
    row("rss", "MB at the end", 1 / MB)
    row("heap", "KB that Python allocated, traced", 1e-3)
    row("log_bytes", "KB of that in lines of the log", 1e-3)
    row("tensors", "more alive", 1, "9.0f")
    row("tensor_bytes", "bytes more in them", 1, "9.0f")
    row("objects", "more, of the collector", 1, "9.0f")
    row("median_s", "ms of CPU time a step", 1e3)
    row("throughput", "CPU time of a step, last quarter by first", 1, "9.3f")
    row("slope", "% of that time in 1,000 steps", 100, "+9.2f")
    for text in broken or ["every rule holds"]:
        print(text if not broken else f"BROKEN: {text}")


def rows_of(case: Soak, found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a run, as `benchmarks/results` keeps them."""
    rows = []
    for i, median in enumerate(found["median_s"]):
        own = {k: v[i] for k, v in found.items() if len(v) == len(found["median_s"])}
        own |= {k: found[k][i] for k in ("memory", "rss") if i < len(found[k])}
        row = {
            "op": "soak",
            "case": str(case),
            "impl": f"run {i + 1}",
            "device": device_name("cpu"),
        }
        rows.append({**row, "device": device_name("cpu"), "median_us": 1e6 * median, **own})
    rows[-1] |= {"heap": found["heap"][0], "log_bytes": found["log_bytes"][0]}
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--objective", default="deepalign", choices=("deepalign", "sft", "cal"))
    parser.add_argument("--steps", type=int, default=2000, help="of each run, from 100 on")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--save", action="store_true", help="keep them in benchmarks/results")
    options = parser.parse_args(argv)
    if options.steps < 100:
        parser.error(f"--steps must be at least 100: got {options.steps}")
    every = 50 if options.steps >= 1000 else 10  # whole lines of the log
    case = Soak(options.objective, options.steps, every, options.steps // 10)
    runs = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(3):
            with ProcessPoolExecutor(1, context) as pool:
                runs.append(pool.submit(live, case, Path(scratch) / str(i), i == 2).result())
            print(f"run {i + 1} of 3: {sum(runs[-1]['seconds']):.0f} s", flush=True)
    torch.set_num_threads(1)  # as the runs had it
    return finish(case, runs, options.json, options.save)


def finish(case: Soak, runs: Sequence[dict[str, Any]], file: Path | None, save: bool) -> int:
    """Show and keep what was measured; the exit status."""
    found, broken = judged(case, runs)
    show(case, found, broken)
    rows = rows_of(case, found)
    if file:
        looks = [[x._asdict() for x in run["looks"]] for run in runs]
        write(file, [{**row, "looks": own} for row, own in zip(rows, looks, strict=True)])
    if save:
        write(results_file("cpu"), merged(results_file("cpu"), rows))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
