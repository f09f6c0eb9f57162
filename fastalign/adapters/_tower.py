"""Training a part of the vision tower beside adapters, as ShareGPT4V does its upper half."""

import torch

from fastalign.adapters._config import check_read_layers, last_read_layer
from fastalign.models import VLM, layer_stack


def open_tower(vlm: VLM, first: int) -> None:
    """Let the layers of the vision tower from `first` to the last that is read be trained.

    Args:
        vlm: The model.
        first: From 1, as `AdapterConfig.shift_layers`.

    Raises:
        TypeError: The tower is not known.
        ValueError: The language model does not read the layer, or weights are not float32.
    """
    check_read_layers("train_vision_from", (first,), vlm.config)
    for layer in layer_stack(vlm.vision_tower)[first - 1 : last_read_layer(vlm.config)]:
        for parameter in layer.parameters():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    "train_vision_from needs a model in float32, as smaller types round small "
                    f"steps away: got {parameter.dtype}; load it so, and set bf16=True to compute "
                    "in bfloat16"
                )
        layer.requires_grad_(True)
