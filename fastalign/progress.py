"""What a run reports while it goes: a progress bar, `metrics.jsonl`, trackers."""

import json
import sys
import time
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
    the gradient norm, tokens and images per second and the peak memory. Lines of a run that is
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
            lines = (json.loads(line) for line in path.read_text().splitlines() if line)
            self.history = [line for line in lines if line["step"] <= start]
        self._file = path.open("w")
        for line in self.history:
            self._write(line)
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
        self, step: int, values: dict[str, Tensor], norm: Tensor, rate: float, totals: Any
    ) -> None:
        """Take in step `step` (from 0); numbers stay on the device until a line is due."""
        gained = {**values, "grad_norm": norm.detach()}
        gained |= {"tokens_per_s": totals["tokens"], "images_per_s": totals["images"]}
        for name, value in gained.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        done = step + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        if done % self.config.log_every and done != self.config.max_steps:
            return
        if self.main:
            self._line(done, rate)
        self._sums, self._steps, self._clock = {}, 0, time.perf_counter()

    def _line(self, done: int, rate: float) -> None:
        seconds = time.perf_counter() - self._clock
        line = {"step": done, "learning_rate": rate}
        for name, total in self._sums.items():
            line[name] = float(total) / (seconds if name.endswith("_per_s") else self._steps)
        line["peak_mib"] = peak_memory_mib(self.accelerator.device)
        self.history.append(line)
        self._write(line)
        if self.config.report_to:
            self.accelerator.log(line, step=done)
        if self._bar is not None:
            text = (
                f"loss {line['loss']:.4f}  {line['tokens_per_s']:.0f} tokens/s  "
                f"{line['images_per_s']:.1f} images/s  {line['peak_mib']:.0f} MiB"
            )
            self._bar.update(self._task, text=text)

    def _write(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """End the bar, the file and the trackers."""
        if self._bar is not None:
            self._bar.stop()
        if self.main:
            self._file.close()
        if self.config.report_to:
            self.accelerator.end_training()
