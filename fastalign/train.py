"""Post-training in one flat loop on accelerate.

The engine (devices, ranks, mixed precision) is accelerate's. A step is a function of its number:
the samples and the random numbers it draws follow from (seed, step, rank), so a resumed run
repeats nothing and ends as an uninterrupted one.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import _random_states, checkpoint, objectives
from fastalign._prepare import (
    classifier_batches,
    classifier_phase,
    materials,
    parameter_groups,
    prepare_model,
    to_device,
    write_result,
)
from fastalign.config import CALConfig as CALConfig
from fastalign.config import (
    StepSampler,
    check_same_place,
    check_same_run,
    flat,
    learning_rate,
    schedule_state,
)
from fastalign.config import TrainConfig as TrainConfig
from fastalign.data._skip import Skips
from fastalign.data._sources import sample_lengths
from fastalign.models import VLM, Batch
from fastalign.objectives import DeepAlignState, Terms
from fastalign.progress import RunLog
from fastalign.teachers import CachedTeacher, Teacher


@dataclass
class TrainResult:
    """The trained model, what was logged, and where it was written.

    With an intervening DeepAlign also how the classifier did: `classifier` of its training, and
    `classifier_accuracy` on the same held-out pairs without and with the trained adapter.
    """

    model: nn.Module
    history: list[dict[str, float]]
    classifier: objectives.ClassifierReport | None
    path: Path
    classifier_accuracy: objectives.ClassifierAccuracy | None = None


class Step(nn.Module):
    """One objective as a module, so that an engine wraps the whole computation of the loss."""

    def __init__(self, vlm: VLM, state: DeepAlignState | None, config: TrainConfig) -> None:
        super().__init__()
        self.model, self.state = vlm.model, state
        self._vlm, self._bf16 = [vlm], config.bf16
        if state is not None:
            self.objective: Callable[..., Terms] = functools.partial(
                objectives.deepalign, state=state
            )
        elif config.objective == "cal":
            self.objective = functools.partial(objectives.cal, **asdict(config.cal))
        else:
            self.objective = objectives.sft

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Terms:
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16) if self._bf16 else contextlib.nullcontext():
            return self.objective(self._vlm[0], batch, totals=totals)


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    dataset: Any = None,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
    teacher: Teacher | None = None,
) -> TrainResult:
    """Post-train a vision-language model; DeepAlign's two phases are one call.

    Args:
        config: Every setting.
        model: Used instead of loading `config.model`; trained in place.
        dataset: Map-style; used instead of `config.data`. Needs `collate`.
        collate: A list of its samples to a batch (see `VLM`).
        teacher: A batch to features of its views (see `fastalign.teachers`); used instead of
            `config.teacher`. With `config.teacher_cache`, a `PatchTeacher` or a `CachedTeacher`.

    Returns:
        The model, its history and the folder it was written to: `adapter/` where the base stays as
        it is, else `model/`, with `adapter/` beside it if there is one.

    Raises:
        ValueError: A setting or a batch is wrong, the checkpoint to resume is of another run, or
            there are checkpoints of which none verifies.
        FloatingPointError: A loss or gradient is not finite; names the term and the step. Or a
            weight that a checkpoint would hold; names it.
        OSError: The disk did not take a checkpoint; names the file. Those before it are whole.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else ranks on CPUs do not find each other
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(config.seed)
    model, dataset, collate = materials(config, model, dataset, collate)
    skips = Skips(config.on_bad_sample == "skip", config.log_every, config.max_steps, accelerator)
    lengths = sample_lengths(dataset) if config.group_by_length else None
    dataset, collate = skips.wrap(dataset, collate, config.seed)
    vlm, state, parameters, teacher = prepare_model(config, model, accelerator.device, teacher)
    cache = teacher if isinstance(teacher, CachedTeacher) else None
    optimizer = torch.optim.AdamW(parameter_groups(parameters, config), betas=config.betas)
    folder, start, report = Path(config.output_dir), 0, None
    if accelerator.is_main_process:
        checkpoint.remove_leftovers(folder)
    found = checkpoint.newest_valid(folder) if config.resume else None
    if found:
        stored = checkpoint.load(found, checkpoint.trained_tensors(vlm.model, state), optimizer)
        check_same_run(stored["trainer.json"]["config"], config, found)
        start = stored["schedule.json"]["step"]
        if stored["trainer.json"]["classifier"]:
            report = objectives.ClassifierReport(**stored["trainer.json"]["classifier"])
    if state is not None and state.config.intervenes and not found:
        report = classifier_phase(config, vlm, state, dataset, collate)
    sampler = StepSampler(
        len(dataset), config, accelerator.process_index, accelerator.num_processes, start, lengths
    )
    if found:
        check_same_place(stored, sampler, found)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=config.num_workers
    )
    step_module, optimizer = accelerator.prepare(Step(vlm, state, config), optimizer)
    if config.report_to:
        accelerator.init_trackers("fastalign", config=flat(asdict(config)))
    log = RunLog(config, folder, start, accelerator)

    batches = skips.follow(iter(loader))
    if found:
        log.restore(stored["log.safetensors"])
        _random_states.restore_rank(stored["rng.safetensors"], accelerator)
    vlm.model.train()
    for step in range(start, config.max_steps):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        micro = [
            to_device(next(batches), accelerator.device)
            for _ in range(config.gradient_accumulation_steps)
        ]
        totals = _totals(vlm, micro, accelerator)
        shares: list[Terms] = []
        for number, batch in enumerate(micro, 1):
            with (
                accelerator.no_sync(step_module)
                if number < len(micro)
                else contextlib.nullcontext()
            ):
                terms = step_module(batch, totals)
                # Gradients are averaged over ranks, and shares are to be added.
                accelerator.backward(terms["loss"] * accelerator.num_processes)
            shares.append({name: value.detach() for name, value in terms.items()})
        values = _add(shares, accelerator)
        if "weight_sum" in values:
            whole = values.pop("weight_sum")
            values["loss"] = values["loss"] / whole
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(whole)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        _check_finite(values, norm, step)
        if config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values |= skips.counts(step + 1)
        log.step(step, values, norm, optimizer.param_groups[0]["lr"], totals)
        done = step + 1
        saves = config.save_every and done % config.save_every == 0
        if saves and cache is not None:
            cache.flush()
        generators = _random_states.gather(accelerator) if saves else {}
        if saves and accelerator.is_main_process:
            checkpoint.save(
                folder,
                done,
                checkpoint.trained_tensors(vlm.model, state),
                getattr(optimizer, "optimizer", optimizer),
                {
                    "trainer.json": {
                        "config": asdict(config),
                        "classifier": report and asdict(report),
                    },
                    "schedule.json": schedule_state(done, config),
                    "sampler.json": sampler.state(done),
                    "rng.safetensors": generators,
                    "log.safetensors": log.state(),
                },
                config.keep_checkpoints,
            )
    if cache is not None:
        cache.close()
    vlm.model.eval()
    judged = None
    if state is not None and report is not None:
        given = classifier_batches(config, vlm, state, dataset, collate)
        judged = objectives.classifier_accuracy(state, vlm, given, report=report)
    path = write_result(config, vlm, folder) if accelerator.is_main_process else folder
    log.close()
    skips.close()
    return TrainResult(vlm.model, log.history, report, path, judged)


def _totals(vlm: VLM, micro: list[dict[str, Any]], accelerator: Any) -> dict[str, Tensor]:
    """Counts over all micro-batches and ranks of a step."""
    counts = [objectives.counts(vlm, batch) for batch in micro]
    local = torch.stack([torch.stack(list(c.values())) for c in counts]).sum(0).float()
    totals = dict(zip(counts[0], accelerator.reduce(local).unbind(), strict=True))
    batches = len(micro) * accelerator.num_processes
    return {**totals, "batches": torch.tensor(float(batches), device=accelerator.device)}


def _add(shares: list[Terms], accelerator: Any) -> Terms:
    """Shares of all micro-batches and ranks, added."""
    names = list(shares[0])
    local = torch.stack([torch.stack([s[n].float() for n in names]) for s in shares]).sum(0)
    return dict(zip(names, accelerator.reduce(local).unbind(), strict=True))


def _check_finite(values: Terms, norm: Tensor, step: int) -> None:
    bad = [
        name for name, value in (*values.items(), ("gradient norm", norm)) if not value.isfinite()
    ]
    if bad:
        raise FloatingPointError(
            f"{', '.join(bad)} not finite at step {step}: the parameters are those of the step "
            "before; look for NaN in the batch, or lower learning_rate or max_grad_norm"
        )
