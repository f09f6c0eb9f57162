"""Adapters on disk: safetensors and JSON, checked before the model changes."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.adapters._adapter import NAME, Adapter, adapter_of, install
from fastalign.adapters._config import AdapterConfig
from fastalign.models import VLM, layer_stack
from fastalign.models._towers import describe_tower

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = 2
_PROBE = "probe."
# A model of another class may have the same parts: these are told, and not compared.
_TOLD = ("class", "vision_class")


def _base(vlm: VLM) -> dict[str, Any]:
    """What a model must share with the one an adapter was trained on."""
    try:
        width: int | None = describe_tower(vlm.config.vision_config).width
    except TypeError:  # of an unknown tower, which holds no part of the adapter
        width = None
    return {
        "model_type": vlm.config.model_type,
        "class": type(vlm.model).__name__,
        "vision_type": type(vlm.config.vision_config).model_type,
        "vision_class": type(vlm.vision_tower).__name__,
        "vision_hidden_size": width,
        "vision_layers": len(layer_stack(vlm.vision_tower)),
        "hidden_size": vlm.hidden_size,
        "num_layers": vlm.num_layers,
    }


def _check_base(saved: Mapping[str, Any], vlm: VLM, folder: Path) -> None:
    own = _base(vlm)
    differing = [k for k in own if k not in _TOLD and saved.get(k) != own[k]]
    if differing:
        listed = ", ".join(f"{k} {saved.get(k)} and here {own[k]}" for k in differing)
        raise ValueError(
            f"{folder} was saved from another model, {saved.get('model_type')} "
            f"({saved.get('class')}), and this is {own['model_type']} ({own['class']}): {listed}"
        )


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` to a folder: safetensors and JSON, nothing executable.

    Each file is written beside its name and then moved there, so that a reader never sees half.

    Args:
        model: With an adapter.
        path: A folder, made when missing.

    Raises:
        ValueError: The model has no adapter.
    """
    from safetensors.torch import save_file

    adapter, vlm, folder = adapter_of(model), VLM(model), Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter.state_dict().items()}
    tensors |= {_PROBE + k: v for k, v in adapter.probe().items()}
    about = {"format": FORMAT, "adapter": asdict(adapter.config), "base": _base(vlm)}
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial)
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach a saved adapter to `model`, or load it into the equal one that is attached.

    Everything is checked before the model changes: the base's family and sizes, before anything is
    allocated, every key, every shape. Then each part must give the output it gave when it was
    saved. The size of the images does not matter.

    Args:
        model: Of the family and sizes that the adapter was saved from.
        path: Folder of `save_adapter`.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The file is not of this format, of another model, of other keys or shapes than
            its configuration says, or a part's output differs from the stored one.
    """
    from safetensors import SafetensorError

    folder = Path(path)
    config, base = read_config(folder)
    vlm = VLM(model)
    _check_base(base, vlm, folder)
    existing = getattr(model, NAME, None)
    if existing is not None and existing.config != config:
        raise ValueError(
            f"model has an adapter of another configuration: {existing.config} and {config} in "
            f"{folder}; call fastalign.detach first"
        )
    with torch.device("meta"):
        fresh = Adapter(vlm, config)
    try:
        _load_weights(fresh, folder)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} must be a safetensors file: {error}") from None
    if existing is not None:
        existing.load_state_dict(fresh.state_dict())
        return adapter_of(model)
    return install(vlm, fresh)


def _load_weights(fresh: Adapter, folder: Path) -> None:
    """Every key and shape, then the values, then the probe."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        expected = fresh.state_dict()
        wanted = {*expected, *(_PROBE + k for k in fresh.probe_names())}
        if names != wanted:
            raise ValueError(
                f"{folder / WEIGHTS} must hold the keys of its configuration: "
                f"missing {sorted(wanted - names)}, unknown {sorted(names - wanted)}"
            )
        for key, tensor in expected.items():
            shape = tuple(file.get_slice(key).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{key} in {folder / WEIGHTS} must be {tuple(tensor.shape)}: got {shape}"
                )
        # The parts have no memory of their own yet: they take the tensors of the file.
        fresh.load_state_dict({key: file.get_tensor(key) for key in expected}, assign=True)
        probes = {k: file.get_tensor(_PROBE + k) for k in fresh.probe_names()}
        _check_probe(fresh, probes, folder)


def read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """What an adapter on disk holds, and the model it was saved from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this format.
    """
    path = folder / CONFIG
    try:
        about = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    known = {f.name for f in fields(AdapterConfig)}
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} must be an adapter of format {FORMAT}")
    given = about.get("adapter")
    if not isinstance(given, dict) or set(given) - known:
        raise ValueError(f"{path} must hold an adapter of the keys {sorted(known)}: got {given}")
    return AdapterConfig(**given), about.get("base", {})


def _check_probe(adapter: Adapter, stored: dict[str, Tensor], folder: Path) -> None:
    """Outputs must agree to the rounding of another machine's float32 convolutions."""
    for name, actual in adapter.probe().items():
        error = torch.tensor(torch.inf)
        if stored[name].shape == actual.shape:
            error = (actual - stored[name]).abs().max() / stored[name].abs().max().clamp_min(1.0)
        if not error <= 1e-4:
            raise ValueError(
                f"{name} in {folder} does not give the output that was stored with it "
                f"(relative difference {float(error):.1e}): the file is damaged"
            )
