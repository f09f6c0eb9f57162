"""Teachers by their published sizes, or by a config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign.planning._sizes import matrices

# Sizes of the published vision transformers: keyword arguments of their configurations.
_V2: dict[str, Any] = {"patch_size": 14, "image_size": 518}
_V3: dict[str, Any] = {"patch_size": 16, "image_size": 224, "num_register_tokens": 4}
_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_G = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24}
TEACHERS: dict[str, dict[str, Any]] = {
    "dinov2-small": {"model_type": "dinov2", **_V2, **_S},
    "dinov2-base": {"model_type": "dinov2", **_V2, **_B},
    "dinov2-large": {"model_type": "dinov2", **_V2, **_L},
    "dinov2-giant": {"model_type": "dinov2", **_V2, **_G, "use_swiglu_ffn": True},
    "dinov3-vits16": {"model_type": "dinov3_vit", **_V3, **_S, "intermediate_size": 1536},
    "dinov3-vitb16": {"model_type": "dinov3_vit", **_V3, **_B, "intermediate_size": 3072},
    "dinov3-vitl16": {"model_type": "dinov3_vit", **_V3, **_L, "intermediate_size": 4096},
}


@dataclass(frozen=True)
class TeacherSizes:
    """A teacher at one size of its images.

    Attributes:
        parameters: Of the whole model.
        width: Of its features.
        patches: Of a square image.
        flops: Of one image.
        itemsize: Bytes of a weight, in the dtype that its configuration names, else float32.
    """

    parameters: int
    width: int
    patches: int
    flops: float
    itemsize: int


def measure_teacher(name: str, image_size: int | None) -> TeacherSizes:
    """Sizes of a teacher, without its weights.

    Args:
        name: One of `TEACHERS`, or a folder with a config.json.
        image_size: Side of its images in pixels; that of its configuration when None.

    Raises:
        FileNotFoundError: There is no such name, and no such folder.
        ValueError: It is no vision transformer, or the image size is no multiple of its patches.
    """
    from transformers import AutoConfig, AutoModel

    auto_config: Any = AutoConfig
    auto: Any = AutoModel
    if name in TEACHERS:
        config = auto_config.for_model(**TEACHERS[name])
    elif (Path(name) / "config.json").is_file():
        config = auto_config.from_pretrained(name, local_files_only=True)
    else:
        raise FileNotFoundError(
            f"teacher must be one of {', '.join(TEACHERS)} or a folder with a config.json: got "
            f"{name}"
        )
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or not hasattr(config, "num_hidden_layers"):
        raise ValueError(
            f"teacher must be a vision transformer with square patches: got {config.model_type}"
        )
    side = image_size or config.image_size
    if side % patch:
        raise ValueError(
            f"teacher_image_size must be a multiple of the teacher's patch size {patch}: got {side}"
        )
    patches = (side // patch) ** 2
    tokens = patches + 1 + (getattr(config, "num_register_tokens", 0) or 0)
    convolutions = matrices(model, nn.Conv2d)
    width: int = config.hidden_size
    flops = 2.0 * convolutions * patches + 2.0 * matrices(model, nn.Linear) * tokens
    flops += config.num_hidden_layers * 4.0 * width * tokens**2
    parameters = sum(p.numel() for p in model.parameters())
    dtype = getattr(config, "dtype", None) or torch.float32
    return TeacherSizes(parameters, width, patches, flops, dtype.itemsize)
