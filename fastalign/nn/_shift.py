"""Moves visual representations towards text, and keeps the direction (DeepAlign, section 1.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.ops._check import check_dim, check_floating, check_last_dim

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

    def forward(self, x: Tensor, grid: Grid | Sequence[Grid]) -> Tensor:
        """Shift the patches of a batch.

        Args:
            x: (b, n, d) with one grid, or packed (sum n, d) with a grid for each image. Any
                floating dtype.
            grid: (h, w), patches row-major. Where n > h * w, the first n - h * w tokens of each
                image are no patches (CLS, registers) and pass unchanged. For packed rows a list of
                (h, w), whose products add up to sum n.

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
            return self._packed(x, _check_grids(grid, x.shape[0]))
        h, w = _check_grid(grid)
        extra = x.shape[1] - h * w
        if extra < 0:
            raise ValueError(
                f"x must have at least h * w = {h * w} tokens an image for grid {(h, w)}: "
                f"got shape {tuple(x.shape)}"
            )
        if extra == 0:
            return self._shift(x, h, w)
        return torch.cat([x[:, :extra], self._shift(x[:, extra:], h, w)], 1)

    def _packed(self, x: Tensor, grids: list[Grid]) -> Tensor:
        """Images of one grid go through together: a bucketed batch costs what a dense one does."""
        images = list(torch.split(x, [h * w for h, w in grids]))
        for grid in dict.fromkeys(grids):
            members = [i for i, other in enumerate(grids) if other == grid]
            shifted = self._shift(torch.stack([images[i] for i in members]), *grid)
            for i, image in zip(members, shifted, strict=True):
                images[i] = image
        return torch.cat(images) if images else x

    def _shift(self, x: Tensor, h: int, w: int) -> Tensor:
        image = x.to(self.conv1.weight.dtype).reshape(-1, h, w, self.dim).permute(0, 3, 1, 2)
        shift: Tensor = self.conv2(F.relu(self.conv1(image)))
        return x + shift.permute(0, 2, 3, 1).flatten(1, 2).to(x.dtype)


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

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, instance: Tensor) -> None:
        """Take in the directions of a batch of pairs, from all ranks.

        With torch.distributed initialised every rank has to call this, with (0, d) when it has no
        pair, and all hold the same value afterwards. A row with NaN or infinity is left out: it
        would stay in the mean for the rest of the training. Nothing waits for the device.

        Args:
            instance: d_instance, (m, d), any floating dtype; m may be 0 and differ between ranks.

        Raises:
            TypeError: `instance` is not floating point.
            ValueError: `instance` is not (m, d).
        """
        check_floating(instance=instance)
        check_dim("instance", instance, 2)
        check_last_dim("instance", instance, self.dim)
        rows = instance.to(self.mean)
        finite = rows.isfinite().all(1, keepdim=True)
        # The count rides along, so that one all-reduce is enough; float64 holds it to 2^53.
        sums = torch.cat([rows.masked_fill(~finite, 0.0), finite.to(rows)], 1).sum(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, pairs = sums[:-1], sums[-1]
        self.count += pairs.to(torch.int64)
        self.mean += (total - pairs * self.mean) / self.count.clamp_min(1)

    @property
    def value(self) -> Tensor:
        """The direction, (d,) float32; zero before the first pair. A copy, without gradient."""
        return self.mean.to(torch.float32, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShiftDirection:
        mean = self.mean
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.mean.dtype != mean.dtype:
            self.mean = mean.to(self.mean.device)
        return self
