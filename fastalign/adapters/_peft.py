"""PEFT's tuners beside an adapter, found by what PEFT marks: it need not be installed."""

from typing import Any

from torch import nn


def tuner_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that PEFT (LoRA and its relatives) has put into a model."""
    found: dict[nn.Parameter, None] = {}
    for module in model.modules():
        names: Any = getattr(module, "adapter_layer_names", ())
        for name in names:
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                found |= dict.fromkeys(part.parameters())
            elif isinstance(part, nn.Parameter):
                found[part] = None
    return list(found)


def prepare_base(model: nn.Module, trains_all: bool, writes_base: bool) -> None:
    """Freeze a model, or open all of it; PEFT parameters that are trained stay so.

    Args:
        model: Before its layers are opened for training one by one.
        trains_all: Every parameter is trained.
        writes_base: The result is a whole model, which has no place for PEFT's.

    Raises:
        ValueError: The result is a whole model, and this one has PEFT parameters.
    """
    tuned = tuner_parameters(model)
    if tuned and writes_base:
        raise ValueError(
            "a model with LoRA or another of PEFT's tuners cannot be trained and written whole: "
            'call merge_and_unload() of its PeftModel first, or set trainable="adapters" without '
            "train_vision_from"
        )
    trained = [parameter for parameter in tuned if parameter.requires_grad]
    model.requires_grad_(trains_all)
    for parameter in trained:
        parameter.requires_grad_(True)
