"""A run that is killed again and again: SIGKILL from outside, at random times and inside saves.

_lives.py FOLDER KILLS SEED. Each life is a fork of this process, which has imported everything and
never trains itself. A run that ends before it is killed is followed by another, in a folder of its
own. Prints as JSON how many kills there were, how many left a half-written checkpoint, and how
many runs ended. FOLDER/whole is the undisturbed run.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import _samples
import _train_run
import accelerate  # noqa: F401  what a life imports, once for all
import numpy as np
import safetensors.torch  # noqa: F401
import torch
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama  # noqa: F401

import fastalign as fa

STEPS, SAVE_EVERY, LOG_EVERY = 12, 2, 3
SAVES = STEPS // SAVE_EVERY


def noisy(indices):
    """Draws from all three generators, of which the number of the step seeds torch's only."""
    batch = _samples.collate(_train_run.SAMPLES, indices)
    if "pixel_values" in batch:
        noise = torch.randn(3, 1, 1) + random.gauss(0, 1) + float(np.random.standard_normal())
        batch["pixel_values"] = batch["pixel_values"] + 0.1 * noise
    return batch


def train(folder):
    """One life: the command that a user would start again."""
    random.seed(1)
    np.random.seed(1)
    settings = fa.objectives.DeepAlignConfig(classifier_steps=5, classifier_pairs=8)
    config = _train_run.config(
        folder,
        "deepalign",
        deepalign=settings,
        max_steps=STEPS,
        save_every=SAVE_EVERY,
        log_every=LOG_EVERY,
    )
    fa.train(config, model=_train_run.model(), dataset=range(20), collate=noisy)


def born(folder):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        train(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """The exit status of a life; None while it lasts."""
    gone, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if gone else None


def saving(folder):
    return any(name.endswith(".partial") for name in half_done(folder))


def half_done(folder):
    if not folder.exists():
        return []
    return [name for name in os.listdir(folder) if name.startswith(".checkpoint-")]


def until(pid, condition):
    """Wait for a condition or the end of a life, and return its exit status or None."""
    while not condition():
        status = ended(pid)
        if status is not None:
            return status
        time.sleep(2e-4)
    return None


def reap(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(folder, draw, inside, life):
    """Start a life and kill it; its exit status, and whether it died inside a save."""
    pid = born(folder)
    if inside:
        status = None
        for _ in range(draw.randint(1, 2)):  # the first save of this life, or the second
            status = until(pid, lambda: not saving(folder)) if status is None else status
            status = until(pid, lambda: saving(folder)) if status is None else status
        pause = draw.uniform(0, 5e-3)
    else:
        status, pause = None, draw.uniform(0, life)
    deadline = time.perf_counter() + pause
    if status is None:
        status = until(pid, lambda: time.perf_counter() >= deadline)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        status = reap(pid)
    return status, bool(half_done(folder))


def main():
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    draw = random.Random(seed)
    start = time.perf_counter()
    assert reap(born(folder / "whole")) == 0
    life = time.perf_counter() - start
    done = inside = runs = 0
    while done < kills:
        status, half = killed(folder / f"run-{runs}", draw, done % 2 == 1, life)
        assert status in (0, -signal.SIGKILL), status
        if status == 0:
            runs += 1
        else:
            done, inside = done + 1, inside + half
    assert reap(born(folder / f"run-{runs}")) == 0
    print(json.dumps({"kills": done, "inside": inside, "runs": runs + 1, "life_s": life}))


if __name__ == "__main__":
    main()
