"""What a vision model of transformers gives: its patch size, and the patches in its output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ACCEPTED = (
    "Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, DINOv3ConvNextModel, or a model that "
    "gives a feature map (images, C, h, w), such as AutoBackbone's or ResNetModel"
)
_VITS = ("dinov2", "dinov2_with_registers", "dinov3_vit")


def image_size_of(model: nn.Module, given: int | None) -> int:
    """The side of a teacher's images in pixels: as given, else as configured.

    Raises:
        TypeError: The model does not take images.
        ValueError: Neither is a positive number.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise TypeError(f"model must be {ACCEPTED}: got {type(model).__name__}")
    size = given if given is not None else getattr(config, "image_size", None)
    if isinstance(size, Sequence) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"image_size must be a positive number of pixels: got {given}, and the configuration "
            f"of {type(model).__name__} says {getattr(config, 'image_size', None)}"
        )
    return size


def layout(model: nn.Module, image_size: int) -> tuple[int, int, int]:
    """Patch size in pixels, tokens before the patches (0 for a feature map), and width.

    Raises:
        ValueError: The model gives something else, or `image_size` does not fit its feature map.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", None)
    if kind in _VITS:
        patch = config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        return patch, 1 + getattr(config, "num_register_tokens", 0), config.hidden_size
    if kind == "dinov3_convnext":
        # A stem of stride 4, then a halving before each further stage; one mean token comes first.
        return 4 * 2 ** (len(config.hidden_sizes) - 1), 1, config.hidden_sizes[-1]
    # What another model gives is seen from one image.
    first = next(model.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        found = feature_map(model, model(pixel_values=image), 0, (0, 0))
    if image_size % found.shape[1]:
        raise ValueError(
            "image_size must be a multiple of the teacher's grid: "
            f"{type(model).__name__} gives {found.shape[1]} rows for {image_size} pixels"
        )
    return image_size // found.shape[1], 0, found.shape[3]


def feature_map(model: nn.Module, out: Any, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The features (images, h, w, C) in the output of a model that was shown `grid` patches.

    Raises:
        ValueError: The output is neither a feature map nor `prefix` tokens and then the patches.
    """
    maps = getattr(out, "feature_maps", None)
    hidden = maps[-1] if maps else getattr(out, "last_hidden_state", None)
    if isinstance(hidden, Tensor):
        # Of other models' four dimensions the last are the channels.
        channels = (getattr(model.config, "hidden_sizes", None) or [None])[-1]
        if hidden.dim() == 4 and (maps or hidden.shape[1] == channels):
            return hidden.movedim(1, -1)
        tokens = prefix + grid[0] * grid[1]
        if not maps and hidden.dim() == 3 and prefix and hidden.shape[1] == tokens:
            return hidden[:, prefix:].reshape(len(hidden), *grid, hidden.shape[2])
    shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else None
    raise ValueError(
        f"the teacher must be {ACCEPTED}: got {type(model).__name__}, whose "
        f"last_hidden_state is {shape} for {grid[0]} x {grid[1]} patches; any callable from a "
        "batch to features is a teacher too"
    )
