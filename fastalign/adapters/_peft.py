"""PEFT's tuners beside an adapter, found by what PEFT marks: it need not be installed."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from fastalign.adapters._adapter import NAME
from fastalign.models._side_stream import is_writer, whole_tensor


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


def save_tuners(model: nn.Module, folder: Path) -> list[Path]:
    """Write the tuners in a model in PEFT's own layout, as `PeftModel.save_pretrained` would.

    The tuner named "default" lies in `folder` itself, others in folders of their names; those of a
    part of the model, which PEFT was given in place of the whole, below the part's dotted name.
    Of a model that FSDP2 has sharded every rank must call, and the first one writes.

    Args:
        model: The base that PEFT has changed in place, and not PEFT's wrapper.
        folder: Made where there is something to write.

    Returns:
        The folders written: `adapter_config.json` and `adapter_model.safetensors` in each.
    """
    written = []
    for part, module in model.named_modules():
        configs = vars(module).get("peft_config")
        for name in configs if isinstance(configs, dict) else ():
            places = [piece for piece in (part, "" if name == "default" else name) if piece]
            path = folder.joinpath(*places)
            _save_tuner(module, name, path)
            written.append(path)
    return written


def _save_tuner(module: nn.Module, name: str, path: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # The embeddings are the base's: "auto" would ask a hub whether they were resized.
    tensors = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
    kept = {
        # As in the file of a PeftModel, which holds the model as `base_model.model`.
        f"base_model.model.{key}": whole_tensor(value.detach()).cpu().clone().contiguous()
        for key, value in tensors.items()
        if NAME not in key.split(".")  # `bias="all"` takes every bias
    }
    if not is_writer(tensors):
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file(kept, path / "adapter_model.safetensors", metadata={"format": "pt"})
    configs: Any = module.peft_config
    config = copy.deepcopy(configs[name])
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(module, "name_or_path", None) or None
    kind = type(module)
    of_class = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(path, auto_mapping_dict=None if config.task_type else of_class)
