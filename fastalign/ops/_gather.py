"""Rows of all ranks, with gradient: the one collective that a loss needs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """(k, d) on each rank -> (world, k, d); the gradient of a rank's rows is summed over ranks.

    The gather of torch.distributed.nn does the same, but torch 2.13 deprecates it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(dist.get_world_size(), *rows.shape)
        dist.all_gather(list(gathered.unbind(0)), rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


def gather_rows(*tensors: Tensor) -> list[Tensor]:
    """Each (m, d) tensor with the rows of all ranks, in the order of the ranks.

    The ranks may hold different numbers of rows: one exchange of the counts, which waits for the
    device, and padding to the largest. Every rank has to call it, and to run the backward.

    Args:
        tensors: (m, d) each, the same m on one rank.

    Returns:
        (sum of m over ranks, d) each, differentiable in this rank's rows.
    """
    mine = torch.tensor([tensors[0].shape[0]], device=tensors[0].device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    sizes = torch.cat(counts).tolist()
    gathered = []
    for tensor in tensors:
        padded = F.pad(tensor, (0, 0, 0, max(sizes) - tensor.shape[0]))
        parts: Tensor = _AllGather.apply(padded)  # type: ignore[no-untyped-call]
        gathered.append(torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)]))
    return gathered
