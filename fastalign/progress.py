"""What a run reports while it goes: a progress bar, `metrics.jsonl`, trackers."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.config import TrainConfig


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far, in MiB: the allocator's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class RunLog:
    """Collects the terms of each step on the main rank and writes a line every `log_every` steps.

    A line holds the step, the terms (means over the steps since the last line), the learning rate,
    the gradient norm, tokens and images per second and the peak memory; where samples may be
    skipped also how many were since the last line, by reason, and likewise steps. Steps that were
    left out are in no mean. Lines of a run that is
    being resumed are kept up to its checkpoint.
    """

    def __init__(self, config: TrainConfig, folder: Path, start: int, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.main: bool = accelerator.is_main_process
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._clock = time.perf_counter()
        self._bar: Any = None
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if start and path.exists():
            self.history = [line for line in _whole_lines(path) if line["step"] <= start]
        # Whole under another name first: a run killed here loses no line.
        partial = folder / ".metrics.jsonl.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        os.replace(partial, path)
        self._file = path.open("a")
        if config.progress:
            self._start_bar(start)

    def _start_bar(self, start: int) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[text]}"),
        )
        total = self.config.max_steps
        self._task = self._bar.add_task(
            self.config.objective, total=total, completed=start, text=""
        )
        self._bar.start()

    def step(
        self,
        step: int,
        values: dict[str, Tensor],
        norm: Tensor,
        rate: float,
        totals: Any,
        measured: Mapping[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Take in step `step` (from 0); numbers stay on the device until a line is due.

        Args:
            step, values, norm, rate, totals: Of the step.
            measured: Numbers after it, for its line; where none is due, they get their own.
            last: No step comes after this one.
        """
        taken = "loss" in values  # a step that was left out has no terms
        gained = {**values, "grad_norm": norm.detach()} if taken else dict(values)
        gained |= {"tokens_per_s": totals["tokens"], "images_per_s": totals["images"]}
        for name, value in gained.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += taken
        done = step + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        due = last or done % self.config.log_every == 0 or done == self.config.max_steps
        if self.main and due:
            self._line(done, rate, measured or {})
        elif self.main and measured:
            self._keep({"step": done, **measured})
        if not due:
            return
        self._sums, self._steps, self._clock = {}, 0, time.perf_counter()

    def _line(self, done: int, rate: float, measured: Mapping[str, float]) -> None:
        seconds = time.perf_counter() - self._clock
        line = {"step": done, "learning_rate": rate}
        for name, total in self._sums.items():
            counted = name.startswith("skipped")  # a sum already, of the steps of this line
            per = seconds if name.endswith("_per_s") else 1 if counted else self._steps
            line[name] = float(total) / per
        line |= {**measured, "peak_mib": peak_memory_mib(self.accelerator.device)}
        self._keep(line)
        if self._bar is not None:
            text = (
                f"loss {line.get('loss', math.nan):.4f}  {line['tokens_per_s']:.0f} tokens/s  "
                f"{line['images_per_s']:.1f} images/s  {line['peak_mib']:.0f} MiB"
            )
            self._bar.update(self._task, text=text)

    def _keep(self, line: dict[str, float]) -> None:
        self.history.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self.config.report_to:
            self.accelerator.log(line, step=int(line["step"]))

    def state(self) -> dict[str, Tensor]:
        """Sums since the last line, for a checkpoint; the lines before it are brought to disk."""
        if self.main:
            os.fsync(self._file.fileno())
        seconds = torch.tensor(time.perf_counter() - self._clock, dtype=torch.float64)
        sums = {f"sum.{name}": value for name, value in self._sums.items()}
        return {**sums, "steps": torch.tensor(self._steps), "seconds": seconds}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned, so that the next line is that of an unbroken run."""
        self._steps, seconds = int(state["steps"]), float(state["seconds"])
        self._clock = time.perf_counter() - seconds
        self._sums = {
            name.removeprefix("sum."): value.to(self.accelerator.device)
            for name, value in state.items()
            if name.startswith("sum.")
        }

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        if self._bar is not None:
            self._bar.stop()
        if self.main:
            self._file.close()
        if self.config.report_to:
            self.accelerator.end_training()


def _whole_lines(path: Path) -> list[dict[str, float]]:
    """Lines of a file whose last one may have been cut short by a kill."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
