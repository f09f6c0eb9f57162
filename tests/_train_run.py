"""A training run in a process of its own, to be killed and resumed: `_train_run.py FOLDER OBJECTIVE`.

With a third argument the process kills itself with SIGKILL at that call of the collator.
"""

import os
import signal
import sys

import torch

import fastalign as fa
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

SAMPLES = ["ttityyy", "tyyyy", "ttiyyty", "tiyyt"]
STEPS = 6


def collate(indices):
    batch = llava_batch([SAMPLES[i % 4] for i in indices], seed=sum(indices))
    if "pixel_values" in batch:
        generator = torch.Generator().manual_seed(sum(indices))
        images = len(batch["pixel_values"])
        batch["teacher"] = torch.randn(images, TOKENS, 5, generator=generator)
    return batch


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


def model():
    made = tiny_llava(head_scale=2.0)
    made.config.text_config.attention_dropout = 0.1
    for module in made.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return made


if __name__ == "__main__":
    calls, last = 0, int(sys.argv[3]) if len(sys.argv) > 3 else None

    def counted(indices):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(indices)

    settings = config(sys.argv[1], sys.argv[2])
    fa.train(settings, model=model(), dataset=range(20), collate=counted)
