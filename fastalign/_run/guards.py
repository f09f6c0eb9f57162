"""Guards of a run: no step that is not finite is taken, and what ends a run says why.

A healthy step pays for one look at numbers that all ranks hold anyway. All ranks see the same, so
they stop, or leave a step out, together; only then is the step run again to find what was first.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastalign._run.diagnosis import Beginning, StepAgain
from fastalign._run.failures import (
    Ranks,
    is_lost_rank,
    is_out_of_memory,
    lost_rank,
    short_of_memory,
)
from fastalign._run.looks import bad_input, unfit
from fastalign._run.steps import Steps
from fastalign.config import StepSampler, TrainConfig
from fastalign.models import VLM
from fastalign.objectives import DeepAlignState, Terms

MOST_IN_ROW = 10  # steps left out; the next ones would be, too

_log = logging.getLogger("fastalign.train")


def usable_pairs(
    config: TrainConfig, vlm: VLM, batch: Mapping[str, Any], indices: Sequence[Any]
) -> bool:
    """Whether the classifier may be given a batch; every rank has the same ones.

    Raises:
        FloatingPointError: A tensor of it is not finite, and is not to be skipped.
    """
    if math.isfinite(float(unfit(batch))):
        return True
    known = config.on_bad_sample == "raise" and all(isinstance(i, int) for i in indices)
    given = indices if known else None
    found = bad_input(vlm, batch, "a batch of the classifier's pairs", given)
    if config.on_nonfinite == "raise":
        raise FloatingPointError(
            f'{found} not finite: mend the data, or leave such batches out with on_nonfinite="skip"'
        )
    _log.warning("batch left out: %s not finite", found)
    return False


class Guard:
    """Watches the steps of a run; as a context it explains what ends it.

    Args:
        config: Its `on_nonfinite` and `ddp_timeout`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.step = config, -1
        self._ranks = Ranks()
        self._unfit: list[float | Tensor] = []
        self._in_row = 0

    def watch(
        self,
        vlm: VLM,
        state: DeepAlignState | None,
        ends: Steps,
        accelerator: Any,
        sampler: Any,
    ) -> None:
        """Say what is trained, before the first step.

        Args:
            vlm, state: The model and what its objective carries along.
            ends: Of the run; their module is (batch, totals=, mutual=) -> terms.
            accelerator, sampler: Of the run.
        """
        self._vlm, self._state, self._ends = vlm, state, ends
        self._accelerator, self._sampler = accelerator, sampler
        self._beginning = Beginning(vlm.model, state, accelerator.device)

    # One step

    def steps(self, numbers: Iterable[int]) -> Iterator[int]:
        """The same numbers, noted."""
        for self.step in numbers:
            self._unfit = []
            yield self.step

    def follow(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
        """The same batches, looked at where they lie, before they are moved to the device."""
        for batch in batches:
            self._unfit.append(unfit(batch))
            yield batch

    def begin(
        self, micro: Sequence[Mapping[str, Any]], *, totals: Any, mutual: Sequence[Any]
    ) -> None:
        """Note what the step starts from: its micro-batches and what else their forwards take."""
        self._micro, self._totals, self._mutual = micro, totals, mutual
        self._beginning.keep()

    def with_inputs(self, shares: list[Terms]) -> list[Terms]:
        """The terms of each micro-batch, with one that is NaN where its inputs are not finite."""
        device = self._accelerator.device
        pairs = zip(shares, self._unfit, strict=True)
        return [{**terms, "inputs": torch.zeros((), device=device) + flag} for terms, flag in pairs]

    def accepts(self, values: Terms, norm: Tensor) -> bool:
        """Whether the optimizer may take the step; all ranks get the same answer.

        Args:
            values: Terms of the whole step, "inputs" among them, which is taken out. Those of a
                step that is left out go too, and "skipped_steps" comes in where steps may be.
            norm: Of the gradients.

        Raises:
            FloatingPointError: Something is not finite, and is not to be skipped, or too often.
        """
        looked = {**values, "gradient norm": norm}
        seen = torch.stack([v.detach().to(values["inputs"]) for v in looked.values()])
        skips, ok = self.config.on_nonfinite == "skip", bool(seen.isfinite().all())
        if skips:
            values["skipped_steps"] = torch.full_like(values["inputs"], 0.0 if ok else 1.0)
        del values["inputs"]
        self._in_row = 0 if ok else self._in_row + 1
        if ok:
            return True
        bad = [k for k, v in looked.items() if not v.isfinite().all()]
        message = self._message(bad)
        self._beginning.restore()
        if not skips:
            raise FloatingPointError(
                f"{message}; mend the data, lower learning_rate or max_grad_norm, or leave such "
                'steps out with on_nonfinite="skip"'
            )
        if self._in_row >= MOST_IN_ROW:
            raise FloatingPointError(f"{message}; it is the last of {self._in_row} such in a row")
        if self._accelerator.is_main_process:
            _log.warning("step left out: %s", message)
        for name in values.keys() - {"skipped_steps"}:
            del values[name]
        return False

    def _message(self, bad: list[str]) -> str:
        again = StepAgain(
            self._vlm,
            self._state,
            self._run,
            self._micro,
            self._indices,
            self._beginning,
            self._accelerator,
            self._ends.module,
            self._ends,
        )
        return again.describe(bad, self.step + 1)

    def _run(self, number: int) -> Terms:
        share = self._mutual[number]
        more = {} if share is None else {"mutual": share}
        terms: Terms = self._ends.module(self._micro[number], totals=self._totals, **more)
        return terms

    def _indices(self, number: int) -> Sequence[int] | None:
        """Where a micro-batch's samples stand in the data; unknown where rows may be others."""
        lost = self.config.on_bad_sample == "skip" or self.config.pack_text
        if lost or not isinstance(self._sampler, StepSampler):
            return None
        sampler = copy.copy(self._sampler)
        sampler.start = self.step
        return next(itertools.islice(iter(sampler), number, None))

    # What ends a run

    def __enter__(self) -> Guard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        where = f"in step {self.step + 1}" if self.step >= 0 else "before the first step"
        if is_out_of_memory(error):
            explained = short_of_memory(error, self.config, where)
            self._ranks.stopped(explained, where)
            raise explained from error
        if is_lost_rank(error):
            raise lost_rank(error, self.config, self._ranks, where) from error
        self._ranks.stopped(error, where)
