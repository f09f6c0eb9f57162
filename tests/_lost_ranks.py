"""Runs on two gloo ranks, of which one is lost in the third step, and what the other says.

_lost_ranks.py FOLDER PORT WAY...

Ranks are forked from one process that has imported all: each has a group of its own, and all groups
run at once. FOLDER/found.json holds of each rank its exit status and the seconds until then from
its third step, FOLDER/WAY.RANK what it printed. "cpu-memory" is one process without ranks.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import _train_run as run
import accelerate  # noqa: F401  # what the ranks would each import for themselves
import torch
import torch._dynamo

import fastalign as fa
from fastalign import cli

TIMEOUT = 4.0
PARAMETER = "model.language_model.layers.1.mlp.down_proj.weight"
LAUNCH = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
LAST = 3  # the step in which a rank is lost


def lose(way, batch):
    """What becomes of the rank that is lost."""
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "stalled":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "bad-sample":
        raise ValueError("a.jpg must be an image: got 0 bytes")
    if way == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if way == "cpu-memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.zeros(2**28)  # 1 GiB
    if way == "pixels-skip":
        batch["pixel_values"] = batch["pixel_values"].clone()
        batch["pixel_values"][0, 0, 0, 0] = torch.nan
    return batch


def train(folder, name, rank):
    batches = 0
    way = name.removeprefix("fsdp-").removeprefix("first-")
    lost = 0 if name.startswith("first-") else 1
    os.environ.update(LAUNCH if name.startswith("fsdp-") else {})
    model = run.model()

    def spoil(value):
        return value * torch.nan if rank == lost and batches == 2 * LAST else value

    if way.startswith("hidden"):
        layer = model.model.language_model.layers[1]
        layer.mlp.register_forward_hook(lambda module, args, output: spoil(output))
    if way.startswith("gradient"):
        model.get_parameter(PARAMETER).register_hook(spoil)

    def collate(indices):
        nonlocal batches
        batches += 1
        batch = run.collate(indices)
        if batches == 2 * LAST:
            (folder / f"{name}.{rank}.began").touch()
        return lose(way, batch) if rank == lost and batches == 2 * LAST else batch

    changes = {"ddp_timeout": TIMEOUT, "save_every": 1, "keep_checkpoints": 9}
    if way.endswith("-skip"):
        changes["on_nonfinite"] = "skip"
    if way.startswith("gradient"):
        changes["trainable"] = "all"
    config = run.config(folder / name, "cal", **changes)
    fa.train(config, model=model, dataset=range(20), collate=collate)


def be_rank(folder, way, rank, port):
    """Rank `rank` of a group, as the command line would end it."""
    if way != "cpu-memory":
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(folder / f"{way}.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    cli.COMMANDS["train"] = lambda argv: train(folder, way, rank)
    try:
        status = cli.main(["train"])
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    if way == "stalled":  # one interpreter that ends as usual is enough: it takes seconds
        sys.exit(status)
    os._exit(status)


def main():
    folder, port, ways = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    run.model()
    gc.freeze()  # what all ranks share need not be looked through by each
    ranks = {}
    for i, way in enumerate(ways):
        for rank in (1,) if way == "cpu-memory" else (0, 1):
            process = os.fork()
            if process == 0:
                be_rank(folder, way, rank, port + i)
            ranks[process] = way, rank
    found = {way: [None, None] for way in ways}
    end = time.monotonic() + 90
    while ranks and time.monotonic() < end:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            way, rank = ranks.pop(process)
            began = folder / f"{way}.{rank}.began"
            seconds = time.time() - began.stat().st_mtime if began.exists() else None
            found[way][rank] = os.waitstatus_to_exitcode(status), seconds
        # The stalled ones are all that is left.
        stopped = [p for p, (way, rank) in ranks.items() if way == "stalled" and rank == 1]
        if len(stopped) == len(ranks):
            for process in stopped:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    for process in ranks:
        os.kill(process, signal.SIGKILL)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
