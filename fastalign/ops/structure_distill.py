"""Structure distillation: checks, gradient and the choice of the path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastalign_kernels import native
from torch import Tensor

from fastalign.ops import _structure_portable as portable
from fastalign.ops._check import (
    check_cu_seqlens,
    check_dim,
    check_floating,
    check_one_of,
    check_same,
    check_width,
)
from fastalign.ops._once import once
from fastalign.ops._path import on_triton
from fastalign.reference._rows import reduce

NEGATIVES = ("keep", "clip", "clip_teacher")


Kept = tuple[Tensor, Tensor, Tensor, Tensor]


class StructureDistill(torch.autograd.Function):
    """The kernels with their gradient: losses of the images, (b,), of packed rows.

    What the gradient needs is kept, and nothing is computed twice: R' where it is smaller than the
    gradient (`longest` <= d), the gradient itself where it is not.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
        cosine: bool, negatives: str, keep: int,
    ) -> Kept:  # fmt: skip
        from fastalign_kernels.structure_distill import structure_distill_fwd

        kept: Kept = structure_distill_fwd(
            student, teacher, cu_seqlens, images, longest, cosine, negatives, keep
        )
        return kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Kept) -> None:
        student, _, cu_seqlens, _, ctx.longest, ctx.cosine, _, ctx.keep = inputs
        ctx.save_for_backward(student, *output[1:], cu_seqlens)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        from fastalign_kernels.structure_distill import structure_distill_bwd

        return _backward(ctx, dlosses, structure_distill_bwd)


class StructureDistillPortable(StructureDistill):
    """The same on blocks of torch operations."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
        cosine: bool, negatives: str, keep: int,
    ) -> Kept:  # fmt: skip
        kept: Kept = portable.structure_distill_fwd(
            student, teacher, cu_seqlens, images, longest, cosine, negatives, keep
        )
        return kept

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dlosses, portable.structure_distill_bwd)


class StructureDistillNative(StructureDistill):
    """The same by the compiled kernels of the CPU."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, images: int, longest: int,
        cosine: bool, negatives: str, keep: int,
    ) -> Kept:  # fmt: skip
        kept: Kept = native.structure_distill_fwd(
            student, teacher, cu_seqlens, images, longest, cosine, negatives, keep
        )
        return kept

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dlosses, native.structure_distill_bwd)


def _backward(
    ctx: Any, dlosses: Tensor | None, product: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    dh = None
    if dlosses is not None and ctx.keep == portable.MATRIX:
        dh = once(product, dlosses, *ctx.saved_tensors, ctx.longest, ctx.cosine)
    elif dlosses is not None and ctx.keep == portable.GRADIENT:
        dh = once(_scaled, dlosses, *ctx.saved_tensors)
    return dh, *(None,) * 7


def _scaled(
    dlosses: Tensor, student: Tensor, gradient: Tensor, _: Tensor, factor: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    """The kept gradient times its image's factor; no device is waited for."""
    scale, rows = dlosses * factor, len(student)
    if cu_seqlens is None:
        scale = scale.repeat_interleave(rows // max(len(scale), 1), output_size=rows)
    else:
        scale = scale.repeat_interleave(cu_seqlens.diff(), output_size=rows)
    return (gradient * scale[:, None]).to(student.dtype)


def structure_distill(
    student: Tensor,
    teacher: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    similarity: str = "cosine",
    negatives: str = "keep",
    level: str = "image",
    reduction: str = "mean",
) -> Tensor:
    r"""Structure-induced distillation, $\frac{1}{n^2} \|\hat G \hat G^T - \hat H \hat H^T\|_F^2$.

    The patch similarities of the student are drawn to those of the teacher (DeepAlign, CVPR 2026,
    L_visual). It is also the Gram anchoring loss of DINOv3 and takes its options.

    No similarity matrix is formed: of the symmetric difference one half is computed, and what the
    gradient needs is kept, n x n or n x d numbers, whichever are fewer.

    Args:
        student: Patches $H$, (b, n, d), or packed (sum n, d) with `cu_seqlens`; float16, bfloat16
            or float32, on CPU also float64.
        teacher: Patches $G$ of the same images, (b, n, dt) or (sum n, dt), no gradient. Width and
            dtype may differ from the student's. Grids that differ: see `resample_grid`.
        cu_seqlens: Offsets of the images in the packed rows, (b + 1,) int32 or int64, 0 first, on
            the CPU or on the device of `student`. On a GPU they are not read by the host, and so
            not checked.
        max_seqlen: Patches of the longest image, or more. Without it, and with `cu_seqlens` on a
            GPU, an image may be as long as all of them together, which costs time and memory. Too
            small, where the host cannot see the offsets, it gives wrong results.
        similarity: "cosine", rows divided by their norm; or "dot".
        negatives: "keep"; "clip", negative similarities of both count as 0 (DINOv3's `remove_neg`);
            "clip_teacher", those of the teacher only. The last is what DINOv3's
            `remove_only_teacher_neg` computes: it clamps the teacher before it looks for entries
            negative in both, finds none, and so leaves every entry of the student as it is.
        level: "image", similarities within each image; "batch", among all patches of the batch,
            divided by the square of their number. "batch" also takes (N, d) without `cu_seqlens`.
        reduction: "mean" over the images that have patches (0 when none has), "sum" or "none".

    Returns:
        Scalar in float32 or wider; (b,) with reduction "none" ((1,) at level "batch"). An image
        without patches contributes 0. Differentiable once, in `student`; a zero row has similarity
        0 and gradient 0. In float16 on CUDA use loss scaling: gradients are divided by $n^2$.
        On CUDA a row shorter than 1e-18 counts as zero, and one longer than 1e18 gives NaN.

    Raises:
        TypeError: An input is not floating point, or `cu_seqlens` not integer.
        ValueError: Shapes, devices, offsets or option names are wrong, or the dtype is not
            supported on CUDA.
    """
    check_one_of("similarity", similarity, ("cosine", "dot"))
    check_one_of("negatives", negatives, NEGATIVES)
    check_one_of("level", level, ("image", "batch"))
    check_one_of("reduction", reduction, ("mean", "sum", "none"))
    check_floating(student=student, teacher=teacher)
    check_same("device", student=student, teacher=teacher)
    if cu_seqlens is not None:
        check_dim("student with cu_seqlens", student, 2)
        check_cu_seqlens(cu_seqlens, student.shape[0], "student")
    elif max_seqlen is not None:
        raise ValueError(
            f"max_seqlen must be None without cu_seqlens: got {max_seqlen}; all images of "
            "(b, n, d) have n patches"
        )
    elif student.dim() != 3 and (level == "image" or student.dim() != 2):
        raise ValueError(
            "student must be (b, n, d), or packed (sum n, d) with cu_seqlens: "
            f"got shape {tuple(student.shape)} and no cu_seqlens"
        )
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher must have the images and patches of student: got {tuple(teacher.shape)} and "
            f"{tuple(student.shape)}; fastalign.losses.resample_grid brings the teacher's patches "
            "to the student's grid"
        )
    check_width(student=student, teacher=teacher)
    if on_triton(student):
        from fastalign_kernels.structure_distill import DTYPES

        check_one_of("the dtype of student on CUDA", student.dtype, DTYPES)
        check_one_of("the dtype of teacher on CUDA", teacher.dtype, DTYPES)

    return compute(
        None, student, teacher, cu_seqlens, max_seqlen, similarity, negatives, level, reduction
    )


def compute(
    function: type[StructureDistill] | None,
    student: Tensor,
    teacher: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    similarity: str = "cosine",
    negatives: str = "keep",
    level: str = "image",
    reduction: str = "mean",
) -> Tensor:
    """`structure_distill` of checked arguments, by one of the functions above or the best here."""
    if level == "batch":
        cu_seqlens, images, longest = None, 1, student.shape[:-1].numel()
    elif cu_seqlens is None:
        images, longest = student.shape[:2]
    else:
        images = cu_seqlens.shape[0] - 1
        longest = _longest(cu_seqlens, max_seqlen, student.shape[0])
        cu_seqlens = cu_seqlens.to(student.device, non_blocking=True)
    d = student.shape[-1]
    if function is None:
        function = _best(student, teacher, longest)
    keep = portable.NOTHING
    if torch.is_grad_enabled() and student.requires_grad:
        keep = portable.MATRIX if longest <= d else portable.GRADIENT
    losses: Tensor = function.apply(  # type: ignore[no-untyped-call]
        student.reshape(-1, d), teacher.detach().reshape(-1, teacher.shape[-1]), cu_seqlens,
        images, longest, similarity == "cosine", negatives, keep,
    )[0]  # fmt: skip
    if cu_seqlens is None or reduction != "mean":
        return reduce(losses, reduction, images if longest else 0)
    return losses.sum() / (cu_seqlens.diff() > 0).sum().clamp_min(1)


def _best(student: Tensor, teacher: Tensor, longest: int) -> type[StructureDistill]:
    if on_triton(student):
        return StructureDistill
    compiled = native.takes_structure(student, teacher, longest)
    return StructureDistillNative if compiled else StructureDistillPortable


def _longest(cu_seqlens: Tensor, max_seqlen: int | None, rows: int) -> int:
    """A bound of the patches of an image, known to the host."""
    known = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if not known or len(cu_seqlens) < 2:
        return rows if max_seqlen is None else min(max_seqlen, rows)
    longest = int(cu_seqlens.diff().max())
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(
            f"max_seqlen must be at least {longest}, the longest image of cu_seqlens: got "
            f"{max_seqlen}"
        )
    return longest
