"""Trainers on a tiny model, in this process or as one of several ranks.

_trainer_ranks.py FOLDER RANK WORLD PORT
"""

import os
import sys
from pathlib import Path

import _samples
import torch
from _versions import CHECKPOINTING
from transformers import TrainerCallback, TrainingArguments

import fastalign as fa
from fastalign.integrations.transformers import AlignmentTrainer
from fastalign.objectives import DeepAlignConfig, DeepAlignState
from fastalign.testing.models import tiny_llava

# Steps of four: every second sample without an image, so a second rank never sees one; then three
# of four, so the first rank's last micro-batch has none either.
SAMPLES = ["ttityyy", "tyyyyy", "ttityyty", "tyyt", "tityty", "ttyyy", "tyyy", "tyyyyyt"]


def collate(indices):
    return _samples.collate(SAMPLES, indices)


class Gradients(TrainerCallback):
    """The gradients that each step of the optimizer sees."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({k: p.grad.clone() for k, p in named if p.grad is not None})


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": [],
        "use_cpu": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**(settings | changes))


def model():
    """Deltas of this one pass both bounds of the clamp."""
    return tiny_llava(head_scale=3.0)


def adapted():
    """A model with an adapter, and what DeepAlign carries, with a classifier that never fitted."""
    made = model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fa.attach(made, fa.AdapterConfig(shift_layers=(1, 2), calibration=True))
        config = DeepAlignConfig(without=("mutual",), layers=(1, 3))
        state = DeepAlignState(fa.VLM(made), config)
    made.requires_grad_(False)
    made.fastalign_adapter.requires_grad_(True)
    return made, state


def trainer(folder, objective="cal", *, made=None, cls=AlignmentTrainer, size=8, **changes):
    own = {k: changes.pop(k) for k in ("objective_options", "state") if k in changes}
    if cls is AlignmentTrainer:
        own["objective"] = objective
    return cls(
        model=made or model(),
        args=arguments(folder, **changes),
        train_dataset=list(range(size)),
        eval_dataset=list(range(4)),
        data_collator=collate,
        **own,
    )


def run(folder, objective="cal", **changes):
    """Trained trainer and its gradients, step by step."""
    made = trainer(folder, objective, **changes)
    seen = Gradients()
    made.add_callback(seen)
    made.train()
    return made, seen.steps


def losses(made):
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def all_runs(folder, micro):
    """What two ranks are to do as one process does: name to numbers and tensors."""
    found = {}
    checkpointing = {
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    for name, changes in {
        "cal": {"max_grad_norm": 0.1},
        "cal, checkpointed": checkpointing,
        "sft": {},
        "deepalign": {},
    }.items():
        objective = name.split(",")[0]
        if objective == "deepalign":
            made, state = adapted()
            changes = {"made": made, "state": state}
        made, steps = run(folder / name, objective, per_device_train_batch_size=micro, **changes)
        metrics = made.evaluate()
        found[name] = {
            "gradients": steps,
            "parameters": {k: v.clone() for k, v in made.model.state_dict().items()},
            "log": [
                {k: v for k, v in line.items() if isinstance(v, float)}
                for line in made.state.log_history
                if "loss" in line
            ],
            "eval": {k: metrics[k] for k in ("eval_ce", "eval_accuracy")},
        }
        if objective == "cal":
            made.save_model(str(folder / "saved"))
    return found


def main():
    folder, rank, world, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    found = all_runs(Path(folder), 1)
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
