"""Patch features of a vision model of transformers."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastalign.models import Batch
from fastalign.teachers._layout import feature_map, image_size_of, layout
from fastalign.teachers._pretrained import IMAGENET, Statistics, load_model, statistics_at

Features = Tensor | list[Tensor]
Teacher = Callable[[Batch], Features]
Views = Callable[[Batch], Sequence[Tensor]]

# Settings of a configuration that do not change what the model computes.
_IDLE = ("_name_or_path", "transformers_version", "architectures", "dtype")
_FORMAT = 1  # of what lies between a view and its features


class PatchTeacher(nn.Module):
    """Patch features of a frozen vision model of transformers, for the student's views.

    The student's normalisation is undone, a view is resized (bicubic, antialiased, clamped to 0..1)
    and normalised as the teacher expects. A square view is shown at `image_size` x `image_size`.
    Another keeps its aspect ratio as nearly as whole patches allow, at about as many pixels: of the
    grids whose sides are `image_size / patch size` times sqrt(H / W) and sqrt(W / H), rounded up or
    down, the one nearest in ratio, then in area. The class token and the registers, which come
    before the patches, are left out. Frozen, in evaluation mode, without gradient.

    Args:
        model: Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, DINOv3ConvNextModel, or a
            model that gives a feature map (images, C, h, w): `feature_maps` of a backbone, of which
            the last is taken, or `last_hidden_state` as ResNetModel's. Any floating dtype.
        student: Mean and standard deviation by which the student's pixels were normalised, each
            three numbers for pixels in 0..1.
        teacher: The same for the teacher's pixels; ImageNet's, as in DINOv2 and DINOv3.
        image_size: Side of the teacher's square images in pixels, a multiple of its patch size;
            the size in its configuration when None.
        views: A batch to the pixels (3, H, W) of its views, as the student normalised them, of any
            sizes: `VLM.views`. When None, the images of a four-dimensional `pixel_values`.
        batch_size: Most images that go through the model at once.

    Raises:
        TypeError: `model` is none of these.
        ValueError: `image_size` is no multiple of the patch size or is not known, or a mean or
            standard deviation is not three numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        student: Statistics,
        teacher: Statistics = IMAGENET,
        image_size: int | None = None,
        views: Views | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1: got {batch_size}")
        self.statistics = {
            "student": _three("student", student), "teacher": _three("teacher", teacher)
        }  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size_of(model, image_size)
        self.patch_size, self.prefix, self.width = layout(model, self.image_size)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of the teacher's patch size {self.patch_size}: "
                f"got {self.image_size}"
            )
        self.views: Views = views or pixel_views
        self.batch_size = batch_size
        # Not buffers: a teacher cast to bfloat16 would round them.
        self._numbers: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        student_path: str,
        *,
        image_size: int | None = None,
        views: Views | None = None,
        batch_size: int = 32,
    ) -> "PatchTeacher":
        """The teacher at `path`, for a student whose processor lies at `student_path`.

        Weights of a head are neither needed nor loaded. The teacher's own pixel statistics are read
        where its folder has a `preprocessor_config.json`; they are ImageNet's where it has none.

        Args:
            path: Folder (or hub name) of the teacher: `config.json` and safetensors.
            student_path: Folder (or hub name) of the student's processor, also one that wraps an
                image processor.
            image_size, views, batch_size: See the class.

        Raises:
            FileNotFoundError: A folder is missing or lacks the file that is needed.
            ValueError: transformers does not know the type of model, weights are missing, or a
                processor does not say how it normalises.
        """
        student = statistics_at(student_path, "student_path")
        assert student is not None  # it would have raised
        model = load_model(path)
        teacher = statistics_at(path, "path", missing_ok=True) or IMAGENET
        return cls(
            model, student=student, teacher=teacher, image_size=image_size, views=views,
            batch_size=batch_size,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> "PatchTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, batch: Batch) -> Features:
        """Features of a batch's views; see `features`. A batch without `pixel_values` has none."""
        none = batch.get("pixel_values") is None
        return self.features([] if none else self.views(batch))

    @torch.no_grad()
    def features(self, views: Sequence[Tensor]) -> Features:
        """Features of views, those of one size together.

        Args:
            views: Pixels (3, H, W) as the student normalised them, any sizes, any floating dtype.

        Returns:
            (views, h, w, C) where all grids are equal, else a list of (h, w, C), in the dtype that
            the model gives (under autocast too) and on its device.

        Raises:
            ValueError: A view is not (3, H, W), or the model gives no patches and no feature map.
        """
        side = self.image_size // self.patch_size
        groups: dict[tuple[int, int], list[int]] = {}
        for place, view in enumerate(views):
            if view.dim() != 3 or view.shape[0] != 3 or not view.is_floating_point():
                raise ValueError(
                    f"views must be floating point (3, H, W): got {tuple(view.shape)} {view.dtype}"
                )
            groups.setdefault(nearest_grid(view.shape[1], view.shape[2], side), []).append(place)
        found: dict[int, Tensor] = {}
        for grid, places in groups.items():
            for start in range(0, len(places), self.batch_size):
                chunk = places[start : start + self.batch_size]
                images = self._run([views[place] for place in chunk], grid)
                found.update(zip(chunk, images.unbind(), strict=True))
        maps = [found[place] for place in range(len(views))]
        if len({m.shape for m in maps}) > 1:
            return maps
        dtype = next(self.model.parameters()).dtype
        empty = torch.empty(0, side, side, self.width, dtype=dtype, device=self.device)
        return torch.stack(maps) if maps else empty

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that features depend on beside the view.

        That is the class and configuration of the model, names, shapes, dtypes and bytes of its
        weights, the image size and the statistics. Computed anew by each call.
        """
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in _IDLE}  # type: ignore[operator,union-attr]
        about = [_FORMAT, type(self.model).__name__, config, self.image_size, self.statistics]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(raw_bytes(value))
        return digest.hexdigest()

    def _run(self, views: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """Features (views, h, w, C) of views that are all shown on one grid of patches."""
        size = [n * self.patch_size for n in grid]
        pixels = torch.cat([self._resized(same, size) for same in _runs(views)])
        mean, std = self._constants(pixels.device)[2:]
        pixels = (pixels.clamp(0.0, 1.0) - mean) / std
        out = self.model(pixel_values=pixels.to(next(self.model.parameters()).dtype))
        return feature_map(self.model, out, self.prefix, grid)

    def _resized(self, views: list[Tensor], size: list[int]) -> Tensor:
        """Views of one size to (views, 3, *size) float32, without the student's normalisation."""
        pixels = torch.stack([view.to(self.device, torch.float32) for view in views])
        mean, std = self._constants(pixels.device)[:2]
        pixels = pixels * std + mean
        if list(pixels.shape[2:]) == size:
            return pixels
        return nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)

    def _constants(self, device: torch.device) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the student, then of the teacher, (3, 1, 1) float32."""
        if device not in self._numbers:
            numbers = (*self.statistics["student"], *self.statistics["teacher"])
            self._numbers[device] = tuple(
                torch.tensor(n, dtype=torch.float32, device=device)[:, None, None] for n in numbers
            )
        return self._numbers[device]


def pixel_views(batch: Batch) -> list[Tensor]:
    """The images of a four-dimensional `pixel_values`; none when the batch has no images."""
    pixels = batch.get("pixel_values")
    if pixels is None:
        return []
    if pixels.dim() != 4:
        raise ValueError(
            f"pixel_values must be (images, 3, H, W): got {tuple(pixels.shape)}; give the teacher "
            "the views of the student's model, views=VLM(model).views"
        )
    return list(pixels.unbind())


def nearest_grid(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of about `side` ** 2 patches in the ratio of height to width."""
    ratio = height / width
    rows, cols = side * math.sqrt(ratio), side / math.sqrt(ratio)
    grids = [
        (max(1, r), max(1, c))
        for r in (math.floor(rows), math.ceil(rows))
        for c in (math.floor(cols), math.ceil(cols))
    ]

    def error(grid: tuple[int, int]) -> tuple[float, float]:
        r, c = grid
        return abs(math.log(r / c / ratio)), abs(math.log(r * c / side**2))

    return min(grids, key=error)


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _runs(views: list[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one shape together."""
    runs: list[list[Tensor]] = []
    for view in views:
        if runs and runs[-1][0].shape == view.shape:
            runs[-1].append(view)
        else:
            runs.append([view])
    return runs


def _three(name: str, statistics: Statistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (tuple(float(x) for x in numbers) for numbers in statistics)
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(
            f"{name} must be a mean and a standard deviation other than 0 for each of 3 channels: "
            f"got {mean} and {std}"
        )
    return mean, std
