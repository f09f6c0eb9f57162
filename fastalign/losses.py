"""The losses of DeepAlign and CAL: argument checks over the formulas of `fastalign.reference`.

All of them compute in float32 (float64 for float64 inputs), whatever the input type and whatever
autocast says, give scalars of that type, never write into an input and never wait for the device
unless the docstring says so. A NaN in an input that counts gives a NaN loss.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign import reference
from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import (
    check_cu_seqlens,
    check_dim,
    check_floating,
    check_integer,
    check_last_dim,
    check_one_of,
    check_positive,
    check_same,
    check_shape,
    check_width,
)
from fastalign.ops._gather import gather_rows
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


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    details: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = ...,
    bias: Tensor | None = ...,
    ignore_index: int = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    reduction: str = ...,
    details: Literal[True],
) -> CrossEntropy: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    details: bool = False,
) -> Tensor | CrossEntropy:
    r"""Weighted cross-entropy of a linear head, $\sum_i w_i CE_i / \sum_i w_i$ (CAL, NeurIPS 2024).

    The logits are $z = H W^T + b$, then times `logit_scale`, then $c \tanh(z / c)$ with softcap $c$
    (the order of Gemma and Cohere). Sums run over the labels that are not `ignore_index`.

    Args:
        hidden: Rows that predict the labels, (t, d), any floating dtype.
        weight: Output embeddings, (v, d); their dtype may differ from that of `hidden`.
        labels: (t,) int64 or int32, in [0, v) or `ignore_index`; already shifted.
        token_weights: $w$, (t,), not negative; constants: no gradient flows to them. None: 1.
        bias: (v,) or None.
        ignore_index: Label of rows that take no part; even NaN in such a row goes nowhere.
        logit_scale: Factor of the logits.
        softcap: Bound of the logits, above 0, or None.
        reduction: "mean" is the formula above; "sum", $\sum_i w_i CE_i$; "none", $w_i CE_i$ per row
            and 0 at ignored labels.
        details: Return a `CrossEntropy` (loss, per_token, correct) instead.

    Returns:
        Scalar, or (t,) with reduction "none". Without a label, or with weights that are all 0,
        it is 0 with gradient 0. Differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError: An input has the wrong kind of dtype.
        ValueError: Shapes, devices or options are wrong; on CPU also a label outside [0, v), which
            CUDA answers with torch's device-side assertion.
    """
    check_one_of("reduction", reduction, REDUCTIONS)
    check_floating(hidden=hidden, weight=weight)
    check_integer(labels=labels)
    check_dim("hidden", hidden, 2)
    check_dim("weight", weight, 2)
    check_last_dim("weight", weight, hidden.shape[1])
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    check_shape("labels", labels, (tokens,), "(t,)")
    check_same("device", hidden=hidden, weight=weight, labels=labels)
    if token_weights is not None:
        check_floating(token_weights=token_weights)
        check_shape("token_weights", token_weights, (tokens,), "(t,)")
        check_same("device", hidden=hidden, token_weights=token_weights)
    if bias is not None:
        check_floating(bias=bias)
        check_shape("bias", bias, (vocabulary,), "(v,)")
        check_same("device", hidden=hidden, bias=bias)
    if softcap is not None:
        check_positive("softcap", softcap)
    _check_labels(labels, vocabulary, ignore_index)
    with no_autocast(hidden):
        return reference.linear_cross_entropy(
            hidden, weight, labels, token_weights, bias, ignore_index, logit_scale, softcap,
            reduction, details,
        )  # fmt: skip


def contrast_weights(
    delta: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
    compat: str = "paper",
) -> Tensor:
    r"""Token weights $w_j = avgpool_W(clamp(\Delta_j, \alpha, \beta))$ (CAL, eq. 3 and 4).

    The pool is centred on its token and averages over what exists: at a border it divides by the
    number of neighbours it has, not by the window.

    Args:
        delta: Label logit with the image less that without it, (t,), any floating dtype. With
            "paper" only labels that are not ignored; with "official" the flattened (b * (L - 1),)
            row of all positions, where the released code takes token 0 for an ignored label.
        cu_seqlens: Offsets of the samples in `delta`, (b + 1,) int32 or int64; None: one sample.
            Their values are checked on CPU only, where no device has to be waited for.
        clamp: (alpha, beta).
        window: W, odd.
        compat: "paper", no window reaches into another sample; "official", the released code, whose
            windows run over the flattened batch, across samples and ignored positions.

    Returns:
        Weights in [alpha, beta], (t,), float32 (float64 for float64), without gradient. NaN stays
        NaN in every window that holds one.

    Raises:
        TypeError: `delta` is not floating point, or `cu_seqlens` not integer.
        ValueError: Shapes or options are wrong, or "official" came with `cu_seqlens`.
    """
    check_one_of("compat", compat, ("paper", "official"))
    check_floating(delta=delta)
    check_dim("delta", delta, 1)
    if not clamp[0] <= clamp[1]:
        raise ValueError(f"clamp must be (alpha, beta) with alpha <= beta: got {clamp}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and at least 1, to have a centre: got {window}")
    if cu_seqlens is not None:
        if compat == "official":
            raise ValueError(
                'cu_seqlens must be None with compat="official", which pools across samples: '
                'leave it out, or use compat="paper"'
            )
        check_cu_seqlens(cu_seqlens, delta.shape[0], "delta")
    return reference.contrast_weights(delta, cu_seqlens, clamp, window, compat)


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

    Returns:
        Scalar; 0 for a single row. Differentiable in `x` and `y`.

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
    if gather and torch.distributed.is_available() and torch.distributed.is_initialized():
        x, y = gather_rows(x, y)
    if x.shape[0] == 0:
        raise ValueError("x and y must have at least one row: got none; skip the term instead")
    with no_autocast(x):
        return reference.mutual_information(x, y, estimator, temperature, shrinkage)


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if wrong.any():
        raise ValueError(
            f"labels must lie in [0, {vocabulary}) or be ignore_index = {ignore_index}: got "
            f"{labels[wrong][0].item()} at row {wrong.nonzero()[0].item()}"
        )
