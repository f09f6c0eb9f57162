"""The trainers' guard: a step that is not finite ends training, before the optimizer sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign._run.diagnosis import Beginning, StepAgain
from fastalign._run.looks import unfit
from fastalign.models import VLM
from fastalign.objectives import DeepAlignState, MutualShare, Terms


class FiniteSteps:
    """Watches the steps of one trainer.

    Args:
        trainer: An `AlignmentMixin`.
        state: Of its objective.
    """

    def __init__(self, trainer: Any, state: DeepAlignState | None) -> None:
        self.trainer, self.state = trainer, state
        self._beginning: Beginning | None = None
        self._vlm: VLM | None = None

    def begin(self, batches: Sequence[Mapping[str, Any]], vlm: VLM, totals: Any) -> None:
        """Look at the micro-batches of a step, and note what it starts from."""
        if self._beginning is None or self._vlm is not vlm:
            self._beginning = Beginning(vlm.model, self.state, self.trainer.args.device)
        self._vlm, self._batches, self._totals = vlm, batches, totals
        self.shares: Sequence[MutualShare | None] = [None] * len(batches)
        self._flag = sum((unfit(batch) for batch in batches), start=0.0)
        self._beginning.keep()

    def flag(self) -> Tensor:
        """NaN where a tensor of this rank's batches is not finite, else 0."""
        return torch.zeros((), device=self.trainer.args.device) + self._flag

    def check(self, model: nn.Module, values: Terms, norm: Any) -> None:
        """Raise unless the terms of the whole step, its inputs and its gradients are finite.

        Raises:
            FloatingPointError: Names the step and the first tensor; on every rank.
        """
        looked = {name: torch.as_tensor(value) for name, value in values.items()}
        if norm is not None and self.trainer.accelerator.scaler is None:  # which leaves steps out
            looked["gradient norm"] = torch.as_tensor(norm)
        device = self.trainer.args.device
        seen = torch.stack([v.detach().to(device, torch.float32) for v in looked.values()])
        if seen.isfinite().all():
            return
        assert self._beginning is not None and self._vlm is not None
        again = StepAgain(
            self._vlm,
            self.state,
            lambda number: self._run(model, number),
            self._batches,
            lambda number: None,
            self._beginning,
            self.trainer.accelerator,
            model,
        )
        bad = [name for name, value in looked.items() if not value.isfinite().all()]
        message = again.describe(bad, self.trainer.state.global_step + 1)
        self._beginning.restore()
        raise FloatingPointError(f"{message}; mend the data, lower learning_rate or max_grad_norm")

    def _run(self, model: nn.Module, number: int) -> Terms:
        inputs = self.trainer._prepare_inputs(self._batches[number])
        loss, terms = self.trainer._run(model, inputs, self._totals, self.shares[number])
        return {**terms, "loss": loss / self.trainer.accelerator.num_processes}
