"""MIR while a `transformers.Trainer` trains, and an end to training when it stops falling."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback

from fastalign.diagnostics import measure_mir
from fastalign.diagnostics._modalities import check_image_tokens
from fastalign.metrics import ModalityIntegrationRate
from fastalign.models import VLM
from fastalign.ops._check import check_one_of, check_positive

Batches = Iterable[Mapping[str, Any]]


class MIRCallback(TrainerCallback):
    r"""Measures MIR every few steps, logs "mir" and "mir_seconds", and may stop training.

    In pre-training MIR fell steeply, then stood still as the model stopped gaining (Huang et al.
    2025, section 2.3, who propose to stop there); `patience` does so. MIR is a gap between
    modalities, not quality, and need not fall: docs/mir.md has a case where it rises.

    The states stream through `ModalityIntegrationRate`, in evaluation mode and without gradient;
    modes and torch's random state are put back, so that training takes the same course with it.
    Every rank runs its share of the batches, and the sums are joined: the value is that of one.

        trainer.add_callback(MIRCallback(dataset, collate=trainer.data_collator, trainer=trainer))

    Args:
        data: Batches of images and text; or, with `collate`, a dataset of samples. Batches are read
            once and kept in memory. The same data is used each time, so that values compare.
        every: Steps of the optimizer between two measurements.
        samples: How many to use: of a dataset as many drawn at random; of batches as many whole
            batches as it takes.
        patience: Measurements in a row without a new minimum after which training stops; None to
            go on. A NaN is no minimum.
        min_delta: How far below the old one a new minimum must lie, in MIR (log 10 of the sum of
            distances).
        collate: Makes a batch of a list of samples.
        batch_size: Samples in a batch, with `collate`.
        seed: Of the draw, with `collate`.
        method, outliers: See `ModalityIntegrationRate`.
        text: See `fastalign.diagnostics.measure_mir`.
        trainer: Whose `log` is called, so that values reach its trackers and console. A callback
            is given no trainer: without one, values go to `state.log_history` only, and a
            `report_to` is refused.

    Attributes:
        history: {"step", "mir", "seconds", "layer", "fid"} of each measurement of this run, as
            `plot_mir_per_layer` takes them.

    Raises:
        ValueError: A setting is out of its range; at the start of training: `report_to` names a
            tracker and `trainer` is None, weights are sharded, or the model has no image tokens.
    """

    def __init__(
        self,
        data: Any,
        *,
        every: int = 500,
        samples: int = 100,
        patience: int | None = None,
        min_delta: float = 0.0,
        collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        batch_size: int = 8,
        seed: int = 0,
        method: Literal["newton_schulz", "eigh", "official_fast"] = "newton_schulz",
        outliers: Literal["remove", "median", "keep"] = "remove",
        text: Literal["all", "after"] = "all",
        trainer: Any = None,
    ) -> None:
        counts = {"every": every, "samples": samples, "batch_size": batch_size}
        for name, value in (counts | ({} if patience is None else {"patience": patience})).items():
            check_positive(name, value)
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0: got {min_delta}")
        check_one_of("text", text, ("all", "after"))
        ModalityIntegrationRate(1, 1, method=method, outliers=outliers)  # refuses other values
        self.every, self.samples = every, samples
        self.patience, self.min_delta = patience, min_delta
        self.batch_size, self.seed, self.collate = batch_size, seed, collate
        self.method, self.outliers, self.text = method, outliers, text
        self.trainer = trainer
        self.history: list[dict[str, Any]] = []
        self._data = data
        self._own: list[Mapping[str, Any]] | None = None  # this rank's batches, once read
        self._best, self._without = math.inf, 0

    # Events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the trainer is; go on from the values in the log of a resumed run."""
        if self.trainer is None and args.report_to:
            raise ValueError(
                f"trainer must be given, as report_to is {args.report_to} and a callback cannot "
                "reach it: trainer.add_callback(MIRCallback(data, trainer=trainer)); or pass "
                "report_to=[]"
            )
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "the model must be whole on every rank for MIRCallback: ranks run different "
                "numbers of batches, and sharded weights (FSDP, DeepSpeed) would wait for each "
                "other; use DDP, or measure checkpoints with fastalign mir"
            )
        check_image_tokens(self._view(kwargs["model"]))
        self.history, self._best, self._without = [], math.inf, 0
        for line in state.log_history:
            if "mir" in line:
                self._judge(line["mir"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, log and judge, every `every` steps."""
        if state.global_step % self.every:
            return
        start = time.perf_counter()
        found = self._measure(kwargs["model"], args.process_index, args.world_size)
        seconds = time.perf_counter() - start
        self.history.append({"step": state.global_step, "seconds": seconds, **found})
        line = {"mir": found["mir"], "mir_seconds": seconds}
        if self.trainer is None:
            state.log_history.append({**line, "epoch": state.epoch, "step": state.global_step})
        else:
            # Logging takes the line of the losses, which may be due at this step too, as written.
            due = control.should_log
            self.trainer.log(line)
            control.should_log = due
        if self._judge(found["mir"]):
            control.should_training_stop = True

    # What they do

    def _judge(self, mir: float) -> bool:
        """Take a value in; whether MIR has not fallen for `patience` values."""
        if mir < self._best - self.min_delta:
            self._best, self._without = mir, 0
        else:
            self._without += 1
        return self.patience is not None and self._without >= self.patience

    def _measure(self, model: nn.Module, rank: int, ranks: int) -> dict[str, Any]:
        vlm = self._view(model)
        with torch.random.fork_rng(devices=[]):  # a loader may draw its order from the generator
            found = measure_mir(
                vlm,
                self._share(rank, ranks),
                method=self.method,
                outliers=self.outliers,
                text=self.text,
            )
        if ranks > 1:  # what ends training must be the same number everywhere
            device = next(vlm.model.parameters()).device
            mir = torch.tensor(found["mir"], dtype=torch.float64, device=device)
            torch.distributed.broadcast(mir, 0)
            found["mir"] = float(mir)
        return found

    @staticmethod
    def _view(model: Any) -> VLM:
        return VLM(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _share(self, rank: int, ranks: int) -> Iterable[Mapping[str, Any]]:
        """This rank's batches: every `ranks`-th."""
        if self.collate is not None:
            return self._collated(rank, ranks, self.collate)
        if self._own is None:
            self._own = [b for i, b in enumerate(self._first_batches()) if i % ranks == rank]
            self._data = None
        return self._own

    def _first_batches(self) -> Iterator[Mapping[str, Any]]:
        left = self.samples
        for batch in self._data:
            yield batch
            left -= len(batch["input_ids"])
            if left <= 0:
                return

    def _collated(
        self, rank: int, ranks: int, collate: Callable[[list[Any]], Mapping[str, Any]]
    ) -> Batches:
        """Batches made anew each time: images in memory would take more than decoding takes."""
        size = len(self._data)
        drawn = random.Random(self.seed).sample(range(size), min(self.samples, size))
        groups = [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]
        for group in groups[rank::ranks]:
            yield collate([self._data[i] for i in group])
