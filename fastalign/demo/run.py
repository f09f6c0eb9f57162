"""The demo: post-train a small vision-language model four ways and say what each one changed.

From the shipped base, every seed trains "sft", "cal" and "deepalign" on clean captions and on
captions of which some are swapped, and judges all of them on attribute combinations that no
training ever showed. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import diagnostics
from fastalign.adapters import AdapterConfig
from fastalign.config import TrainConfig
from fastalign.demo.base import build_processor, load_base
from fastalign.demo.dataset import SceneDataset, collate
from fastalign.demo.evaluate import evaluate
from fastalign.demo.scenes import ATTRIBUTES, Scenes, scenes, swap_captions
from fastalign.demo.teacher import EfficientNetTeacher
from fastalign.models import VLM, evaluating
from fastalign.objectives import DeepAlignConfig
from fastalign.progress import peak_memory_mib
from fastalign.train import train

ARMS = ("sft", "cal", "deepalign")
CAPTIONS = ("clean", "swapped")
STUDENT_LAYER = 2
MAX_SEEDS = 10


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
    """

    output_dir: str = "runs/demo"
    seeds: int = 3
    steps: int = 60
    batch_size: int = 16
    train_scenes: int = 960
    heldout_scenes: int = 256
    noise: float = 0.3
    from_scratch: bool = False
    real: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise ValueError(f"seeds must lie in 1..{MAX_SEEDS}: got {self.seeds}")
        if not 0.0 <= self.noise <= 1.0:
            raise ValueError(f"noise must lie in 0..1: got {self.noise}")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        for name in ("train_scenes", "heldout_scenes"):
            if getattr(self, name) < 16:
                raise ValueError(f"{name} must be at least 16: got {getattr(self, name)}")


def run(config: DemoConfig | None = None) -> dict[str, Any]:
    """Run the demo, print its table and write its figures.

    Returns:
        What `--json` writes: accuracies of the base with right and with shuffled images; for each
        arm the means over seeds of cross-entropy, accuracy and MIR with their 95 % intervals,
        on clean and on swapped captions; CAL less SFT; patch correlation; seconds and memory.
    """
    from fastalign.demo import report

    config = config or DemoConfig()
    if config.real:
        from fastalign.demo.real import run_real

        real: dict[str, Any] = run_real(config)
        return real
    started, folder = time.perf_counter(), Path(config.output_dir)
    base = _base(config, folder)
    processor = build_processor()
    heldout = SceneDataset(scenes(config.heldout_scenes, seed=1, split="heldout"), processor)
    teacher = EfficientNetTeacher()
    judged = _judge(base, heldout, teacher)
    judged["shuffled"] = evaluate(base, heldout, shuffle=True)
    outcomes: dict[str, dict[str, list[dict[str, Any]]]] = {
        kind: {arm: [] for arm in ARMS} for kind in CAPTIONS
    }
    examples: dict[str, nn.Module] = {}
    with report.progress(config.seeds * len(CAPTIONS) * len(ARMS)) as advance:
        for seed in range(config.seeds):
            data = scenes(config.train_scenes, seed=100 + seed)
            features = _features(teacher, data)
            for kind in CAPTIONS:
                noisy = data if kind == "clean" else swap_captions(data, config.noise, seed=seed)
                for arm in ARMS:
                    advance(f"seed {seed + 1}/{config.seeds}: {arm} on {kind} captions")
                    dataset = SceneDataset(noisy, processor, teacher=features)
                    settings = arm_config(arm, seed, config)
                    with tempfile.TemporaryDirectory() as scratch:
                        model, curve = _post_train(base, dataset, settings, scratch)
                    outcome = _judge(model, heldout, teacher) | {"curve": curve}
                    outcomes[kind][arm].append(outcome)
                    if seed == 0 and kind == "clean":
                        examples[arm] = model
    result = report.summarise(config, judged, outcomes)
    result["seconds"] = time.perf_counter() - started
    result["peak_mib"] = peak_memory_mib(torch.device("cpu"))
    figures = report.figures(folder, result, base, examples, heldout, teacher)
    result["figures"] = [str(path) for path in figures]
    report.show(result)
    return result


def arm_config(arm: str, seed: int, config: DemoConfig) -> TrainConfig:
    """How an arm is trained: "sft" and "cal" as published, all weights; "deepalign" adapters."""
    adapters = arm == "deepalign"
    return TrainConfig(
        objective=arm,
        trainable="adapters" if adapters else "all",
        adapter=AdapterConfig(shift_layers=(2, 3), shift_hidden_dim=128),
        deepalign=DeepAlignConfig(student_layers=(STUDENT_LAYER,), classifier_pairs=128),
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


def _base(config: DemoConfig, folder: Path) -> nn.Module:
    if not config.from_scratch:
        return load_base()
    from fastalign.demo.pretrain import pretrain

    pretrain(folder / "base")
    return load_base(folder / "base")


def _features(teacher: EfficientNetTeacher, data: Scenes) -> Tensor:
    """Teacher patches of all scenes, (n, 64, C)."""
    images = torch.from_numpy(data.images)
    return torch.cat([teacher(images[i : i + 64]) for i in range(0, len(images), 64)])


def _post_train(
    base: nn.Module, dataset: SceneDataset, settings: TrainConfig, scratch: str
) -> tuple[nn.Module, dict[str, list[float]]]:
    """A trained copy of the base, and its learning curve."""
    settings = replace(settings, output_dir=scratch)
    model = copy.deepcopy(base)
    train(settings, model=model, dataset=dataset, collate=collate)
    return model, diagnostics.learning_curve(scratch)


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
        for student, target in zip(
            vlm.image_patches(hidden, batch), teacher(batch["pixel_values"]), strict=True
        ):
            correlations.append(diagnostics.patch_similarity(student, target).correlation)
    return {
        "ce": scores["ce"],
        "accuracy": {name: scores[name] for name in ATTRIBUTES},
        "mir": mir["mir"],
        "mir_per_layer": mir,
        "patch_correlation": sum(correlations) / len(correlations),
    }
