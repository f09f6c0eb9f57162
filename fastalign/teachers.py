"""Frozen vision models whose patch similarities supervise a student."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import Batch

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
Statistics = tuple[Sequence[float], Sequence[float]]


class PatchTeacher(nn.Module):
    """Patch features of a vision transformer of transformers (`Dinov2Model`, `DINOv3ViTModel`).

    It sees the student's images: their normalisation is undone, they are resized to the teacher's
    own size (bicubic, antialiased) and normalised as the teacher expects. Frozen, in evaluation
    mode, without gradient.

    Args:
        model: Returns `last_hidden_state` (images, prefix + h * w, C) for pixels (images, 3, H, W).
        image_size: Side of the teacher's images in pixels, a multiple of its patch size; the size
            in its configuration when None.
        student: Mean and standard deviation by which the student's pixels were normalised.
        teacher: The same for the teacher's pixels; ImageNet's, as in DINOv2 and DINOv3.

    Raises:
        ValueError: `image_size` is not a multiple of the patch size.
    """

    student_mean: Tensor
    student_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        student: Statistics,
        teacher: Statistics = IMAGENET,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        self.patch_size: int = config.patch_size
        self.image_size: int = image_size or config.image_size
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of the teacher's patch size {self.patch_size}: "
                f"got {self.image_size}"
            )
        for name, (mean, std) in (("student_", student), ("", teacher)):
            self.register_buffer(name + "mean", torch.tensor(mean)[:, None, None], persistent=False)
            self.register_buffer(name + "std", torch.tensor(std)[:, None, None], persistent=False)

    @classmethod
    def from_pretrained(
        cls, path: str, student_path: str, *, image_size: int | None = None
    ) -> "PatchTeacher":
        """The teacher at `path`, for a student whose processor lies at `student_path`."""
        from transformers import AutoImageProcessor, AutoModel

        loader: Any = AutoImageProcessor
        processor = loader.from_pretrained(student_path)
        statistics = (processor.image_mean, processor.image_std)
        return cls(AutoModel.from_pretrained(path), student=statistics, image_size=image_size)

    def train(self, mode: bool = True) -> "PatchTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Patch features, (images, h * w, C), of a batch's `pixel_values` (images, 3, H, W)."""
        pixels = batch["pixel_values"].float() * self.student_std + self.student_mean
        size = (self.image_size, self.image_size)
        pixels = nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        pixels = (pixels.clamp(0.0, 1.0) - self.mean) / self.std
        dtype = next(self.model.parameters()).dtype
        hidden: Tensor = self.model(pixel_values=pixels.to(dtype)).last_hidden_state
        # The class token and the registers come before the patches.
        return hidden[:, -((self.image_size // self.patch_size) ** 2) :]
