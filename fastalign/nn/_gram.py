"""Gram anchoring as the module of DINOv3, over `fastalign.losses.structure_distill`."""

from __future__ import annotations

from torch import Tensor, nn

from fastalign.losses import structure_distill
from fastalign.ops._check import check_floating, check_one_of, check_same


class GramLoss(nn.Module):
    r"""Gram anchoring, $mean((S_h - S_g)^2)$ of patch similarities $S$ (DINOv3, arXiv:2508.10104).

    Takes the place of `dinov3.loss.gram_loss.GramLoss`: same options, same call, same value. Its
    mean over the b * n * n entries is the mean over images of `fastalign.losses.structure_distill`,
    which divides each image by n * n.

    Beyond it: float64 inputs are computed in float64, no gradient flows to the targets, a zero
    row has gradient 0 instead of one divided by 1e-12, and without patches the loss is 0, not NaN.

    Args:
        apply_norm: Similarities are cosines; otherwise dot products.
        img_level: Default of the argument of `forward`: similarities within each image, or among
            all patches of the batch.
        remove_neg: Negative similarities of student and teacher count as 0.
        remove_only_teacher_neg: Negative similarities of the teacher count as 0, and the student's
            stay as they are. This is what DINOv3's comments ask for ("only the negative sim values
            of the teacher") and, with either `compat`, what its code computes: it also writes a
            mask of the entries negative in both, but after clamping the teacher, when none is left.
        compat: "documented", or "dinov3" for its code, which drops the constructor's `img_level`:
            `forward` then takes images unless it is told otherwise.

    Raises:
        ValueError: Both `remove_neg`, true by default, and `remove_only_teacher_neg` are true, or
            `compat` is none of its names.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
        *,
        compat: str = "documented",
    ) -> None:
        super().__init__()
        check_one_of("compat", compat, ("documented", "dinov3"))
        if remove_neg and remove_only_teacher_neg:
            raise ValueError(
                "remove_neg and remove_only_teacher_neg must not both be true: remove_neg is by "
                "default; pass remove_neg=False with remove_only_teacher_neg=True"
            )
        self.apply_norm, self.img_level = apply_norm, img_level
        self.remove_neg, self.remove_only_teacher_neg = remove_neg, remove_only_teacher_neg
        self.compat = compat

    def forward(
        self, output_feats: Tensor, target_feats: Tensor, img_level: bool | None = None
    ) -> Tensor:
        """Loss of one batch.

        Args:
            output_feats: Patches of the student, (b, n, d), any floating dtype; (rows, d) also
                where similarities are taken among the batch.
            target_feats: Patches of the Gram teacher, (b, n, dt) or (rows, dt).
            img_level: Within each image (true) or among the batch (false); None: see the class.

        Returns:
            Scalar, float32 (float64 for float64 inputs), differentiable in `output_feats`.

        Raises:
            TypeError: An input is not floating point.
            ValueError: Shapes, numbers of patches or devices do not fit.
        """
        check_floating(output_feats=output_feats, target_feats=target_feats)
        check_same("device", output_feats=output_feats, target_feats=target_feats)
        if img_level is None:
            img_level = self.img_level if self.compat == "documented" else True
        student, teacher = (
            _patches(name, feats, img_level)
            for name, feats in (("output_feats", output_feats), ("target_feats", target_feats))
        )
        if student.shape[:-1] != teacher.shape[:-1]:
            raise ValueError(
                "target_feats must have the images and patches of output_feats: got "
                f"{tuple(target_feats.shape)} and {tuple(output_feats.shape)}; "
                "fastalign.losses.resample_grid brings the teacher's patches to another grid"
            )
        return structure_distill(
            student,
            teacher,
            similarity="cosine" if self.apply_norm else "dot",
            negatives=self._negatives(),
            level="image" if img_level else "batch",
        )

    def _negatives(self) -> str:
        if self.remove_neg:
            return "clip"
        return "clip_teacher" if self.remove_only_teacher_neg else "keep"

    def extra_repr(self) -> str:
        """The options, for `print(module)`."""
        names = ("apply_norm", "img_level", "remove_neg", "remove_only_teacher_neg", "compat")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _patches(name: str, feats: Tensor, img_level: bool) -> Tensor:
    """(b, n, d) as it is within images, (b * n, d) among the batch."""
    if feats.dim() == 3:
        return feats if img_level else feats.flatten(0, 1)
    if img_level or feats.dim() != 2:
        raise ValueError(
            f"{name} must be (b, n, d), or (rows, d) with img_level=False: "
            f"got shape {tuple(feats.shape)}"
        )
    return feats
