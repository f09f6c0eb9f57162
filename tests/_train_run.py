"""A training run in a process of its own, to be killed, resumed or split over ranks.

_train_run.py FOLDER OBJECTIVE [--kill CALL] [--batch-size N] [--no-dropout]
"""

import argparse
import os
import signal

import torch

import fastalign as fa
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

SAMPLES = ["ttityyy", "tyyyy", "ttiyyty", "tiyyt"]
STEPS = 6


def sample(index):
    batch = llava_batch([SAMPLES[index % 4]], seed=index)
    if "pixel_values" in batch:
        generator = torch.Generator().manual_seed(index)
        batch["teacher"] = torch.randn(1, TOKENS, 5, generator=generator)
    return batch


def collate(indices):
    """A batch in which no sample depends on its company."""
    batches = [sample(index) for index in indices]
    length = max(b["input_ids"].shape[1] for b in batches)
    merged = {}
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = [
            torch.nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value)
            for b in batches
        ]
        merged[name] = torch.cat(rows)
    for name in ("pixel_values", "teacher"):
        images = [b[name] for b in batches if name in b]
        if images:
            merged[name] = torch.cat(images)
    return merged


def config(folder, objective, **changes):
    settings = {
        "output_dir": str(folder),
        "objective": objective,
        "max_steps": STEPS,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "adapter": fa.AdapterConfig(shift_layers=(1, 2), calibration=True),
        "progress": False,
    }
    return fa.TrainConfig(**(settings | changes))


def model(dropout=0.1):
    made = tiny_llava(head_scale=2.0)
    made.config.text_config.attention_dropout = dropout
    for module in made.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("objective")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--no-dropout", action="store_true")
    given = parser.parse_args()
    calls = 0

    def counted(indices):
        nonlocal calls
        calls += 1
        if calls == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(indices)

    settings = config(given.folder, given.objective, batch_size=given.batch_size)
    start = model(0.0 if given.no_dropout else 0.1)
    fa.train(settings, model=start, dataset=range(20), collate=counted)


if __name__ == "__main__":
    main()
