"""Mini-Gemini's two-tower form (Li et al. 2024), built from transformers' parts.

A CLIP tower sees the image at low resolution and gives one token a patch; a ConvNeXt sees it at
high resolution, and each token looks up details in its own part of that map ("patch info mining"):

    t = MLP(q + softmax(q k^T) v),   q of one patch, k and v of the m x m cells inside it
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

hf: Any = import_module("transformers")  # whose types leave out what its classes take


class TwoTowerConfig(hf.LlavaConfig):  # type: ignore[misc]
    """LLaVA's configuration and that of the tower for high resolution."""

    model_type = "two_tower_llava"
    sub_configs = {**hf.LlavaConfig.sub_configs, "high_config": hf.ConvNextConfig}
    high_config: Any = None


class TwoTowerModel(hf.LlavaModel):  # type: ignore[misc]
    """`pixel_values` (images, 3, H, W) are of high resolution; CLIP gets them made smaller."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        low, high = config.vision_config.hidden_size, config.high_config.hidden_sizes[-1]
        self.vision_tower_high = hf.ConvNextModel(config.high_config)
        self.query, self.key, self.value = (nn.Linear(d, low) for d in (low, high, high))
        self.post_init()

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Any:
        """The image tokens, (images, patches, d), as `pooler_output`."""
        side = self.config.vision_config.image_size
        smaller = nn.functional.interpolate(pixel_values, (side, side), mode="area")
        output = self.vision_tower(smaller, output_hidden_states=True, return_dict=True)
        low = output.hidden_states[self.config.vision_feature_layer][:, 1:]
        grid = side // self.config.vision_config.patch_size
        high = self.vision_tower_high(pixel_values).last_hidden_state
        cells = high.shape[-1] // grid
        inside = high.unflatten(3, (grid, cells)).unflatten(2, (grid, cells))
        inside = inside.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # (b, n, m * m, c)
        weights = torch.softmax(self.query(low)[:, :, None] @ self.key(inside).mT, -1)
        mined = low + (weights @ self.value(inside))[:, :, 0]
        output.pooler_output = list(self.multi_modal_projector(mined))
        return output


class TwoTowerLlava(hf.LlavaForConditionalGeneration):  # type: ignore[misc]
    """The model with its head."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__(config)
        self.model = TwoTowerModel(config)
        self.post_init()


def two_towers(vision: dict[str, Any], text: dict[str, Any], image_token: int) -> TwoTowerLlava:
    """A model for images of twice CLIP's size, with 2 x 2 cells of ConvNeXt in each patch."""
    side = 2 * vision["image_size"]
    high = hf.ConvNextConfig(
        image_size=side, patch_size=vision["patch_size"] // 2, hidden_sizes=[16, 24],
        depths=[1, 1], num_stages=2,
    )  # fmt: skip
    config = TwoTowerConfig(
        vision_config=hf.CLIPVisionConfig(**vision),
        text_config=hf.LlamaConfig(**text),
        high_config=high,
        image_token_index=image_token,
    )
    return TwoTowerLlava(config)
