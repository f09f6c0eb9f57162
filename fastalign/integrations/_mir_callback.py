"""MIR while a `transformers.Trainer` trains, and an end to training when it stops falling."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from transformers import TrainerCallback

from fastalign._run.mir_watch import MIRWatch, check_whole
from fastalign.metrics import ModalityIntegrationRate
from fastalign.models import VLM
from fastalign.models._mir import check_image_tokens
from fastalign.ops._check import check_one_of, check_positive


class MIRCallback(TrainerCallback):
    r"""Measures MIR every few steps, logs "mir" and "mir_seconds", and may stop training.

    In pre-training MIR fell steeply, then stood still as the model stopped gaining (Huang et al.
    2025, section 2.3, who propose to stop there); `patience` does so. MIR is a gap between
    modalities, not quality, and need not fall: docs/mir.md has a case where it rises.

    The states stream through `ModalityIntegrationRate`, in evaluation mode and without gradient;
    modes and random states are put back, so that training takes the same course with it.
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
        self.trainer = trainer
        self.history: list[dict[str, Any]] = []
        self._watch = MIRWatch(
            data,
            every=every,
            samples=samples,
            patience=patience,
            min_delta=min_delta,
            collate=collate,
            batch_size=batch_size,
            seed=seed,
            method=method,
            outliers=outliers,
            text=text,
        )

    # Events

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check what the trainer is; go on from the values in the log of a resumed run."""
        if self.trainer is None and args.report_to:
            raise ValueError(
                f"trainer must be given, as report_to is {args.report_to} and a callback cannot "
                "reach it: trainer.add_callback(MIRCallback(data, trainer=trainer)); or pass "
                "report_to=[]"
            )
        check_whole("DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else "")
        check_image_tokens(self._view(kwargs["model"]))
        self.history = []
        self._watch.forget()
        for line in state.log_history:
            if "mir" in line:
                self._watch.judge(line["mir"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, log and judge, every `every` steps."""
        if state.global_step % self._watch.every:
            return
        start = time.perf_counter()
        vlm = self._view(kwargs["model"])
        found = self._watch.measure(vlm, args.process_index, args.world_size)
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
        self._watch.judge(found["mir"])
        if self._watch.stands_still:
            control.should_training_stop = True

    @staticmethod
    def _view(model: Any) -> VLM:
        return VLM(model.get_base_model() if hasattr(model, "get_base_model") else model)
