"""adapter_config.json: what an adapter holds and was saved from, beside keys that PEFT reads."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastalign.adapters._config import AdapterConfig
from fastalign.adapters._untrusted import file_in, read_json, short
from fastalign.models import VLM, layer_stack
from fastalign.models._towers import describe_tower

CONFIG = "adapter_config.json"
FORMAT = 2
MAX_CONFIG = 2**16  # bytes; it takes about 1,000
# PEFT has no such type: its loaders stop at this name, and take the file for none of theirs.
PEFT_TYPE = "FASTALIGN"
_PEFT = ("task_type", "auto_mapping", "base_model_name_or_path", "inference_mode")
_KNOWN = {"format", "adapter", "base", "peft_type", *_PEFT, "peft_version", "revision"}
_SIZES = range(1, 2**31)


def describe_base(vlm: VLM) -> dict[str, Any]:
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


def metadata(config: AdapterConfig, vlm: VLM) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": PEFT_TYPE,
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": getattr(vlm.model, "name_or_path", None) or None,
        "inference_mode": True,
        "format": FORMAT,
        "adapter": asdict(config),
        "base": describe_base(vlm),
    }


def read_config(folder: Path) -> tuple[AdapterConfig, dict[str, Any]]:
    """What an adapter on disk holds, and the model it was saved from.

    Raises:
        FileNotFoundError: There is no such file.
        NotADirectoryError: The folder is a file.
        ValueError: It is not of this format, or holds an unknown key or a value of another type.
    """
    path = file_in(folder, CONFIG)
    about = read_json(path, MAX_CONFIG)
    if not isinstance(about, dict) or about.get("peft_type", PEFT_TYPE) != PEFT_TYPE:
        kind = about.get("peft_type") if isinstance(about, dict) else about
        raise ValueError(
            f"{path} must be an adapter of fastalign: got {short(kind)}; one of PEFT's own is "
            "loaded by peft.PeftModel.from_pretrained"
        )
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be an adapter of format {FORMAT}: got {short(about.get('format'))}"
        )
    if about.keys() - _KNOWN:
        unknown = sorted(about.keys() - _KNOWN)
        raise ValueError(f"{path} must hold the keys {sorted(_KNOWN)}: unknown {short(unknown)}")
    base = about.get("base")
    if not isinstance(base, dict) or not all(_is_plain(v) for v in base.values()):
        raise ValueError(f"{path} must hold a base of names and sizes: got {short(base)}")
    return _read_adapter(about.get("adapter"), path), base


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (int, str)


def _is_size(value: Any) -> bool:
    return type(value) is int and value in _SIZES


def _is_layers(value: Any) -> bool:
    return isinstance(value, list) and all(_is_size(k) for k in value)


def _is_channels(value: Any) -> bool:
    return value is None or _is_size(value)


_CHANNELS = (_is_channels, "a size or null")
_LAYERS = (_is_layers, "a list of layers from 1")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shift_layers": _LAYERS,
    "shift_hidden_dim": _CHANNELS,
    "kernel_size": (lambda value: _is_size(value) and value % 2 == 1, "an odd size"),
    "calibration": (lambda value: isinstance(value, bool), "true or false"),
    "calibration_init_std": (
        lambda value: type(value) in (int, float) and 0 <= value < math.inf,
        "a number from 0",
    ),
    "decoder_shift_layers": _LAYERS,
    "decoder_shift_hidden_dim": _CHANNELS,
}


def _read_adapter(given: Any, path: Path) -> AdapterConfig:
    if not isinstance(given, dict) or given.keys() - _RULES.keys():
        got = sorted(given.keys() - _RULES.keys()) if isinstance(given, dict) else given
        raise ValueError(
            f"{path} must hold an adapter of the keys {sorted(_RULES)}: got {short(got)}"
        )
    for name, value in given.items():
        holds, rule = _RULES[name]
        if not holds(value):
            raise ValueError(f"{name} in {path} must be {rule}: got {short(value)}")
    try:
        return AdapterConfig(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
