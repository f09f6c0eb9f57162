"""A trainer with a MIRCallback, in this process or as one of several ranks.

_mir_trainer.py FOLDER RANK WORLD PORT
"""

import json
import os
import sys
from pathlib import Path

import _trainer_ranks as run
import torch

from fastalign.integrations.transformers import MIRCallback
from fastalign.testing.models import llava_batch


def batches(count=3):
    """Of four samples each, with enough rows for covariances of full rank."""
    return [llava_batch(["tttityyyyyyyy"] * 4, seed=seed) for seed in range(count)]


def measured(folder, micro):
    """What the callback found in four steps, and the lines of the log that hold it."""
    trainer = run.trainer(folder, "sft", size=16, max_steps=4, per_device_train_batch_size=micro)
    callback = MIRCallback(batches(), every=2, samples=12, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    lines = [line["mir"] for line in trainer.state.log_history if "mir" in line]
    return {"history": callback.history, "log": lines, "own": len(callback._watch._own)}


def main():
    folder, rank, world, port = sys.argv[1:]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    found = measured(Path(folder) / "run", 1)
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
