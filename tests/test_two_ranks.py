"""Losses and state over two processes agree with one process that holds all the rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign.losses import mutual_information
from fastalign.nn import ShiftDirection

PREAMBLE = """
import sys
import torch
import torch.distributed as dist
from fastalign.losses import mutual_information
from fastalign.nn import ShiftDirection

folder, rank, cut = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt", weights_only=True)
rows = slice(0, cut) if rank == 0 else slice(cut, None)
"""

GATHER = """
x, y = (data[name][rows].requires_grad_() for name in "xy")
value = mutual_information(x, y, temperature=0.5, gather=True)
value.backward()
torch.save([value.detach(), x.grad, y.grad], f"{folder}/out{rank}.pt")
"""

EMPTY = """
try:
    mutual_information(data["x"][:0], data["y"][:0], gather=True)
except ValueError as error:
    torch.save(str(error), f"{folder}/out{rank}.pt")
"""

DIRECTION = """
direction = ShiftDirection(4)
direction.update(data["x"][rows])
direction.update(data["y"][rows])
torch.save([direction.mean, direction.count], f"{folder}/out{rank}.pt")
"""


def two_ranks(folder: Path, script: str, cut: int, **data: torch.Tensor) -> list:
    """What `script` saves on each rank; rank 0 holds the first `cut` rows, rank 1 the others."""
    torch.save(data, folder / "data.pt")
    code = PREAMBLE + script + "dist.destroy_process_group()\n"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(folder), str(rank), str(cut)])
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    return [torch.load(folder / f"out{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("cut", [3, 8])
def test_negatives_of_all_ranks(tmp_path, cut):
    """Unequal numbers of rows, and a rank with none; the gradients as DDP averages them."""
    x, y = torch.randn(2, 8, 4, dtype=torch.float64)
    (value, *first), (other, *second) = two_ranks(tmp_path, GATHER, cut, x=x, y=y)
    x.requires_grad_()
    y.requires_grad_()
    expected = mutual_information(x, y, temperature=0.5)
    torch.testing.assert_close(value, expected.detach())
    assert torch.equal(value, other)
    gradients = torch.autograd.grad(expected, (x, y))
    for a, b, gradient in zip(first, second, gradients, strict=True):
        # Each rank's gradient is that of the sum of both ranks' losses: their mean is half of it.
        torch.testing.assert_close(torch.cat([a, b]) / 2, gradient)


def test_no_row_on_any_rank_raises_on_all(tmp_path):
    messages = two_ranks(tmp_path, EMPTY, 0, x=torch.zeros(2, 4), y=torch.zeros(2, 4))
    assert all("at least one row" in message for message in messages)


@pytest.mark.parametrize("cut", [0, 3])
def test_direction_is_the_same_on_all_ranks(tmp_path, cut):
    x, y = torch.randn(2, 8, 4)
    (mean, count), (other, _) = two_ranks(tmp_path, DIRECTION, cut, x=x, y=y)
    assert torch.equal(mean, other) and count == 16
    whole = ShiftDirection(4)
    whole.update(torch.cat([x, y]))
    torch.testing.assert_close(mean, whole.mean)
