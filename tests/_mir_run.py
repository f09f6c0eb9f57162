"""A run of `fastalign.train` that measures MIR, in this process or as one of several ranks.

_mir_run.py FOLDER: as the rank that the environment says.
"""

import json
import os
import random
import sys
from pathlib import Path

import _samples
import _train_run
import numpy as np
import torch

import fastalign as fa

SAMPLES = ["tttityyyyyyyyyyyyyyy", "tttityyyyyyyyyyyyyy"]


def collate(indices):
    return _samples.collate(SAMPLES, indices)


def noisy(indices):
    """Draws from all three generators, of which the number of the step seeds torch's only."""
    batch = collate(indices)
    noise = torch.randn(3, 1, 1) + random.gauss(0, 1) + float(np.random.standard_normal())
    batch["pixel_values"] = batch["pixel_values"] + 0.1 * noise
    return batch


def config(folder, **changes):
    settings = {"gradient_accumulation_steps": 1, "log_every": 3, "save_every": 0}
    settings |= {"mir_every": 2, "mir_samples": 7, "learning_rate": 1e-2}
    return _train_run.config(folder, "sft", **(settings | changes))


def run(settings, *, make=noisy, dropout=0.1):
    """The result of a run; Python's and NumPy's generators start from 1."""
    random.seed(1)
    np.random.seed(1)
    model = _train_run.model(dropout)
    return fa.train(settings, model=model, dataset=range(20), collate=make)


def lines(folder):
    """`metrics.jsonl` without what depends on the clock and the machine."""
    path = Path(folder) / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for line in found:
        for name in ("tokens_per_s", "images_per_s", "peak_mib", "mir_seconds"):
            line.pop(name, None)
    return found


def main():
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    torch.set_num_threads(1)
    done = run(config(folder / "both", batch_size=1, max_steps=4), make=collate, dropout=0.0)
    still = {"batch_size": 1, "learning_rate": 0.0, "mir_patience": 1, "mir_every": 1}
    stopped = run(config(folder / "stopped", **still), make=collate, dropout=0.0)
    weights = [p.double().sum() for p in done.model.fastalign_adapter.parameters()]
    found = {"sum": float(sum(weights)), "steps": [line["step"] for line in stopped.history]}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
