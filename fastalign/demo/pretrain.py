"""The shipped base model's training, from random weights to the folder that the demo loads."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastalign.config import TrainConfig
from fastalign.demo.base import build_model, build_processor, save_base
from fastalign.demo.dataset import SceneDataset, collate
from fastalign.demo.scenes import scenes
from fastalign.train import train

SCENES, STEPS = 20_000, 4_000


def pretrain(
    folder: str | Path, *, seed: int = 0, steps: int = STEPS, progress: bool = True
) -> nn.Module:
    """Train the tiny LLaVA on clean scenes and write it to `folder`.

    Every parameter is trained by `fastalign.train` with the "sft" objective: 16 scenes a step,
    bfloat16 autocast, peak learning rate 1.2e-3. The shipped base is `pretrain(BASE)`.

    Args:
        folder: For `save_base`; the run's log and checkpoints go to `folder/run`.
        seed: Of the weights, the scenes and their order.
        steps: Optimizer steps.
        progress: Show a progress bar.
    """
    folder = Path(folder)
    dataset = SceneDataset(scenes(SCENES, seed=seed), build_processor())
    config = TrainConfig(
        output_dir=str(folder / "run"),
        objective="sft",
        trainable="all",
        max_steps=steps,
        batch_size=16,
        learning_rate=1.2e-3,
        weight_decay=0.02,
        betas=(0.9, 0.98),
        warmup_ratio=0.03,
        bf16=True,
        seed=seed,
        save_every=0,
        progress=progress,
    )
    model = build_model(seed)
    result = train(config, model=model, dataset=dataset, collate=collate)
    save_base(model, folder)
    return result.model
