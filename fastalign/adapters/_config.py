"""What an adapter holds, and what follows from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.models._towers import describe_tower
from fastalign.nn import ModalityCalibration, ModalityShift

# DeepAlign, appendix A: after which layers of the vision tower, and how many parameters in all.
PAPER_LAYERS, PAPER_PARAMETERS = (4, 6), 200_000_000
_ROUND = 64  # channels a tensor core takes together
_NO_IMAGE_TOKENS = ("mllama",)


@dataclass(frozen=True)
class AdapterConfig:
    """What to insert and where.

    Attributes:
        shift_layers: Layers of the vision tower, from 1, after which a `ModalityShift` stands on
            the grid of each picture's patches (DeepAlign, appendix A: 4 and 6). Empty for none.
        shift_hidden_dim: Channels between its two convolutions; the tower's width when None. The
            published size is `AdapterConfig.paper(model)`.
        kernel_size: Of the convolutions, odd.
        calibration: A `ModalityCalibration` after every layer of the decoder (MoCa, section 4).
        calibration_init_std: Spread of its start around the identity; 0 as published.
        decoder_shift_layers: Layers of the decoder, from 1, after which a `ModalityShift` stands on
            the grid of the image tokens. Empty for none.
        decoder_shift_hidden_dim: Channels between its two convolutions; the decoder's width when
            None.
    """

    shift_layers: tuple[int, ...] = PAPER_LAYERS
    shift_hidden_dim: int | None = None
    kernel_size: int = 3
    calibration: bool = False
    calibration_init_std: float = 0.0
    decoder_shift_layers: tuple[int, ...] = ()
    decoder_shift_hidden_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("shift_layers", "decoder_shift_layers"):
            layers = tuple(getattr(self, name))
            object.__setattr__(self, name, layers)
            if len(set(layers)) != len(layers):
                raise ValueError(f"{name} must not repeat: got {layers}")
        if not (self.shift_layers or self.decoder_shift_layers or self.calibration):
            raise ValueError(
                "an adapter must hold something: got no shift_layers, no decoder_shift_layers and "
                "calibration=False"
            )

    @classmethod
    def paper(cls, model: Any) -> AdapterConfig:
        """DeepAlign's published adapter: about 200 M parameters after layers 4 and 6.

        The channels between the convolutions are the multiple of 64 that comes nearest: 5,440 for a
        tower of width 1,024.

        Args:
            model: A model of transformers, a `VLM`, or such a model's configuration.

        Raises:
            TypeError: The order of its tower's patches is not known.
            ValueError: Its tower has too few layers.
        """
        config = cls()
        check_shift_layers(config.shift_layers, config_of(model))
        width = describe_tower(config_of(model).vision_config).width
        taps = config.kernel_size**2
        # A module has 2 taps d c + c + d parameters, d wide with c channels between.
        each = PAPER_PARAMETERS / len(config.shift_layers)
        channels = (each - width) / (2 * taps * width + 1)
        return cls(shift_hidden_dim=max(1, round(channels / _ROUND)) * _ROUND)


def config_of(model: Any) -> Any:
    """The configuration of a model, of a `VLM`, or itself."""
    return getattr(model, "config", model)


def last_read_layer(config: Any) -> int:
    """The highest layer of the vision tower, from 1, whose output the language model reads.

    Args:
        config: Of the whole model.

    Raises:
        TypeError: The order of its tower's patches is not known.
    """
    depth = describe_tower(config.vision_config).depth
    return max(k if k >= 0 else depth + 1 + k for k in _feature_layers(config))


def _feature_layers(config: Any) -> list[int]:
    chosen = getattr(config, "vision_feature_layer", None)
    return [chosen] if isinstance(chosen, int) else list(chosen or [-1])


def upper_half(model: Any) -> int:
    """The first layer of the upper half of the vision tower, from 1: 13 of 24.

    ShareGPT4V trains this half: `TrainConfig(train_vision_from=upper_half(model))`.

    Args:
        model: A model of transformers, a `VLM`, or such a model's configuration.

    Raises:
        TypeError: The tower is not known.
    """
    return describe_tower(config_of(model).vision_config).depth // 2 + 1


def check_read_layers(name: str, layers: tuple[int, ...], config: Any) -> None:
    """Raise ValueError unless `layers` exist and lie at or below the last that is read."""
    last = last_read_layer(config)
    for k in layers:
        if not 1 <= k <= last:
            depth = describe_tower(config.vision_config).depth
            raise ValueError(
                f"{name} must lie in 1..{last}, the encoder layers that the language model reads "
                f"(vision_feature_layer {_feature_layers(config)} of {depth}): got {k}"
            )


def check_shift_layers(layers: tuple[int, ...], config: Any) -> None:
    """Raise where a shift module cannot stand in the vision tower."""
    if layers:
        check_read_layers("shift_layers", layers, config)


def check_token_grids(name: str, config: Any) -> None:
    """Raise where the image tokens of the decoder lie on no grid that is known."""
    check_image_tokens(name, config)
    if hasattr(config, "qformer_config"):
        raise ValueError(
            f"{name} must be off for {config.model_type}: its image tokens are a Q-Former's "
            "queries, which lie on no grid; shift_layers work"
        )


def check_decoder_shift_layers(layers: tuple[int, ...], config: Any) -> None:
    """Raise where a shift module cannot stand in the decoder."""
    if not layers:
        return
    check_token_grids("decoder_shift_layers", config)
    depth = config.get_text_config().num_hidden_layers
    for k in layers:
        if not 1 <= k <= depth:
            raise ValueError(f"decoder_shift_layers must lie in 1..{depth}: got {k}")


def check_image_tokens(name: str, config: Any) -> None:
    """Raise where the decoder has no image tokens for the setting `name` to act on."""
    if config.model_type in _NO_IMAGE_TOKENS:
        raise ValueError(
            f"{name} must be off for {config.model_type}: its images are no tokens of the decoder, "
            "which reads them by cross-attention"
        )


def build_parts(adapter: AdapterConfig, config: Any) -> dict[str, nn.ModuleDict]:
    """The modules of an adapter, by kind and by the layer that each follows.

    Args:
        adapter: What to build.
        config: Of the model.

    Raises:
        TypeError: `shift_layers` are given and the order of the tower's patches is not known.
        ValueError: A layer does not exist or is not read, or the family cannot have the part.
    """
    check_shift_layers(adapter.shift_layers, config)
    check_decoder_shift_layers(adapter.decoder_shift_layers, config)
    if adapter.calibration:
        check_image_tokens("calibration", config)
    text = config.get_text_config()
    wide = describe_tower(config.vision_config).width if adapter.shift_layers else 0
    calibrated = range(1, adapter.calibration * text.num_hidden_layers + 1)
    return {
        "shifts": nn.ModuleDict(
            {
                str(k): ModalityShift(wide, adapter.shift_hidden_dim or wide, adapter.kernel_size)
                for k in adapter.shift_layers
            }
        ),
        "decoder_shifts": nn.ModuleDict(
            {
                str(k): ModalityShift(
                    text.hidden_size,
                    adapter.decoder_shift_hidden_dim or text.hidden_size,
                    adapter.kernel_size,
                )
                for k in adapter.decoder_shift_layers
            }
        ),
        "calibrations": nn.ModuleDict(
            {
                str(k): ModalityCalibration(text.hidden_size, adapter.calibration_init_std)
                for k in calibrated
            }
        ),
    }


def adapter_parameters(adapter: AdapterConfig, model: Any) -> Mapping[str, int]:
    """How many parameters an adapter has, without a weight of the model being read or made.

    Args:
        adapter: What would be inserted.
        model: A model of transformers, a `VLM`, or such a model's configuration.

    Returns:
        Of "shifts", "decoder_shifts" and "calibrations", and their "total".

    Raises:
        TypeError: As `attach` would.
        ValueError: As `attach` would.
    """
    with torch.device("meta"):
        parts = build_parts(adapter, config_of(model))
    counts = {kind: sum(p.numel() for p in part.parameters()) for kind, part in parts.items()}
    return {**counts, "total": sum(counts.values())}
