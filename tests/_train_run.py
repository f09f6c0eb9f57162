"""A training run in a process of its own, to be killed, resumed or split over ranks.

_train_run.py FOLDER OBJECTIVE [--kill CALL] [--full CALL] [--batch-size N] [--no-dropout]
    [--train-vision-from K]
"""

import argparse
import os
import resource
import signal
from dataclasses import replace

import _samples

import fastalign as fa
from fastalign.testing.models import tiny_llava

SAMPLES = ["ttityyy", "tyyyy", "ttiyyty", "tiyyt"]
STEPS = 6


def collate(indices):
    return _samples.collate(SAMPLES, indices)


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
    parser.add_argument("--full", type=int, help="from this batch on, no file passes 50,000 bytes")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--train-vision-from", type=int)
    given = parser.parse_args()
    calls = 0

    def counted(indices):
        nonlocal calls
        calls += 1
        if calls == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == given.full:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        return collate(indices)

    settings = config(given.folder, given.objective, batch_size=given.batch_size)
    settings = replace(settings, train_vision_from=given.train_vision_from)
    start = model(0.0 if given.no_dropout else 0.1)
    fa.train(settings, model=start, dataset=range(20), collate=counted)


if __name__ == "__main__":
    main()
