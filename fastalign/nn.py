"""Modules that hold parameters or state: classifier, shift and direction of DeepAlign, MoCa."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.ops._check import (
    check_dim,
    check_floating,
    check_integer,
    check_last_dim,
    check_one_of,
    check_shape,
)
from fastalign.ops.calibrate import calibrate

__all__ = ["ModalityCalibration", "ModalityClassifier", "ModalityShift", "ShiftDirection"]

Grid: TypeAlias = tuple[int, int]


class ModalityClassifier(nn.Module):
    """MLP that tells text (0) from vision (1) by a pooled representation (DeepAlign, section 1.1).

    Linear layers with GELU between them. Its gradient marks the channels that are specific to a
    modality: see `channel_weights`, and `fastalign.ops.hadamard_reweight` for what they weight.

    Args:
        dim: Width d of the representations.
        hidden_dims: Widths of the hidden layers; empty for a linear classifier.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (512,)) -> None:
        super().__init__()
        self.dim = dim
        widths = [dim, *hidden_dims, 2]
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Logits of (text, vision).

        Args:
            h: Representations, (..., d), any floating dtype.

        Returns:
            (..., 2) in the dtype of the parameters.

        Raises:
            TypeError: `h` is not floating point.
            ValueError: The last dimension of `h` is not d.
        """
        return self._forward(h)[0]

    @torch.no_grad()
    def channel_weights(self, h: Tensor, label: int | Tensor) -> Tensor:
        """Gradient of the label's logit with respect to `h`, Grad-CAM's weights (section 1.2).

        The chain rule written out, in the dtype of the parameters and never in autocast's: no
        autograd graph is built, none is needed, and the result is detached.

        Args:
            h: Representations, (..., d), any floating dtype.
            label: Modality whose logit is differentiated: 0 (text) or 1 (vision), or a tensor of
                them, (...) int64 or int32.

        Returns:
            (..., d) in the dtype of `h`.

        Raises:
            TypeError: `h` is not floating point, or a tensor `label` not integer.
            ValueError: The last dimension of `h` is not d, or `label` is neither 0 nor 1, or has
                another shape.
        """
        if not isinstance(label, Tensor):
            check_one_of("label", label, (0, 1))
            label = int(label)
        else:
            check_integer(label=label)
            check_shape("label", label, tuple(h.shape[:-1]), "(...)")
        with torch.autocast(h.device.type, enabled=False):
            _, hidden = self._forward(h)
            weights = [layer.weight for layer in self._linears()]
            gradient = weights[-1][label]
            for z, weight in zip(reversed(hidden), reversed(weights[:-1]), strict=True):
                gradient = (gradient * _gelu_slope(z)) @ weight
        return gradient.expand(h.shape).to(h.dtype, copy=True)

    def _forward(self, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what went into each GELU."""
        check_floating(h=h)
        check_last_dim("h", h, self.dim)
        *first, last = self._linears()
        z = h.to(last.weight.dtype)
        hidden: list[Tensor] = []
        for layer in first:
            hidden.append(layer(z))
            z = F.gelu(hidden[-1])
        return last(z), hidden

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]


def _gelu_slope(z: Tensor) -> Tensor:
    """d/dz [z Phi(z)] = Phi(z) + z phi(z), with the standard normal's Phi and phi."""
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density


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


class ModalityCalibration(nn.Module):
    """Learnable calibration of the vision tokens, x <- u * x + v (MoCa, section 4).

    Args:
        dim: Width d of the hidden states.
        init_std: Standard deviation of u around 1 and of v around 0; with 0 the module starts as
            the identity. The released code draws them with a small one.
    """

    def __init__(self, dim: int, init_std: float = 0.0) -> None:
        super().__init__()
        if not init_std >= 0:
            raise ValueError(f"init_std must be at least 0: got {init_std!r}")
        self.dim, self.init_std = dim, init_std
        self.scale = nn.Parameter(torch.empty(dim))
        self.shift = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw u and v anew."""
        nn.init.normal_(self.scale, 1.0, self.init_std)
        nn.init.normal_(self.shift, 0.0, self.init_std)

    def forward(self, x: Tensor, vision_mask: Tensor) -> Tensor:
        """Calibrate vision tokens: `fastalign.ops.calibrate` with the module's parameters.

        Args:
            x: Hidden states, (..., d).
            vision_mask: (...) bool, true for vision tokens; the others pass bit for bit.

        Returns:
            The shape and dtype of `x`.
        """
        return calibrate(x, vision_mask, self.scale, self.shift)


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
