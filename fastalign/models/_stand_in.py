"""An image of ones for the vision tower, where a rank of a sharded model has none.

Every rank must run the same modules in the same order, as each gathers its weights from all ranks:
one that skips the vision tower would leave the others waiting, forward and backward.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn


def stand_in_image(model: nn.Module) -> Tensor:
    """A zero, (), that depends on every parameter which an image goes through to the decoder.

    Args:
        model: With `get_image_features`, as image-text-to-text models of transformers have.

    Raises:
        ValueError: The model has no such method, so that an image alone cannot be run.
    """
    anything: Any = model
    if not hasattr(model, "get_image_features"):
        raise ValueError(
            f"every rank of a sharded {type(model).__name__} needs an image in each batch, as it "
            "cannot run one by itself (get_image_features): add an image, masked if need be"
        )
    parameter = next(anything.get_encoder(modality="image").parameters())
    output = anything.get_image_features(**_inputs(anything, parameter))
    # What the decoder gets: the features, and those that Qwen3-VL adds to its first layers.
    used = [output.get("pooler_output"), output.get("deepstack_features")]
    leaves = [x for x in torch.utils._pytree.tree_leaves(used) if isinstance(x, Tensor)]
    # Of no element: 0 also where a feature is infinite, with a gradient of zeros.
    return torch.stack([x.flatten()[:0].sum().float() for x in leaves]).sum()


def _inputs(model: Any, like: Tensor) -> dict[str, Tensor]:
    """One image as the family's `get_image_features` takes it; of ones, as zeros are padding."""
    named = inspect.signature(model.get_image_features).parameters
    vision = model.config.vision_config
    if "image_grid_thw" in named:  # patches in rows, at least what one token merges
        side = vision.spatial_merge_size
        width = getattr(vision, "in_channels", 3) * vision.temporal_patch_size
        pixels = like.new_ones(side**2, width * vision.patch_size**2)
        grid = torch.tensor([[1, side, side]], device=like.device)
        return {"pixel_values": pixels, "image_grid_thw": grid}
    size = vision.image_size
    height, across = size if isinstance(size, (list, tuple)) else (size, size)
    shape = [1, 3, height, across]
    inputs = {}
    if "pixel_attention_mask" in named:  # images in rows
        shape.insert(1, 1)
    if hasattr(model.config, "image_grid_pinpoints"):  # a view of the whole and its tiles
        points = model.config.image_grid_pinpoints
        shape.insert(1, 1 + max(h * w // (height * across) for h, w in points))
    if "image_sizes" in named:
        inputs["image_sizes"] = torch.tensor([[height, across]], device=like.device)
    if "qformer_input_ids" in named:
        ids = torch.zeros(1, 1, dtype=torch.long, device=like.device)
        inputs |= {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)}
    return {"pixel_values": like.new_ones(shape), **inputs}
