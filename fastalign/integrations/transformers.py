"""SFT, CAL and DeepAlign in `transformers.Trainer`, or in any trainer derived from it.

A step of the Trainer may span several micro-batches and ranks. What an objective divides by is
counted over all of them before the first forward, so that the shares add up to the value of one
large batch, and DeepAlign's mutual information sees the pairs of all of them. CAL's summed weights
are known at the end of the step only: gradients and loss are divided there, before the Trainer
clips.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fastalign import objectives
from fastalign.adapters import NAME, load_adapter, save_adapter
from fastalign.config import CALConfig
from fastalign.integrations._engine import (
    call_inside,
    check_engine,
    check_settings,
    load_weights,
    make_objective,
)
from fastalign.integrations._mir_callback import MIRCallback as MIRCallback
from fastalign.integrations._nonfinite import FiniteSteps
from fastalign.models import VLM
from fastalign.objectives import DeepAlignState, MutualShare, Terms, mutual_shares

if TYPE_CHECKING:
    _AnyTrainer = Any
else:
    _AnyTrainer = object

# Under a folder of their own, where no library looks for its adapters.
STATE, ADAPTER = "fastalign/deepalign_state.safetensors", "fastalign/adapter"


class AlignmentMixin(_AnyTrainer):  # type: ignore[misc]
    """What makes a trainer minimise an objective of fastalign; `class T(AlignmentMixin, Base)`.

    The model's own loss and its full logits are never formed. Logged every `logging_steps`: "loss"
    and the terms of the objective ("ce", "accuracy", with CAL "delta" and "weight"), means over the
    steps since the last line and over all ranks. `evaluate` gives "eval_loss", the objective's
    value by batch, and the terms as "eval_ce" and so on, means over label tokens.

    Args:
        args, kwargs: Of the trainer.
        objective: "sft", "cal" or "deepalign".
        objective_options: Of "cal": a `CALConfig`, or its fields as a mapping.
        state: Of "deepalign": a `DeepAlignState` whose classifier is fitted, on the model's device.

    Raises:
        TypeError: The model is no image-text-to-text model, or has LoRA on its head.
        ValueError: An option is unknown, or a setting of the trainer contradicts the objective.
        FloatingPointError: From `train`: a tensor of a step is not finite; names the first. Neither
            the optimizer nor a checkpoint has seen the step.
    """

    # Every loss is its share of the step, whatever the number of micro-batches.
    loss_is_scaled_for_ga: bool | None = True

    def __init__(
        self,
        *args: Any,
        objective: str = "sft",
        objective_options: CALConfig | Mapping[str, Any] | None = None,
        state: DeepAlignState | None = None,
        **kwargs: Any,
    ) -> None:
        self.alignment_objective, self.alignment_state = objective, state
        self._compute = make_objective(objective, objective_options, state)
        self._late = objective == "cal" and self._compute.keywords["normalize"] == "mean"  # type: ignore[attr-defined]
        self._vlm: VLM | None = None
        self._totals: dict[str, Tensor] | None = None
        self._sharing = False
        self._micro: list[Any] = []
        self._mutual: Iterator[MutualShare | None] | None = None
        self._finite = FiniteSteps(self, state)
        self._values: Terms = {}
        self._sums: Terms = {}
        self._window: Terms = {}
        self._window_steps = 0
        self._evaluated: Terms = {}
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        check_settings(self, self._late)
        self._check_columns()
        check_engine(self, self._late, getattr(self._base(), NAME, None) is not None)
        self._view()

    # What it runs on

    def create_accelerator_and_postprocess(self) -> None:
        """As the trainer's, but DDP looks for unused parameters also with checkpointing.

        A batch without images leaves the vision tower out, and other ranks would wait for its
        gradients for ever. Only reentrant checkpointing does not allow it.
        """
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
        if self.args.ddp_find_unused_parameters is None and not reentrant:
            self.args.ddp_find_unused_parameters = True
        super().create_accelerator_and_postprocess()

    def _check_columns(self) -> None:
        if self.args.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be False in TrainingArguments: the Trainer would drop "
                "what the model's forward does not name before the collator sees it"
            )

    def _base(self) -> Any:
        """The transformers model inside the engine's wrapper and PEFT's."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _view(self) -> VLM:
        base = self._base()
        if self._vlm is None or self._vlm.model is not base:
            self._vlm = VLM(base)
        return self._vlm

    def _batch(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as the objective takes it, of one as the collator made it."""
        return dict(inputs)

    # One step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; a line of the log never reaches back into an earlier call."""
        self._window, self._window_steps = {}, 0
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step; what the objective divides by is counted over them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._sums = {}
        self._micro, self._mutual = batches, None
        self._totals = self._count(batches) if batches else None
        self._finite.begin([self._batch(batch) for batch in batches], self._view(), self._totals)
        return batches, items

    def _count(self, batches: list[Any]) -> dict[str, Tensor]:
        """Label tokens, samples, pairs, images and batches, over all ranks."""
        vlm = self._view()
        counts = [objectives.counts(vlm, self._batch(batch)) for batch in batches]
        local = torch.stack([torch.stack(list(c.values())) for c in counts]).sum(0)
        local = torch.cat([local, local.new_tensor([len(batches)])]).float()
        whole = self.accelerator.reduce(local.to(self.args.device))
        return dict(zip([*counts[0], "batches"], whole.unbind(), strict=True))

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch.

        Returns:
            The loss of the whole step, over all its micro-batches and ranks, at its last
            micro-batch; 0 at the others. The Trainer adds them up.
        """
        if self._totals is None:
            raise RuntimeError("training_step must follow get_batch_samples, which counts the step")
        self._sharing = True
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._sharing = False
        if self.accelerator.sync_gradients:
            loss = self._finish_step(model)
            return loss
        return torch.zeros_like(loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective: in `training_step` a share of the step's loss, else the batch's own.

        Args:
            model: Possibly wrapped by an engine.
            inputs: A batch with labels.
            return_outputs: Also return the terms, without gradient; there are no logits.
            num_items_in_batch: Not used: a step is counted by `get_batch_samples`.
        """
        totals = self._totals if self._sharing else None
        mutual = None if totals is None else self._next_share(model)
        loss, terms = self._run(model, inputs, totals, mutual)
        if totals is not None:
            for name, value in terms.items():
                self._sums[name] = self._sums.get(name, 0) + value.float()
        return (loss, terms) if return_outputs else loss

    def _next_share(self, model: nn.Module) -> MutualShare | None:
        """What the next micro-batch of the step knows of all; the first call asks them all."""
        if self._mutual is None:

            def run(batch: Any, function: Callable[[Any], Any]) -> Any:
                return self._inside(model, function, self._prepare_inputs(batch))

            vlm, state = self._view(), self.alignment_state
            shares = mutual_shares(vlm, self._micro, state=state, run=run)
            self._finite.shares, self._mutual = shares, iter(shares)
        return next(self._mutual)

    def _inside(self, model: nn.Module, function: Callable[[Any], Any], inputs: Any) -> Any:
        """`function` of the batch through `model`'s outermost call, in the trainer's precision."""

        def forward(batch: dict[str, Any]) -> Any:
            # accelerate puts autocast around the model's own forward, not around this one.
            with self.accelerator.autocast():
                return function(batch)

        module = self.accelerator.unwrap_model(model)
        return call_inside(model, module, forward, self._batch(inputs))

    def _run(
        self,
        model: nn.Module,
        inputs: Any,
        totals: Mapping[str, Tensor] | None,
        mutual: MutualShare | None = None,
    ) -> tuple[Tensor, Terms]:
        """The loss through `model`'s outermost call, and the terms beside it.

        An engine may round what leaves the call (FSDP2's output_dtype), so the loss is scaled
        inside it, and the terms do not leave through it.
        """
        vlm = self._view()
        found: Terms = {}

        def objective(batch: dict[str, Any]) -> Tensor:
            more = {} if mutual is None else {"mutual": mutual}
            terms = self._compute(vlm, batch, totals=totals, **more)
            found.update({name: value.detach() for name, value in terms.items()})
            loss = terms["loss"]
            if totals is None:
                return loss
            if self._late:  # a sum: kept at the size of a mean until the weights are known
                loss = loss / totals["tokens"].clamp_min(1.0)
            # Gradients are averaged over ranks, and shares are to be added.
            ranks: int = self.accelerator.num_processes
            return loss * ranks

        loss: Tensor = self._inside(model, objective, inputs)
        return loss, found

    @torch.no_grad()
    def _finish_step(self, model: nn.Module) -> Tensor:
        """Terms of the whole step; gradients divided by what was not known before."""
        assert self._totals is not None
        self._sums["inputs"] = self._finite.flag()
        local = torch.stack(list(self._sums.values()))
        whole_step: Tensor = self.accelerator.reduce(local)
        values: Terms = dict(zip(self._sums, whole_step.unbind(), strict=True))
        self._sums = {}
        self._micro, self._mutual = [], None
        whole = values.pop("weight_sum", None)
        if whole is not None:
            factor = torch.where(whole > 0, self._totals["tokens"] / whole, 0.0)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor.to(parameter.grad.device))
            values["loss"] = torch.where(whole > 0, values["loss"] / whole, 0.0)
        self._values = dict(values)
        del values["inputs"]
        loss = values.pop("loss")
        for name, value in values.items():
            self._window[name] = self._window.get(name, 0) + value
        self._window_steps += 1
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the trainer's, which asks for it before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._finite.check(model, self._values, norm)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with the terms of the steps since the last line."""
        if "loss" in logs and self._window_steps:
            means = torch.stack(list(self._window.values())) / self._window_steps
            logs.update(zip(self._window, means.tolist(), strict=True))
            self._window, self._window_steps = {}, 0
        super().log(logs, *args, **kwargs)

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, with the mean of each term over all label tokens.

        A sample that a sampler repeats to fill the last batch of every rank counts twice in them.
        """
        self._evaluated = {}
        output = super().evaluation_loop(*args, **kwargs)
        if self._evaluated:
            prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
            whole = self.accelerator.reduce(torch.stack(list(self._evaluated.values())))
            sums = dict(zip(self._evaluated, whole.tolist(), strict=True))
            tokens = max(sums.pop("tokens"), 1.0)
            output.metrics.update({f"{prefix}_{k}": v / tokens for k, v in sums.items()})
            self._evaluated = {}
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; never logits or labels, whatever `prediction_loss_only` says."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            totals, ranks = None, self.accelerator.num_processes
            if self.alignment_state is not None and ranks > 1:
                # Its negatives are those of all ranks: a rank without pairs must know of them.
                totals = self._count([inputs])
            loss, terms = self._run(model, inputs, totals)
        tokens = (inputs["labels"][:, 1:] != -100).sum().float()
        scale = tokens if totals is None else totals["tokens"]
        terms = {name: value * scale for name, value in terms.items() if name != "loss"}
        for name, value in {"tokens": tokens, **terms}.items():
            self._evaluated[name] = self._evaluated.get(name, 0) + value.float()
        return loss.detach(), None, None

    # Files

    def _plain(self) -> bool:
        """Whether the model's weights are transformers' own to save and load."""
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return not engine and isinstance(self.model, PreTrainedModel)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the trainer's, with an attached adapter and the state beside the plain model."""
        folder, base = Path(output_dir or self.args.output_dir), self._base()
        adapted = getattr(base, NAME, None) is not None
        if adapted and state_dict is None and self._plain():
            tensors = base.state_dict()
            state_dict = {k: v for k, v in tensors.items() if not k.startswith(NAME + ".")}
        super()._save(output_dir, state_dict)
        if self.args.should_save and adapted:
            save_adapter(base, folder / ADAPTER)
        if self.args.should_save and self.alignment_state is not None:
            tensors = self.alignment_state.state_dict()
            (folder / STATE).parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._plain():
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_extras(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if self._plain():
            load_weights(self.model, best)
        else:
            super()._load_best_model()
        self._load_extras(best)

    def _load_extras(self, folder: Path) -> None:
        if getattr(self._base(), NAME, None) is not None:
            load_adapter(self._base(), folder / ADAPTER)
        if self.alignment_state is not None:
            if not (folder / STATE).is_file():
                raise FileNotFoundError(
                    f"a checkpoint of DeepAlign must hold {STATE}: {folder} does not; fit a new "
                    "state and start anew"
                )
            self.alignment_state.load_state_dict(load_file(folder / STATE))


class AlignmentTrainer(AlignmentMixin, Trainer):
    """`transformers.Trainer` with `objective="sft" | "cal" | "deepalign"`; see `AlignmentMixin`.

    `TrainingArguments` must have `remove_unused_columns=False`.
    """
