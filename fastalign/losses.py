"""The losses of DeepAlign and CAL: argument checks over the formulas of `fastalign.reference`.

All of them compute in float32 (float64 for float64 inputs), whatever the input type and whatever
autocast says, give scalars of that type, never write into an input and never wait for the device
unless the docstring says so. A NaN in an input that counts gives a NaN loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import reference
from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import (
    check_dim,
    check_floating,
    check_last_dim,
    check_one_of,
    check_positive,
    check_same,
    check_shape,
    check_width,
)
from fastalign.ops._gather import gather_rows
from fastalign.ops.contrast_weights import contrast_weights as contrast_weights
from fastalign.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastalign.ops.structure_distill import structure_distill as structure_distill
from fastalign.reference import CrossEntropy as CrossEntropy

__all__ = [
    "CrossEntropy",
    "contrast_weights",
    "linear_cross_entropy",
    "mutual_information",
    "resample_grid",
    "shift_align",
    "structure_distill",
]

REDUCTIONS = ("mean", "sum", "none")


def resample_grid(features: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Patch features brought to another grid: bilinear, antialiased where it shrinks.

    For teachers whose patches are smaller or larger than the student's (DINOv2's 14 pixels, the
    merged 28 of Qwen2.5-VL). Use it before any normalisation, as `structure_distill` does its own.

    Args:
        features: (b, h * w, d), row-major over the grid, any floating dtype.
        grid: (h, w).
        target_grid: (h2, w2), each at least 1.

    Returns:
        (b, h2 * w2, d) in the dtype of `features`, interpolated in float32 or wider;
        `features` itself when the grids are equal.

    Raises:
        ValueError: `features` does not have h * w patches, or a side of a grid is below 1.
    """
    check_floating(features=features)
    check_dim("features", features, 3)
    for name, sides in (("grid", grid), ("target_grid", target_grid)):
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"{name} must be (height, width), each at least 1: got {sides}")
    (h, w), (h2, w2) = grid, target_grid
    if features.shape[1] != h * w:
        raise ValueError(
            f"features must have h * w = {h * w} patches for grid {(h, w)}: got "
            f"{features.shape[1]}; leave out tokens that are no patches (CLS, registers)"
        )
    if (h, w) == (h2, w2):
        return features
    b, _, d = features.shape
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    image = wide.reshape(b, h, w, d).permute(0, 3, 1, 2)
    image = F.interpolate(image, (h2, w2), mode="bilinear", align_corners=False, antialias=True)
    return image.permute(0, 2, 3, 1).reshape(b, h2 * w2, d).to(features.dtype)


def shift_align(
    original: Tensor,
    shifted: Tensor,
    direction: Tensor,
    *,
    kind: str = "cosine",
    reduction: str = "mean",
) -> Tensor:
    r"""Displacement against its target direction, $1 - \cos(h' - h, d)$ (DeepAlign, CVPR 2026).

    With the global direction it is L_global, with one direction a row L_instance.

    The cosine divides by $\max(|h' - h|, 10^{-3} |h|)$. It is the published one wherever a row has
    moved by a thousandth of its length; a row that has moved less counts for less, and one that has
    not moved has loss 1 and the gradient $-\hat d / (10^{-3} |h|)$: finite, and along the
    direction, so that a shift module that starts as the identity starts to move. (A plain cosine
    has no gradient there, and one stabilised by an absolute epsilon has an enormous one.)

    Args:
        original: Representations $h$, (m, d), any floating dtype. Detach it to hold it fixed.
        shifted: $h'$, the same shape; the gradient flows to both.
        direction: $d$, (d,) or (m, d), no gradient. A zero direction has cosine 0.
        kind: "cosine"; or "mse", the mean over the d entries of $(h' - h - d)^2$.
        reduction: "mean" over rows (0 when there is none), "sum" or "none".

    Returns:
        Scalar, or (m,) with reduction "none".

    Raises:
        TypeError: An input is not floating point.
        ValueError: Shapes, devices or options are wrong.
    """
    check_one_of("kind", kind, ("cosine", "mse"))
    check_one_of("reduction", reduction, REDUCTIONS)
    check_floating(original=original, shifted=shifted, direction=direction)
    check_dim("original", original, 2)
    check_same("shape", original=original, shifted=shifted)
    if direction.dim() == 1:
        check_last_dim("direction", direction, original.shape[1])
    else:
        check_shape("direction", direction, tuple(original.shape), "(d,) or (m, d)")
    check_same("device", original=original, shifted=shifted, direction=direction)
    check_width(original=original)
    return reference.shift_align(original, shifted, direction, kind, reduction)


def mutual_information(
    x: Tensor,
    y: Tensor,
    *,
    estimator: str = "infonce",
    temperature: float = 0.07,
    shrinkage: float = 1e-3,
    gather: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Mutual information of paired rows in nats, for L_MI of DeepAlign (CVPR 2026).

    "infonce" is the lower bound $\log m - CE$ of van den Oord et al. 2018 with the cosine over
    `temperature` as its critic, the mean of both directions: never above log m, and below 0 for
    pairs more alike to others than to their own. "gaussian" is $(\log|R_x| + \log|R_y| -
    \log|R_{xy}|) / 2$ of the correlation matrices, each shrunk to $(1 - \lambda) R + \lambda I$:
    exact for Gaussian data with many rows, biased upwards while m is not well above 2 d.

    Args:
        x: Rows, (m, d), any floating dtype; row i belongs to row i of `y`.
        y: (m, d); with "gaussian" the width may differ.
        estimator: "infonce" or "gaussian".
        temperature: Of "infonce", above 0.
        shrinkage: $\lambda$ of "gaussian", in (0, 1).
        gather: Use the rows of all ranks, which may hold different numbers of them (that waits for
            the device once), with gradient to each. Every rank has to call it, and to run the
            backward. Each rank gets the loss of the whole batch; the mean of the ranks' parameter
            gradients, as DistributedDataParallel forms it, is then its gradient. Without
            torch.distributed initialised it changes nothing.
        mask: Rows that count, (m,) bool; all of them when None. The others are as good as absent,
            with gradient 0, and every shape stays what it is.

    Returns:
        Scalar; 0 for a single row, or a mask without any. Differentiable in `x` and `y`.

    Raises:
        TypeError: An input is not floating point.
        ValueError: There is no row, or shapes, devices or options are wrong.
    """
    check_one_of("estimator", estimator, ("infonce", "gaussian"))
    check_positive("temperature", temperature)
    if not 0 < shrinkage < 1:
        raise ValueError(f"shrinkage must lie in (0, 1): got {shrinkage}")
    check_floating(x=x, y=y)
    check_dim("x", x, 2)
    check_dim("y", y, 2)
    if estimator == "infonce":
        check_last_dim("y", y, x.shape[1])
    check_shape("y", y, (x.shape[0], y.shape[1]), "(m, d)")
    check_same("device", x=x, y=y)
    check_width(x=x, y=y)
    if mask is not None:
        check_shape("mask", mask, (x.shape[0],), "(m,)")
    if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
        x, y, *inside = gather_rows(x, y, *([] if mask is None else [mask[:, None].to(x)]))
        mask = inside[0][:, 0] > 0 if inside else None
    if x.shape[0] == 0:
        raise ValueError("x and y must have at least one row: got none; skip the term instead")
    with no_autocast(x):
        return reference.mutual_information(x, y, estimator, temperature, shrinkage, mask)
