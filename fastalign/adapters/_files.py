"""Adapters on disk: safetensors and JSON, checked before the model changes."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.adapters._adapter import NAME, Adapter, adapter_of, install
from fastalign.adapters._config import AdapterConfig
from fastalign.adapters._metadata import CONFIG as CONFIG
from fastalign.adapters._metadata import FORMAT as FORMAT
from fastalign.adapters._metadata import describe_base
from fastalign.adapters._metadata import read_config as read_config
from fastalign.adapters._untrusted import file_in, read_header, short
from fastalign.models import VLM
from fastalign.models._side_stream import is_writer, whole_tensor
from fastalign.models._towers import describe_tower

WEIGHTS = "adapter_model.safetensors"
_PROBE = "probe."
# A model of another class may have the same parts: these are told, and not compared.
_TOLD = ("class", "vision_class")


def _check_base(saved: Mapping[str, Any], vlm: VLM, folder: Path) -> None:
    own = describe_base(vlm)
    if saved.keys() - own.keys():
        unknown = short(sorted(saved.keys() - own.keys()))
        raise ValueError(
            f"{folder / CONFIG} must hold a base of the keys {sorted(own)}: unknown {unknown}"
        )
    differing = [k for k in own if k not in _TOLD and saved.get(k) != own[k]]
    if differing:
        listed = ", ".join(f"{k} {_told(saved.get(k))} and here {own[k]}" for k in differing)
        raise ValueError(
            f"{folder} was saved from another model, {_told(saved.get('model_type'))} "
            f"({_told(saved.get('class'))}), and this is {own['model_type']} ({own['class']}): "
            f"{listed}"
        )


def _told(value: Any) -> str:
    return str(value) if isinstance(value, str) and value.isidentifier() else short(value)


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` to a folder: safetensors and JSON, nothing executable.

    Of a model that FSDP2 has sharded every rank must call, and the first one writes whole tensors.

    Each file is written beside its name and then moved there, so that a reader never sees half.
    The files have the names of PEFT's, and the keys that PEFT's tools read of any adapter.

    Args:
        model: With an adapter.
        path: A folder, made when missing.

    Raises:
        ValueError: The model has no adapter.
    """
    write_adapter(adapter_of(model), path)


def write_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """See `save_adapter`."""
    from safetensors.torch import save_file

    folder = Path(path)
    state = adapter.state_dict()
    tensors = {k: whole_tensor(v.detach()).cpu().contiguous() for k, v in state.items()}
    tensors |= {_PROBE + k: v for k, v in adapter.probe().items()}
    if not is_writer(state):
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (WEIGHTS + ".partial")
    save_file(tensors, partial)
    os.replace(partial, folder / WEIGHTS)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(adapter.metadata, indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach a saved adapter to `model`, or load it into the equal one that is attached.

    The folder may be a stranger's. Two files of fixed names are opened, both inside it. Everything
    is checked before anything is allocated and before the model changes: the base's family and
    sizes, the types of all settings, the header of the weights, every key, every shape. Then the
    weights must be finite, and each part must give the output it gave when it was saved. The size
    of the images does not matter.

    Args:
        model: Of the family and sizes that the adapter was saved from.
        path: Folder of `save_adapter`.

    Returns:
        The adapter.

    Raises:
        FileNotFoundError: A file is missing.
        NotADirectoryError: `path` is a file.
        TypeError: The adapter has parts in the vision tower, whose order of patches is not known.
        ValueError: The file is not of this format, of another model, of other keys or shapes than
            its configuration says, leads out of its folder, holds what is not finite, or a part's
            output differs from the stored one.
    """
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
    weights = file_in(folder, WEIGHTS)
    shapes = read_header(weights)
    _check_size(config, vlm, shapes, weights)
    try:
        with torch.device("meta"):
            fresh = Adapter(vlm, config)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not fit this model: {error}") from None
    _check_shapes(fresh, shapes, weights)
    _load_weights(fresh, weights)
    if existing is not None:
        existing.load_state_dict(fresh.state_dict())
        return adapter_of(model)
    return install(vlm, fresh)


def _check_size(
    config: AdapterConfig, vlm: VLM, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """No module is made, not even without memory, that has more weights than the file."""
    tower = describe_tower(vlm.config.vision_config).width if config.shift_layers else 0
    wanted, held = 0, sum(math.prod(shape) for shape in shapes.values())
    for layers, channels, width in (
        (config.shift_layers, config.shift_hidden_dim, tower),
        (config.decoder_shift_layers, config.decoder_shift_hidden_dim, vlm.hidden_size),
    ):
        wanted += len(layers) * 2 * config.kernel_size**2 * width * (channels or width)
    if wanted > held:
        raise ValueError(
            f"{path} must hold the weights of its configuration, {wanted:,} in convolutions alone: "
            f"got {held:,} numbers"
        )


def _check_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Every key, then every shape."""
    expected = adapter.state_dict()
    wanted = {*expected, *(_PROBE + k for k in adapter.probe_names())}
    if shapes.keys() != wanted:
        raise ValueError(
            f"{path} must hold the keys of its configuration: missing "
            f"{short(sorted(wanted - shapes.keys()))}, unknown "
            f"{short(sorted(shapes.keys() - wanted))}"
        )
    for key, tensor in expected.items():
        if shapes[key] != tuple(tensor.shape):
            raise ValueError(f"{key} in {path} must be {tuple(tensor.shape)}: got {shapes[key]}")


def _load_weights(fresh: Adapter, path: Path) -> None:
    """The values, then the probe."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in fresh.state_dict()}
            probes = {k: file.get_tensor(_PROBE + k) for k in fresh.probe_names()}
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from None
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            part, _, name = key.partition(".")
            layer, _, name = name.partition(".")
            raise ValueError(
                f"{part}.{layer} in {path} must be finite, and {name} is not: the file is damaged"
            )
    # The parts have no memory of their own yet: they take the tensors of the file.
    fresh.load_state_dict(tensors, assign=True)
    _check_probe(fresh, probes, path.parent)


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
