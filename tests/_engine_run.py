"""Runs of `train` on one process, on DDP and on FSDP2, as one launch of each size.

_engine_run.py FOLDER

Ranks are forked from a process that has imported everything; their environment is what `accelerate
launch` gives. Each run writes to FOLDER/NAME.
"""

import datetime
import multiprocessing
import os
import sys
from pathlib import Path

import _samples
import torch

import fastalign as fa
from fastalign.adapters import adapter_of
from fastalign.objectives import DeepAlignConfig
from fastalign.testing.models import tiny_llava

# Eight samples a step: of two ranks one has an image in a micro-batch that the other has not.
SAMPLES = ["ttityyy", "tityy", "tyyyyy", "tyyt", "tityty", "ttiyyty", "tyyy", "tityyyyyt"]
ADAPTER = fa.AdapterConfig(
    shift_layers=(1, 2),
    shift_hidden_dim=5,
    calibration=True,
    calibration_init_std=0.02,
    decoder_shift_layers=(1,),
    decoder_shift_hidden_dim=5,
)
DEEPALIGN = DeepAlignConfig(classifier_steps=30, layers=(1, 2))
LAUNCH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
EFFICIENT = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
SFT, CAL, DEEP = ({"objective": name} for name in ("sft", "cal", "deepalign"))
ALL = {**CAL, "trainable": "all", "tied": True}
AGAIN = {"gradient_checkpointing": True}
# Runs of one process.
ONE = {
    "sft": SFT,
    "cal": CAL,
    "deepalign": DEEP,
    "all": ALL,
    "bf16": {**SFT, "bf16": True, "dtype": torch.bfloat16},
}
# Runs of several: which of them it is to equal, the engine that it begins and that it ends on, and
# what it does in another way.
TWO = {
    "a": ("sft", ["ddp"], {}),
    "b": ("cal", ["ddp"], AGAIN),
    "c": ("deepalign", ["ddp", "fsdp"], {}),
    "d": ("sft", ["fsdp", "ddp"], {}),
    "e": ("cal", ["fsdp"], AGAIN),
    "f": ("deepalign", ["fsdp", "fsdp"], AGAIN),
    "g": ("all", ["fsdp"], {}),
    "h": ("all", ["fsdp"], {"environment": EFFICIENT}),
    "i": ("bf16", ["fsdp"], {}),
}
FOUR = {
    "j": ("cal", ["ddp"], {}),
    "k": ("sft", ["fsdp"], {}),
    "l": ("deepalign", ["fsdp"], {}),
}


def run(folder, ranks, *, sharded=False, dtype=torch.float64, tied=False, **changes):
    """Train for three steps of eight samples, however many ranks share them.

    Returns:
        How many batches were made.
    """
    batches = 0

    def collate(indices):
        nonlocal batches
        batches += 1
        return _samples.collate(SAMPLES, indices)

    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "log_every": 1,
        "save_every": 2,
        "adapter": ADAPTER,
        "deepalign": DEEPALIGN,
        "progress": False,
    }
    model = tiny_llava(head_scale=2.0, dtype=dtype, tied=tied)
    config = fa.TrainConfig(**(settings | changes))
    result = fa.train(config, model=model, dataset=range(24), collate=collate)
    if config.needs_adapter:
        masters = {p.dtype for p in adapter_of(result.model).parameters()}
        # In the end an adapter that is whole goes back to the dtype of its base.
        assert masters == {torch.float32 if sharded and config.bf16 else dtype}
    return batches


def on(environment):
    """A launch of its own: accelerate keeps the engine of the first run in a process."""
    from accelerate.state import AcceleratorState

    for name in (*LAUNCH, *EFFICIENT):
        os.environ.pop(name, None)
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)


def rank(folder, number, ranks, runs):
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{ranks}",
            rank=number,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=60),
        )
    for name, (equal, engines, changes) in runs.items():
        given = ONE[equal] | changes
        launch = LAUNCH | given.pop("environment", {})
        taken = []
        for engine in engines:
            on(launch if engine == "fsdp" else {})
            taken.append(run(folder / name, ranks, sharded=engine == "fsdp", **given))
        # The second engine goes on from the checkpoint of the second step.
        assert all(count < taken[0] for count in taken[1:]), "it started anew"
    if ranks > 1:
        torch.distributed.destroy_process_group()


def fork(folder, ranks, runs):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=rank, args=(folder, number, ranks, runs)) for number in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def main():
    folder = Path(sys.argv[1])
    # In this process, whose imports the ranks then share.
    rank(folder, 0, 1, {name: (name, ["one"], {}) for name in ONE})
    sys.exit(any(fork(folder, 2, TWO) + fork(folder, 4, FOUR)))


if __name__ == "__main__":
    main()
