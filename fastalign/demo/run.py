"""The demo: post-train a small vision-language model and say what each way of it changed.

From the shipped base, every seed trains "sft", "cal", "deepalign" and "moca" on clean captions and
on captions of which some are swapped, and judges all of them on attribute combinations that no
training ever showed. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fastalign import diagnostics
from fastalign.adapters import AdapterConfig, load_adapter
from fastalign.config import TrainConfig
from fastalign.demo import report
from fastalign.demo.base import BASE, build_processor, load_base
from fastalign.demo.dataset import SceneDataset, collate
from fastalign.demo.evaluate import evaluate
from fastalign.demo.scenes import ATTRIBUTES, scenes, swap_captions
from fastalign.demo.teacher import EfficientNetTeacher, teacher_features
from fastalign.models import VLM, evaluating
from fastalign.objectives import DeepAlignConfig
from fastalign.progress import peak_memory_mib
from fastalign.train import train

ARMS = ("sft", "cal", "deepalign", "moca")
# DeepAlign with terms switched off, as in the paper's ablation; at last its adapters alone.
ABLATION: dict[str, tuple[str, ...]] = {
    "full": (),
    "w/o intervention": ("intervention",),
    "w/o distillation": ("distillation",),
    "w/o global": ("global",),
    "w/o instance": ("instance",),
    "w/o mutual": ("mutual",),
    "adapters, SFT only": ("intervention", "distillation"),
}
CAPTIONS = ("clean", "swapped")
STUDENT_LAYER = 2
POOLED_LAYERS = (1, 2, 3, 4)  # all of them: the second pass is cheap here
MAX_SEEDS, MAX_WORKERS = 10, 8


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `fastalign demo`; the defaults take a few minutes on two cores.

    Attributes:
        output_dir: For figures, the report and the logs of every run.
        seeds: Repetitions, each with scenes, order and noise of its own; 1 to 10.
        steps: Optimizer steps of every arm.
        batch_size: Scenes in a step.
        train_scenes: Scenes to post-train on.
        heldout_scenes: Scenes to judge on, of held-out combinations of colour and object.
        noise: Fraction of captions swapped in the noisy half.
        from_scratch: Train the base first, instead of loading the shipped one.
        real: Connect a real language model, SmolLM2-135M, to EfficientNet features instead.
        ablation: Train DeepAlign with each of its terms left out instead, on clean captions.
    """

    output_dir: str = "runs/demo"
    seeds: int = 3
    steps: int = 40
    batch_size: int = 16
    train_scenes: int = 640
    heldout_scenes: int = 256
    noise: float = 0.3
    from_scratch: bool = False
    real: bool = False
    ablation: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise ValueError(f"seeds must lie in 1..{MAX_SEEDS}: got {self.seeds}")
        if self.real and self.ablation:
            raise ValueError("real and ablation are demos of their own: choose one")
        if not 0.0 <= self.noise <= 1.0:
            raise ValueError(f"noise must lie in 0..1: got {self.noise}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name in ("train_scenes", "heldout_scenes"):
            if getattr(self, name) < 16:
                raise ValueError(f"{name} must be at least 16: got {getattr(self, name)}")


@contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of transformers' own, one for every load and save, between the demo's lines."""
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@_without_bars()
def run(config: DemoConfig | None = None) -> dict[str, Any]:
    """Run the demo, print its table and write its figures.

    Returns:
        What `--json` writes: accuracies of the base with right and with shuffled images; for each
        arm the means over seeds of cross-entropy, accuracy and MIR with their 95 % intervals,
        on clean and on swapped captions; CAL less SFT; patch correlation; seconds and memory.
    """
    config = config or DemoConfig()
    if config.real:
        from fastalign.demo.real import run_real

        real: dict[str, Any] = run_real(config)
        return real
    if config.ablation:
        return _run_ablation(config)
    started, folder = time.perf_counter(), Path(config.output_dir)
    base_path = _base(config, folder)
    base, teacher = load_base(base_path), EfficientNetTeacher()
    heldout = _heldout(config)
    judged = _judge(base, heldout, teacher)
    judged["shuffled"] = evaluate(base, heldout, shuffle=True)
    seen = SceneDataset(scenes(config.heldout_scenes, seed=1), build_processor())
    judged["seen"] = evaluate(base, seen)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = _run_arms(config, base_path, Path(scratch), ARMS, CAPTIONS)
        aligned = copy.deepcopy(base)
        load_adapter(aligned, Path(scratch) / "deepalign-0-clean" / "adapter")
    result = report.summarise(config, judged, outcomes)
    result["seconds"] = time.perf_counter() - started
    result["peak_mib"] = max(
        peak_memory_mib(torch.device("cpu")), *(o["peak_mib"] for o in _all(outcomes))
    )
    figures = report.figures(folder, result, base, aligned, heldout, teacher)
    result["figures"] = [str(path) for path in figures]
    report.show(result)
    return result


def _run_ablation(config: DemoConfig) -> dict[str, Any]:
    """DeepAlign without each of its terms, judged as the arms of the demo are."""
    from fastalign.demo import ablation

    started, folder = time.perf_counter(), Path(config.output_dir)
    base_path = _base(config, folder)
    judged = _judge(load_base(base_path), _heldout(config), EfficientNetTeacher())
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = _run_arms(config, base_path, Path(scratch), tuple(ABLATION), ("clean",))
    result = ablation.summarise(config, judged, outcomes["clean"])
    result["seconds"] = time.perf_counter() - started
    result["peak_mib"] = max(o["peak_mib"] for o in _all(outcomes))
    result["figures"] = [str(ablation.figure(folder, result))]
    ablation.show(result)
    return result


def _run_arms(
    config: DemoConfig,
    base: Path,
    scratch: Path,
    arms: tuple[str, ...],
    captions: tuple[str, ...],
) -> report.Outcomes:
    """Every arm of every seed, as many at once as there are cores, one thread each."""
    tasks = [(arm, seed) for arm in reversed(arms) for seed in range(config.seeds)]
    workers = min(len(tasks), os.cpu_count() or 1, MAX_WORKERS)
    outcomes: report.Outcomes = {kind: {arm: [] for arm in arms} for kind in captions}
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    # Spawned, as a fork of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool,
        report.progress(len(tasks)) as advance,
    ):
        futures = {
            pool.submit(run_arm, arm, seed, config, base, scratch, captions): (arm, seed)
            for arm, seed in tasks
        }
        for future in as_completed(futures):
            arm, seed = futures[future]
            found[arm, seed] = future.result()
            advance(f"{arm}, seed {seed + 1} of {config.seeds}")
    for arm, seed in sorted(found, key=lambda key: key[1]):
        for kind in captions:
            outcomes[kind][arm].append(found[arm, seed][kind])
    return outcomes


@_without_bars()
def run_arm(
    arm: str,
    seed: int,
    config: DemoConfig,
    base: Path,
    scratch: Path,
    captions: tuple[str, ...] = CAPTIONS,
) -> dict[str, dict[str, Any]]:
    """Post-train the base in one way, on clean and on swapped captions; judge both."""
    processor, teacher, heldout = build_processor(), EfficientNetTeacher(), _heldout(config)
    data = scenes(config.train_scenes, seed=100 + seed)
    features = None
    settings = arm_config(arm, seed, config)
    if settings.objective == "deepalign" and settings.deepalign.weight("visual"):
        features = teacher_features(teacher, data.images)
    outcomes = {}
    for kind in captions:
        noisy = data if kind == "clean" else swap_captions(data, config.noise, seed=seed)
        model = load_base(base)
        folder = f"{scratch}/{arm.replace('/', '')}-{seed}-{kind}"
        settings = replace(settings, output_dir=folder)
        dataset = SceneDataset(noisy, processor, teacher=features)
        done = train(settings, model=model, dataset=dataset, collate=collate)
        outcomes[kind] = _judge(model, heldout, teacher) | {
            "curve": diagnostics.learning_curve(settings.output_dir),
            "classifier_accuracy": done.classifier.accuracy if done.classifier else None,
            "cos_global": done.history[-1].get("cos_global"),
            "cos_instance": done.history[-1].get("cos_instance"),
            "peak_mib": peak_memory_mib(torch.device("cpu")),
        }
    return outcomes


def _all(outcomes: report.Outcomes) -> list[dict[str, Any]]:
    return [o for arms in outcomes.values() for found in arms.values() for o in found]


def _heldout(config: DemoConfig) -> SceneDataset:
    return SceneDataset(scenes(config.heldout_scenes, seed=1, split="heldout"), build_processor())


def arm_config(arm: str, seed: int, config: DemoConfig) -> TrainConfig:
    """How an arm is trained.

    "sft" and "cal" train all weights, as published; "deepalign", and the arms of ABLATION, its
    adapters; "moca" the calibration of the vision tokens alone, by "sft".
    """
    adapter = AdapterConfig(shift_layers=(2, 3), shift_hidden_dim=128)
    if arm == "moca":
        adapter = AdapterConfig(shift_layers=(), calibration=True)
    adapters = arm not in ("sft", "cal")
    return TrainConfig(
        objective={"sft": "sft", "moca": "sft", "cal": "cal"}.get(arm, "deepalign"),
        trainable="adapters" if adapters else "all",
        adapter=adapter,
        deepalign=DeepAlignConfig(
            layers=POOLED_LAYERS,
            student_layers=(STUDENT_LAYER,),
            classifier_pairs=128,
            without=ABLATION.get(arm, ()),
        ),
        max_steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=1e-3 if adapters else 3e-4,
        warmup_ratio=0.1,
        bf16=True,
        seed=seed,
        log_every=5,
        save_every=0,
        progress=False,
    )


def _base(config: DemoConfig, folder: Path) -> Path:
    """Folder of the base model, trained first if asked."""
    if not config.from_scratch:
        return BASE
    from fastalign.demo.pretrain import pretrain

    pretrain(folder / "base")
    return folder / "base"


def _judge(model: nn.Module, heldout: SceneDataset, teacher: EfficientNetTeacher) -> dict[str, Any]:
    """Accuracy by attribute, cross-entropy, MIR by layer, and patch correlation."""
    scores = evaluate(model, heldout)
    vlm = VLM(model)
    batches = [heldout.batch(range(i, i + 32)) for i in range(0, min(128, len(heldout)) - 31, 32)]
    batches = batches or [heldout.batch(range(len(heldout)))]
    mir = diagnostics.measure_mir(vlm, batches)
    correlations = []
    with evaluating(model):
        batch = batches[0]
        (hidden,) = vlm.hidden_states(batch, [STUDENT_LAYER])
        targets = teacher(batch["pixel_values"])
        students = vlm.patches(batch).of(hidden).view(*targets.shape[:2], -1)
        for student, target in zip(students, targets, strict=True):
            correlations.append(diagnostics.patch_similarity(student, target).correlation)
    return {
        "ce": scores["ce"],
        "accuracy": {name: scores[name] for name in ATTRIBUTES},
        "mir": mir["mir"],
        "mir_per_layer": mir,
        "patch_correlation": sum(correlations) / len(correlations),
    }
