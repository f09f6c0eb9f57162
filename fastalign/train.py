"""Post-training in one flat loop on accelerate.

The engine (devices, ranks, mixed precision) is accelerate's. A step is a function of its number:
the samples and the random numbers it draws follow from (seed, step, rank), so a resumed run
repeats nothing and ends as an uninterrupted one.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import _random_states, checkpoint, objectives
from fastalign.adapters import NAME, adapter_of, attach, save_adapter
from fastalign.adapters._peft import prepare_base
from fastalign.adapters._tower import open_tower
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
from fastalign.teachers import CachedTeacher, PatchTeacher, Teacher


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
    model, dataset, collate = _materials(config, model, dataset, collate)
    skips = Skips(config.on_bad_sample == "skip", config.log_every, config.max_steps, accelerator)
    lengths = sample_lengths(dataset) if config.group_by_length else None
    dataset, collate = skips.wrap(dataset, collate, config.seed)
    vlm, state, parameters, teacher = _prepare_model(config, model, accelerator.device, teacher)
    cache = teacher if isinstance(teacher, CachedTeacher) else None
    optimizer = torch.optim.AdamW(_groups(parameters, config), betas=config.betas)
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
        report = _classifier_phase(config, vlm, state, dataset, collate)
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
            _to(next(batches), accelerator.device)
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
        given = _classifier_batches(config, vlm, state, dataset, collate)
        judged = objectives.classifier_accuracy(state, vlm, given, report=report)
    path = _finish(config, vlm, folder) if accelerator.is_main_process else folder
    log.close()
    skips.close()
    return TrainResult(vlm.model, log.history, report, path, judged)


def _materials(
    config: TrainConfig, model: nn.Module | None, dataset: Any, collate: Any
) -> tuple[nn.Module, Any, Any]:
    """Model, dataset and collator: those given, else those that the configuration names."""
    if dataset is not None and collate is None:
        raise ValueError("collate must be given with a dataset: got none")
    if (model is None and not config.model) or (dataset is None and not config.data):
        raise ValueError("config must name a model and data, unless train() is given them")
    if model is None:
        from transformers import AutoModelForImageTextToText

        dtype = torch.bfloat16 if config.bf16 and not config.trains_base else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype)
    if dataset is None:
        from transformers import AutoProcessor

        from fastalign.data import Collator, open_data

        dataset = open_data(config.data, config.image_root, on_error=config.on_bad_sample)
        source = config.model or str(model.name_or_path)
        loader: Any = AutoProcessor
        processor = loader.from_pretrained(source)
        # A model learns to stop from the end token, which LLaVA-1.5's template leaves out.
        ends = processor.tokenizer.eos_token is not None
        collate = Collator(
            processor,
            max_length=config.max_length,
            on_overflow=config.on_overflow,
            append_eos=ends,
        )
    return model, dataset, collate


def _prepare_model(
    config: TrainConfig,
    model: nn.Module,
    device: torch.device,
    teacher: Teacher | None,
) -> tuple[VLM, DeepAlignState | None, list[nn.Parameter], Teacher | None]:
    """Adapter attached, base frozen or not, the objective's state, and its teacher."""
    model.to(device)
    if config.needs_adapter and getattr(model, NAME, None) is None:
        attach(model, config.adapter)
    vlm = VLM(model)
    prepare_base(model, config.trainable == "all", config.trains_base)
    if config.train_vision_from is not None:
        open_tower(vlm, config.train_vision_from)
    if config.needs_adapter:
        # Master weights in float32, whatever the base is kept in.
        adapter_of(model).float().requires_grad_(True)
    state = None
    if config.objective == "deepalign":
        teacher = _teacher(config, vlm, device, teacher)
        state = DeepAlignState(vlm, config.deepalign, teacher)
    return vlm, state, [p for p in model.parameters() if p.requires_grad], teacher


def _teacher(
    config: TrainConfig, vlm: VLM, device: torch.device, teacher: Teacher | None
) -> Teacher | None:
    """The teacher given, else the one that the configuration names; cached when that asks for it.

    Raises:
        ValueError: A cache is asked for a callable that cannot be told from others.
    """
    if teacher is None and config.teacher:
        teacher = PatchTeacher.from_pretrained(
            config.teacher,
            config.model or str(vlm.model.name_or_path),
            image_size=config.teacher_image_size,
            views=vlm.views,
        ).to(device)
    if teacher is None or not config.teacher_cache or isinstance(teacher, CachedTeacher):
        return teacher
    if not isinstance(teacher, PatchTeacher):
        raise ValueError(
            "teacher_cache needs a teacher by path or a PatchTeacher: wrap a callable of your own, "
            "teacher=CachedTeacher(teacher, folder, name=..., views=VLM(model).views)"
        )
    return CachedTeacher(teacher, config.teacher_cache)


def _groups(parameters: list[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() <= 1]
    groups = [(decayed, config.weight_decay), (others, 0.0)]
    return [{"params": p, "weight_decay": decay, "lr": 0.0} for p, decay in groups if p]


def _classifier_phase(
    config: TrainConfig, vlm: VLM, state: DeepAlignState, dataset: Any, collate: Any
) -> objectives.ClassifierReport:
    batches = _classifier_batches(config, vlm, state, dataset, collate)
    vlm.model.eval()
    report = objectives.fit_classifier(state, vlm, batches)
    if report.warning:
        warnings.warn(report.warning, stacklevel=3)
    return report


def _classifier_batches(
    config: TrainConfig, vlm: VLM, state: DeepAlignState, dataset: Any, collate: Any
) -> Iterator[Batch]:
    """Every rank takes the same pairs, so that all hold the same classifier."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
    chosen = order[: 2 * state.config.classifier_pairs].tolist()
    size, device = config.batch_size, next(vlm.model.parameters()).device
    for i in range(0, len(chosen), size):
        yield _to(collate([dataset[j] for j in chosen[i : i + size]]), device)


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()
    }


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


def _finish(config: TrainConfig, vlm: VLM, folder: Path) -> Path:
    """Write the result; the adapter goes back to the dtype of its base."""
    if config.needs_adapter:
        save_adapter(vlm.model, folder / "adapter")
        adapter_of(vlm.model).place(vlm)
    if not config.trains_base:
        return folder / "adapter"
    kept = {k: v for k, v in vlm.model.state_dict().items() if not k.startswith(NAME + ".")}
    vlm.model.save_pretrained(folder / "model", state_dict=kept)
    return folder / "model"
