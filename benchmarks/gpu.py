"""Everything that only a machine with a GPU can show, in one command that can be run again.

    python -m benchmarks.gpu --out DIR [--minutes 9] [--stage NAME ...] [--again] [--tiny]

Stages, each in a process of its own: correctness (the ops' tests on CUDA, compute-sanitizer, CUDA
graphs, more than 2^31 elements), attention (the back ends of packed attention that are installed),
tune (launch configurations that beat the current ones), benchmark (every op at the shapes of named
models), step (training steps of 7B models). Each writes DIR/<stage>.json after every unit of its
work; run again, a stage that is there is skipped and one that was cut off goes on where it was. The
exit status is 0 when every stage has passed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks._gpu_stage import CUT, FAILED, PASSED, RESTART, RUNNING, Report

ROOT = Path(__file__).parents[1]


class Stage(NamedTuple):
    """Where a stage's units are, and its share of the time that is left."""

    module: str
    share: float


STAGES = {
    "correctness": Stage("benchmarks._gpu_correctness", 3),
    "attention": Stage("benchmarks._gpu_attention", 1),
    "tune": Stage("benchmarks.tune", 2),
    "benchmark": Stage("benchmarks._gpu_benchmark", 3),
    "step": Stage("benchmarks._gpu_step", 3),
}


def run(stages: Mapping[str, Stage], folder: Path, seconds: float, tiny: bool = False) -> bool:
    """Run what is not finished, one stage after the other; what a stage leaves the others get.

    Returns:
        Whether every stage has passed, now or before.
    """
    deadline = time.monotonic() + seconds
    reports = {name: Report(folder / f"{name}.json") for name in stages}
    left = [name for name in stages if not reports[name].finished]
    for name in stages:
        if name not in left:
            device = reports[name].data["machine"].get("device")
            print(f"== {name}: {reports[name].status} before on {device}, see {name}.json")
    while left:
        total = sum(stages[name].share for name in left)
        name = left.pop(0)
        limit = (deadline - time.monotonic()) * stages[name].share / total
        print(f"== {name}: at most {max(limit, 0):.0f} s", flush=True)
        _supervise(name, stages[name], folder, limit, tiny)
    return _summary(stages, folder)


def _supervise(name: str, stage: Stage, folder: Path, seconds: float, tiny: bool) -> None:
    """One stage within its time, in as many processes as it takes."""
    deadline = time.monotonic() + seconds
    path = folder / f"{name}.json"
    while True:
        before = _place(Report(path))
        try:
            status = _process(name, stage, folder, deadline - time.monotonic(), tiny)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            report = Report(path)
            if not report.finished:  # else it ended in the last instant
                report.stop(CUT, f"stopped after {max(seconds, 0):.0f} s")
            if isinstance(reason, KeyboardInterrupt):
                raise
            return
        report = Report(path)
        if status == 0 and report.status not in (None, RUNNING):
            return
        if status != RESTART:
            print(f"    the process ended with status {status}", flush=True)
        if _place(report) == before:  # a next one would get no further
            if report.status in (None, RUNNING):  # else it refused to go on with what is there
                report.stop(FAILED, f"its process ended with status {status}, see its output")
            return


def _place(report: Report) -> tuple[int, str | None]:
    """How far a stage has come: results, and the unit in which its process is or ended."""
    return len(report.results), report.data["running"]


def _process(name: str, stage: Stage, folder: Path, seconds: float, tiny: bool) -> int:
    """The exit status of one process of a stage, which is killed with its children after a time."""
    if seconds <= 0:
        raise subprocess.TimeoutExpired(name, seconds)
    command = [sys.executable, "-m", "benchmarks._gpu_stage", stage.module, name, str(folder)]
    # On a GPU kernels are compiled, whatever tests set before.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command + ["--tiny"] * tiny,
        cwd=ROOT,
        env=environment if torch.cuda.is_available() else None,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _summary(stages: Mapping[str, Stage], folder: Path) -> bool:
    """Print one line a stage and its failures; whether all have passed."""
    print()
    passed = True
    for name in stages:
        report = Report(folder / f"{name}.json")
        passed &= report.status == PASSED
        counts: dict[str, int] = {}
        for record in report.results.values():
            counts[record["status"]] = counts.get(record["status"], 0) + 1
        listed = ", ".join(f"{count} {status}" for status, count in counts.items())
        error = f" ({report.data['error']})" if report.data["error"] else ""
        print(f"{name:12} {report.status!s:12} {report.data['seconds']:6.0f} s  {listed}{error}")
        for record in report.results.values():
            if record["status"] == FAILED:
                print(f"    FAILED: {record['name']}: {record.get('error', '')}"[:400])
    print(flush=True)
    return passed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), help="these only")
    parser.add_argument("--again", action="store_true", help="forget earlier results of the stages")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, also without a GPU")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --tiny runs the smallest sizes on the CPU")
    stages = {name: STAGES[name] for name in options.stage or STAGES}
    folder = options.out.resolve()
    if options.again:
        for name in stages:
            (folder / f"{name}.json").unlink(missing_ok=True)
    return 0 if run(stages, folder, 60 * options.minutes, options.tiny) else 1


if __name__ == "__main__":
    raise SystemExit(main())
