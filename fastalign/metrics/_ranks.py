"""What the ranks of a process group do together; a process of its own does it alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The members of a process group, or one process alone.

    Args:
        group: The process group; None for the default one.
        alone: This process only, whatever group there is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)

    def add(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def add_at(self, x: Tensor, owner: int) -> Tensor:
        """The sum over ranks, in place at rank `owner`; elsewhere `x` means nothing afterwards."""
        if self.size > 1:
            dist.reduce(x, group=self.group, group_dst=owner)
        return x

    def stack(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, (ranks, ...)."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def concatenate(self, vectors: list[Tensor]) -> list[Tensor]:
        """Each of the vectors followed by that of the next rank, and so on.

        Args:
            vectors: One-dimensional, of one dtype and device; as many on every rank, in any length.
        """
        if self.size == 1 or not vectors:
            return vectors
        lengths = torch.tensor([len(v) for v in vectors], device=vectors[0].device)
        all_lengths = self.stack(lengths).tolist()
        mine = torch.cat(vectors)
        padded = mine.new_zeros(max(sum(lengths) for lengths in all_lengths))
        padded[: len(mine)] = mine
        shares = [
            share[: sum(lengths)].split(lengths)
            for share, lengths in zip(self.stack(padded), all_lengths, strict=True)
        ]
        return [torch.cat(parts) for parts in zip(*shares, strict=True)]
