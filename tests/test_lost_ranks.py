"""A rank that is killed, stalls, stops or meets NaN: the other says so, and ends in time."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign import checkpoint

SCRIPT = Path(__file__).with_name("_lost_ranks.py")
WAYS = ("killed", "stalled", "bad-sample", "memory", "cpu-memory")
WAYS += ("first-bad-sample", "hidden", "gradient", "pixels-skip", "fsdp-hidden-skip")
TIMEOUT = 4.0  # ddp_timeout there


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Of each way and rank: exit status, seconds since its third step, and the last lines."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65000)
    command = [sys.executable, str(SCRIPT), str(folder), str(port), *WAYS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    said = {
        (way, rank): (*found[way][rank], texts[f"{way}.{rank}"].split("fastalign train: ")[-1])
        for way in WAYS
        for rank in (0, 1)
        if found[way][rank] is not None
    }
    return folder, said


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ("killed", "nothing is heard of rank 1, killed or stalled"),
        ("stalled", "nothing is heard of rank 1, killed or stalled"),
        ("bad-sample", "rank 1 stopped with ValueError in step 3: a.jpg must be an image: got 0"),
        ("memory", "rank 1 stopped with OutOfMemoryError in step 3: out of memory in step 3"),
    ],
)
def test_the_rank_that_is_left_says_who_is_lost_and_ends(ends, way, why):
    folder, said = ends
    status, seconds, text = said[way, 0]
    assert status == 1 and "Traceback" not in text
    assert text.startswith("another rank was lost in step 3, in all_reduce of _totals: " + why)
    assert "ddp_timeout=4 s" in text and "The checkpoints are whole" in text
    # The time-out where the rank stalls, else at once; and what it takes to ask, and to end.
    least = TIMEOUT if way == "stalled" else 0.0
    assert least < seconds < least + 20.0
    found = checkpoint.checkpoints(folder / way)
    assert [path.name for path in found] == ["checkpoint-1", "checkpoint-2"]
    assert all(not checkpoint.verify(path) for path in found)


def test_the_rank_itself_says_what_it_was(ends):
    _, said = ends
    assert said["killed", 1][0] == -9
    assert said["bad-sample", 1][::2] == (1, "a.jpg must be an image: got 0 bytes\n")
    status, _, text = said["memory", 1]
    assert status == 1 and "most helpful first: batch_size=1 with gradient_acc" in text


GRADIENT = "gradient of model.language_model.layers.1.mlp.down_proj.weight"
HIDDEN = "hidden states of decoder layer 2 (mlp)"


def test_the_first_rank_takes_what_it_would_have_said_with_it(ends):
    """The ranks' store is its; under torchrun it is not."""
    _, said = ends
    assert said["first-bad-sample", 0][::2] == (1, "a.jpg must be an image: got 0 bytes\n")
    status, seconds, text = said["first-bad-sample", 1]
    assert status == 1 and seconds < 20.0
    assert "lost in step 3, in all_reduce of _totals: rank 0" in text and "The checkpoints" in text


@pytest.mark.parametrize(("way", "name"), [("hidden", HIDDEN), ("gradient", GRADIENT)])
def test_all_ranks_name_the_tensor_of_the_one_that_has_it(ends, way, name):
    folder, said = ends
    for rank in (0, 1):
        status, _, text = said[way, rank]
        assert status == 1
        assert f"at step 3: the first was {name} of micro-batch 1, on rank 1. Param" in text
    assert len(checkpoint.checkpoints(folder / way)) == 2


@pytest.mark.parametrize(
    ("way", "name"),
    [("pixels-skip", "pixel_values of micro-batch 2"), ("fsdp-hidden-skip", HIDDEN)],
)
def test_all_ranks_leave_the_step_out_together(ends, way, name):
    """On DDP and on FSDP2, whose shards of the weights stay as they were too."""
    folder, said = ends
    assert said[way, 0][0] == said[way, 1][0] == 0
    assert name in said[way, 0][2] and "on rank 1. Parameters" in said[way, 0][2]
    lines = [json.loads(line) for line in (folder / way / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for file in ("trained", "optimizer"):
        before, after = (
            load_file(folder / way / f"checkpoint-{step}" / f"{file}.safetensors")
            for step in (2, 3)
        )
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_memory_of_the_cpu_that_is_short_is_told(ends):
    status, _, text = ends[1]["cpu-memory", 1]
    assert status == 1 and text.startswith("out of memory in step 3 (peak ")
    assert "can't allocate memory" in text and "most helpful first: batch_size=1" in text
