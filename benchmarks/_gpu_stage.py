"""A stage of `python -m benchmarks.gpu`: units of work, and the file that remembers them.

    python -m benchmarks._gpu_stage MODULE NAME DIR [--tiny]

runs the units of MODULE that DIR/NAME.json does not hold yet. The file is written before and after
every unit, so a process that dies or is stopped loses the unit it was in and no other.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

PASSED, FAILED, ABSENT, CUT = "passed", "failed", "absent", "out of time"
RUNNING = "running"
RESTART = 3  # exit status: CUDA is unusable in this process, the rest needs another


class Options(NamedTuple):
    """How units run: `tiny` is every unit in its smallest form, on any device."""

    device: str
    tiny: bool

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Unit:
    """One piece of a stage.

    Args:
        name: Unique within the stage.
        run: To what is recorded; "status" there is PASSED unless it says FAILED or ABSENT, the
            latter with a "reason". An exception is FAILED.
    """

    name: str
    run: Callable[[], dict[str, Any]]


def absent(reason: str) -> dict[str, Any]:
    """The record of a unit that this machine cannot run."""
    return {"status": ABSENT, "reason": reason}


class Report:
    """DIR/<stage>.json: what a stage has done so far.

    Args:
        path: The file; read if it exists.

    Raises:
        ValueError: It is no report.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"stage": path.stem, "status": None, "seconds": 0.0}
        self.data |= {"running": None, "error": None, "machine": {}, "results": []}
        if path.is_file():
            try:
                found = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} must be JSON: {error}; remove it") from None
            if not isinstance(found, dict) or found.keys() != self.data.keys():
                raise ValueError(f"{path} must be the report of a stage; choose another folder")
            self.data = found

    @property
    def status(self) -> str | None:
        """None before the stage began, RUNNING, PASSED, FAILED or CUT."""
        status: str | None = self.data["status"]
        return status

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in (PASSED, FAILED)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Records by name of their unit."""
        return {record["name"]: record for record in self.data["results"]}

    def begin(self, machine: dict[str, Any]) -> None:
        """Start or go on; a unit that was running when its process ended has failed.

        Raises:
            ValueError: What is there was taken on another machine.
        """
        before = self.data["machine"]
        if before and before != machine:
            changed = [k for k in machine if machine[k] != before.get(k)]
            raise ValueError(
                f"{self.path} is of another machine or setting ({', '.join(changed)}: "
                f"{[before.get(k) for k in changed]} then, {[machine[k] for k in changed]} now): "
                "choose another --out, or measure all of it --again"
            )
        self.data |= {"machine": machine, "status": RUNNING, "error": None}
        if self.data["running"]:
            self.add(self.data["running"], {"status": FAILED, "error": "the process ended in it"})
        self.write()

    def start(self, name: str) -> None:
        self.data["running"] = name
        self.write()

    def add(self, name: str, record: dict[str, Any], seconds: float = 0.0) -> None:
        """Keep the record of a unit; an earlier one of that name is replaced."""
        kept = [old for old in self.data["results"] if old["name"] != name]
        record = {"name": name, "status": PASSED, "seconds": round(seconds, 3), **record}
        self.data["results"] = [*kept, record]
        self.data["seconds"] = round(self.data["seconds"] + seconds, 3)
        self.data["running"] = None
        self.write()

    def end(self) -> None:
        """Every unit was tried: the stage has passed unless one failed or was cut off."""
        statuses = {record["status"] for record in self.data["results"]}
        self.data["status"] = next((s for s in (CUT, FAILED) if s in statuses), PASSED)
        self.write()

    def stop(self, status: str, error: str | None = None) -> None:
        """Say that the stage ended early; with CUT the unit that was running is tried again."""
        if status == CUT and self.data["running"]:
            self.add(self.data["running"], {"status": CUT})
        self.data |= {"status": status, "error": error}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


def machine(options: Options) -> dict[str, Any]:
    """What every number of a report depends on."""
    from benchmarks import device_name

    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {"cuda": torch.version.cuda}
    for package in ("fastalign", "torch", "triton", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    found: dict[str, Any] = {"device": device_name(options.device), "tiny": options.tiny}
    if options.cuda:
        found["capability"] = list(torch.cuda.get_device_capability())
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return {**found, "versions": versions}


def work(report: Report, units: Iterable[Unit], usable: Callable[[], bool]) -> int:
    """Run what the report lacks, what had no time before last.

    Args:
        report: Begun.
        units: In their order.
        usable: Asked after a failure: whether this process can go on.

    Returns:
        0, or RESTART.
    """
    done = {name for name, record in report.results.items() if record["status"] != CUT}
    cut = report.results.keys() - done
    left = sorted((u for u in units if u.name not in done), key=lambda u: u.name in cut)
    for unit in left:
        print(f"[{report.path.stem}] {unit.name}", flush=True)
        report.start(unit.name)
        start = time.perf_counter()
        try:
            record = unit.run()
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            record = {"status": FAILED, "error": f"{type(error).__name__}: {error}"}
        seconds = time.perf_counter() - start
        report.add(unit.name, record, seconds)
        status = report.results[unit.name]["status"]
        print(f"    {status} in {seconds:.1f} s {record.get('reason', '')}".rstrip(), flush=True)
        if status == FAILED and not usable():
            return RESTART
    report.end()
    return 0


def _cuda_usable() -> bool:
    """False after an error that stays with the process, like an illegal address."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    torch.cuda.empty_cache()
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("module", help="has units(options) -> iterable of Unit")
    parser.add_argument("name", help="of the stage and its file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    options = Options("cuda" if torch.cuda.is_available() else "cpu", arguments.tiny)
    report = Report(arguments.out / f"{arguments.name}.json")
    report.begin(machine(options))
    units = list(importlib.import_module(arguments.module).units(options))
    return work(report, units, _cuda_usable)


if __name__ == "__main__":
    raise SystemExit(main())
