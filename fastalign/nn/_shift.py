"""Moves visual representations towards text, and keeps the direction (DeepAlign, section 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.ops._check import check_dim, check_floating, check_last_dim, check_shape

Grid: TypeAlias = tuple[int, int]


class ModalityShift(nn.Module):
    """Shift of visual representations towards text, h' = h + conv(relu(conv(h))) (DeepAlign, 1.3).

    Two convolutions on the patch grid. The last one starts at zero, so that an untrained module
    gives its input back exactly.

    Args:
        dim: Width d of the representations.
        hidden_dim: Channels between the convolutions.
        kernel_size: Of both, odd.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, to keep the grid: got {kernel_size}")
        self.dim = dim
        self.conv1 = nn.Conv2d(dim, hidden_dim, kernel_size, padding=kernel_size // 2)
        self.conv2 = nn.Conv2d(hidden_dim, dim, kernel_size, padding=kernel_size // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first convolution anew and set the last to zero."""
        self.conv1.reset_parameters()
        nn.init.zeros_(self.conv2.weight)
        if self.conv2.bias is not None:
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, grid: Grid | Sequence[Grid], mask: Tensor | None = None) -> Tensor:
        """Shift the patches of a batch.

        Args:
            x: (b, n, d) with one grid, or packed (sum n, d) with a grid for each image. Any
                floating dtype.
            grid: (h, w), patches row-major. Where n > h * w, the first n - h * w tokens of each
                image are no patches (CLS, registers) and pass unchanged. For packed rows a list of
                (h, w), whose products add up to sum n.
            mask: (b, h * w) bool, true at patches; the others are padding of (b, n, d), which both
                convolutions see as zero, as they do what lies beyond the grid, and which passes
                unchanged. None for no padding.

        Returns:
            The shape and dtype of `x`; the convolutions run in the dtype of the parameters.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: Shapes and grids do not fit.
        """
        check_floating(x=x)
        check_dim("x", x, 2, 3)
        check_last_dim("x", x, self.dim)
        if x.dim() == 2:
            if mask is not None:
                raise ValueError("mask must be None for packed x (sum n, d), which has no padding")
            return self._packed(x, _check_grids(grid, x.shape[0]))
        h, w = _check_grid(grid)
        extra = x.shape[1] - h * w
        if extra < 0:
            raise ValueError(
                f"x must have at least h * w = {h * w} tokens an image for grid {(h, w)}: "
                f"got shape {tuple(x.shape)}"
            )
        if mask is not None:
            check_shape("mask", mask, (x.shape[0], h * w), "(b, h * w)")
        if extra == 0:
            return self._shift(x, h, w, mask)
        return torch.cat([x[:, :extra], self._shift(x[:, extra:], h, w, mask)], 1)

    def _packed(self, x: Tensor, grids: list[Grid]) -> Tensor:
        """Images of one grid go through together: a bucketed batch costs what a dense one does."""
        images = list(torch.split(x, [h * w for h, w in grids]))
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            shifted = self._shift(torch.stack([images[i] for i in members]), *grid)
            for i, image in zip(members, shifted, strict=True):
                images[i] = image
        return torch.cat(images) if images else x

    def _shift(self, x: Tensor, h: int, w: int, mask: Tensor | None = None) -> Tensor:
        image = x.to(self.conv1.weight.dtype).reshape(-1, h, w, self.dim).permute(0, 3, 1, 2)
        padding = None if mask is None else ~mask.view(-1, 1, h, w)
        hidden: Tensor = F.relu(self.conv1(_without(image, padding)))
        shift: Tensor = _without(self.conv2(_without(hidden, padding)), padding)
        return x + shift.permute(0, 2, 3, 1).flatten(1, 2).to(x.dtype)


def _without(image: Tensor, padding: Tensor | None) -> Tensor:
    return image if padding is None else image.masked_fill(padding, 0.0)


def _check_grid(grid: Any) -> Grid:
    sides = grid if isinstance(grid, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f"grid must be (height, width), each at least 1, for x (b, n, d): got {grid}; "
            "images of different grids go in packed, x (sum n, d) with a list of grids"
        )
    return sides[0], sides[1]


def _check_grids(grids: Any, total: int) -> list[Grid]:
    if not isinstance(grids, Sequence) or any(isinstance(grid, int) for grid in grids):
        raise ValueError(f"grid must be a list of (height, width) for x (sum n, d): got {grids}")
    checked = [_check_grid(grid) for grid in grids]
    patches = sum(h * w for h, w in checked)
    if patches != total:
        raise ValueError(
            f"x must have the patches of the {len(checked)} grids, {patches} rows: got {total}; "
            "packed rows hold patches only, no CLS token or register"
        )
    return checked


class ShiftDirection(nn.Module):
    """Global shift direction: the mean of d_instance over all pairs seen (DeepAlign, section 1.3).

    The state lies in buffers, so that a checkpoint holds it: `mean`, float64 also after
    `.to(torch.bfloat16)`, in which a running mean would stop moving, and `count`.

    Args:
        dim: Width d of the directions.
    """

    mean: Tensor
    count: Tensor
    pending: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        # Sum, finite rows and all rows of the step that has begun; between steps they are 0.
        pending = torch.zeros(dim + 2, dtype=torch.float64)
        self.register_buffer("pending", pending, persistent=False)

    @torch.no_grad()
    def update(
        self,
        instance: Tensor,
        *,
        mask: Tensor | None = None,
        step_pairs: Tensor | int | None = None,
    ) -> None:
        """Take in the directions of a batch of pairs, from all ranks.

        With torch.distributed initialised every rank has to call this, with (0, d) when it has no
        pair, and all hold the same value afterwards. A row with NaN or infinity is left out: it
        would stay in the mean for the rest of the training. Nothing waits for the device.

        Args:
            instance: d_instance, (m, d), any floating dtype; m may be 0 and differ between ranks.
            mask: Rows that are pairs, (m,) bool; all of them when None.
            step_pairs: Pairs of the whole optimizer step, of all its micro-batches and ranks. The
                rows then wait until as many have come, and `value` is the same for every
                micro-batch of a step, however it is divided. None takes them in at once.

        Raises:
            TypeError: `instance` is not floating point.
            ValueError: `instance` is not (m, d).
        """
        self._check(instance)
        rows = instance.to(self.mean)
        pairs = rows.new_ones(len(rows), 1) if mask is None else mask.to(rows)[:, None]
        finite = rows.isfinite().all(1, keepdim=True)
        rows = torch.where(finite, rows, 0.0) * pairs
        # The counts ride along, so that one all-reduce is enough; float64 holds them to 2^53.
        sums = torch.cat([rows, finite * pairs, pairs], 1).sum(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        self.pending += sums
        whole = self.pending[-1] if step_pairs is None else step_pairs
        done = (self.pending[-1] >= whole).to(self.pending)
        total, gained = done * self.pending[:-2], done * self.pending[-2]
        self.count += gained.to(torch.int64)
        self.mean += (total - gained * self.mean) / self.count.clamp_min(1)
        self.pending *= 1.0 - done

    @torch.no_grad()
    def restart(self, instance: Tensor) -> None:
        """Forget everything and start with the mean of these rows, the same ones on every rank.

        Args:
            instance: d_instance, (m, d), any floating dtype. Rows that are not finite are left out.

        Raises:
            TypeError: `instance` is not floating point.
            ValueError: `instance` is not (m, d).
        """
        self._check(instance)
        rows = instance.to(self.mean)
        rows = rows[rows.isfinite().all(1)]
        self.count.fill_(len(rows))
        self.mean.copy_(rows.sum(0) / max(len(rows), 1))
        self.pending.zero_()

    def _check(self, instance: Tensor) -> None:
        check_floating(instance=instance)
        check_dim("instance", instance, 2)
        check_last_dim("instance", instance, self.dim)

    @property
    def value(self) -> Tensor:
        """The direction, (d,) float32; zero before the first pair. A copy, without gradient."""
        return self.mean.to(torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShiftDirection:
        wide = {"mean": self.mean, "pending": self.pending}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in wide.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
