"""Post-training in one flat loop on accelerate.

The engine (devices, ranks, mixed precision) is accelerate's. A step is a function of its number:
the samples and the random numbers it draws follow from (seed, step, rank), so a resumed run
repeats nothing and ends as an uninterrupted one.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import checkpoint, objectives
from fastalign._run import random_states
from fastalign._run.engines import Step, make_accelerator, run_whole
from fastalign._run.guards import Guard
from fastalign._run.mir_watch import watch_of
from fastalign._run.prepare import (
    classifier_batches,
    classifier_phase,
    materials,
    parameter_groups,
    prepare_model,
    to_device,
    write_result,
)
from fastalign._run.steps import steps_of
from fastalign._run.stream_order import lengths_of, sampler_of, watched
from fastalign.config import CALConfig as CALConfig
from fastalign.config import TrainConfig as TrainConfig
from fastalign.config import (
    check_same_place,
    check_same_run,
    flat,
    learning_rate,
    schedule_state,
)
from fastalign.data._skip import Skips
from fastalign.models import VLM, is_sharded
from fastalign.objectives import Terms
from fastalign.progress import RunLog
from fastalign.teachers import CachedTeacher, Teacher


@dataclass
class TrainResult:
    """The trained model, what was logged, and where it was written.

    `path` is `adapter/` or `model/` of the run's folder; LoRA of PEFT's lies beside it in `lora/`.
    With an intervening DeepAlign also how the classifier did: `classifier` of its training, and
    `classifier_accuracy` on the same held-out pairs without and with the trained adapter.
    """

    model: nn.Module
    history: list[dict[str, float]]
    classifier: objectives.ClassifierReport | None
    path: Path
    classifier_accuracy: objectives.ClassifierAccuracy | None = None


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
        FloatingPointError: A tensor of a step is not finite; names the first, its rank and the
            step. Or a weight that a checkpoint would hold; names it.
        RuntimeError: Another rank was lost; names it as far as it is known, and the step.
        torch.OutOfMemoryError: Names the settings that would help; on the CPU a RuntimeError.
        OSError: The disk did not take a checkpoint; names the file. Those before it are whole.
    """
    with Guard(config) as guard:
        return _train(config, guard, model, dataset, collate, teacher)


def _train(
    config: TrainConfig,
    guard: Guard,
    model: nn.Module | None,
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, Any]] | None,
    teacher: Teacher | None,
) -> TrainResult:
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)
    model, dataset, collate = materials(config, model, dataset, collate)
    skips = Skips(config.on_bad_sample == "skip", config.log_every, config.max_steps, accelerator)
    lengths = lengths_of(dataset, config)
    dataset, collate = skips.wrap(dataset, collate, config.seed)
    vlm, state, parameters, teacher = prepare_model(
        config, model, accelerator.device, teacher, accelerator.is_fsdp2
    )
    cache = teacher if isinstance(teacher, CachedTeacher) else None
    optimizer = torch.optim.AdamW(parameter_groups(parameters, config), betas=config.betas)
    loss_of = Step(vlm, state, config)
    ends, optimizer = steps_of(accelerator, loss_of, optimizer, parameters)
    step_module = ends.module
    sharded = is_sharded(step_module)
    folder, start, report = Path(config.output_dir), 0, None
    if accelerator.is_main_process:
        checkpoint.remove_leftovers(folder)
    found = checkpoint.newest_valid(folder) if config.resume else None
    if found:
        stored = checkpoint.load(
            found, checkpoint.trained_tensors(vlm.model, state), ends.optimizer
        )
        check_same_run(stored["trainer.json"]["config"], config, found)
        start = stored["schedule.json"]["step"]
        if stored["trainer.json"]["classifier"]:
            report = objectives.ClassifierReport(**stored["trainer.json"]["classifier"])
    if state is not None and state.config.intervenes and not found:
        phase = functools.partial(classifier_phase, config, vlm, state, dataset, collate)
        report = run_whole(step_module, phase)
    place = stored["sampler.json"] if found else None
    sampler = sampler_of(dataset, config, accelerator, start, lengths, place)
    watch = watch_of(config, vlm, watched(dataset, config), collate, accelerator)
    if found:
        check_same_place(stored, sampler, found)
        watch.restore(stored["trainer.json"].get("mir"))
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=config.num_workers
    )
    if config.report_to:
        accelerator.init_trackers("fastalign", config=flat(asdict(config)))
    log = RunLog(config, folder, start, accelerator)

    batches = guard.follow(skips.follow(iter(loader)))
    guard.watch(vlm, state, ends, accelerator, sampler)
    if found:
        log.restore(stored["log.safetensors"])
        random_states.restore_rank(stored["rng.safetensors"], accelerator)
    vlm.model.train()
    for step in guard.steps(range(start, config.max_steps)):
        if watch.stands_still:
            break
        torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        micro = [
            to_device(next(batches), accelerator.device)
            for _ in range(config.gradient_accumulation_steps)
        ]
        totals = _totals(vlm, micro, accelerator)
        whole_step = objectives.mutual_shares(vlm, micro, state=state, run=step_module)
        guard.begin(micro, totals=totals, mutual=whole_step)
        shares: list[Terms] = []
        for number, (batch, mutual) in enumerate(zip(micro, whole_step, strict=True), 1):
            last = number == len(micro)
            with ends.micro_batch(last):
                more = {} if mutual is None else {"mutual": mutual}
                terms = step_module(batch, totals=totals, **more)
                ends.backward(terms["loss"], last)
            shares.append({name: value.detach() for name, value in terms.items()})
        values = _add(guard.with_inputs(shares), accelerator)
        if "weight_sum" in values:
            whole = values.pop("weight_sum").clamp_min(torch.finfo(torch.float32).tiny)
            values["loss"] = values["loss"] / whole
            ends.divide(whole)
        norm = ends.norm()
        if guard.accepts(values, norm):
            ends.take(norm, config.max_grad_norm)
        ends.clear()
        done = step + 1
        values |= skips.counts(done)
        mir, rate = watch.after(done), optimizer.param_groups[0]["lr"]
        log.step(step, values, norm, rate, totals, mir, watch.stands_still)
        saves = config.save_every and done % config.save_every == 0
        if saves and cache is not None:
            cache.flush()
        generators = random_states.gather(accelerator) if saves else {}
        moments = ends.moments() if saves else optimizer
        if saves and (sharded or accelerator.is_main_process):
            checkpoint.save(
                folder,
                done,
                checkpoint.trained_tensors(vlm.model, state),
                moments,
                {
                    "trainer.json": {
                        "config": asdict(config),
                        "classifier": report and asdict(report),
                        "mir": watch.state(),
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
        judge = functools.partial(objectives.classifier_accuracy, state, vlm, given, report=report)
        judged = run_whole(step_module, judge)
    writes = sharded or accelerator.is_main_process
    path = write_result(config, vlm, folder) if writes else folder
    loss_of.close()
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


if __name__ == "__main__":  # `torchrun -m fastalign.train ...` is `fastalign train ...`
    import runpy
    import sys

    sys.argv.insert(1, "train")
    runpy.run_module("fastalign", run_name="__main__")
