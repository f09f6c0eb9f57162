"""What of fastalign works with a model, and what its adapters would cost: from its config.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastalign.adapters import AdapterConfig, adapter_parameters
from fastalign.adapters._config import (
    check_decoder_shift_layers,
    check_image_tokens,
    check_token_grids,
    config_of,
    last_read_layer,
    upper_half,
)
from fastalign.adapters._metadata import read_config
from fastalign.commands.console import table
from fastalign.models import VLM, layer_stack
from fastalign.models._towers import describe_tower

# Bytes a trained parameter takes: itself, its gradient, and the two moments of AdamW, in float32.
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8


def examine_model(path: Path, adapter: Path | None = None) -> dict[str, Any]:
    """What `fastalign doctor --model PATH` reports, as data. No weight is read or made.

    Args:
        path: Folder of a model.
        adapter: Folder of an adapter, whose size is told too.

    Raises:
        FileNotFoundError: A folder lacks its configuration.
        ValueError: The model is no image-text-to-text model, or the adapter is of another model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json: got {path}")
    load: Any = AutoConfig.from_pretrained
    config = load(path, local_files_only=True)
    build: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = build.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = getattr(config, "dtype", None) or torch.float32
    report: dict[str, Any] = {
        "path": str(path),
        "family": config.model_type,
        "class": type(model).__name__,
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": parameters * dtype.itemsize,
    }
    try:
        vlm = VLM(model)
    except TypeError as error:
        return {**report, "parts": [_row("view", str(error))], "adapters": []}
    report["tower"] = _tower(vlm)
    report["decoder"] = {"width": vlm.hidden_size, "layers": vlm.num_layers}
    return {**report, "parts": _parts(vlm), "adapters": _adapters(vlm, adapter)}


def _tower(vlm: VLM) -> dict[str, Any]:
    about = {"class": type(vlm.vision_tower).__name__, "layers": len(layer_stack(vlm.vision_tower))}
    try:
        width: int | None = describe_tower(vlm.config.vision_config).width
        more = {"last_read": last_read_layer(vlm.config), "upper_half": upper_half(vlm)}
    except TypeError:
        width, more = getattr(vlm.config.vision_config, "hidden_size", None), {}
    return {**about, "width": width, **more}


def _row(part: str, problem: str | None, note: str = "") -> dict[str, Any]:
    return {"part": part, "works": problem is None, "why": note if problem is None else problem}


def _problem(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _parts(vlm: VLM) -> list[dict[str, Any]]:
    """Each part of fastalign: whether it works with this model, and why not."""
    config = vlm.config
    packed = _problem(lambda: vlm._branch.check(packed=True))
    contrast = packed and _problem(lambda: vlm._branch.check(packed=False))
    queries = hasattr(config, "qformer_config")
    return [
        _row("view", None),
        _row("contrast", contrast, "with packed=False" if packed else ""),
        _row("shift", _problem(lambda: last_read_layer(config))),
        _row("decoder shift", _problem(lambda: check_decoder_shift_layers((1,), config))),
        _row("calibration", _problem(lambda: check_image_tokens("calibration", config))),
        _row(
            "distillation",
            None if queries else _problem(lambda: check_token_grids("distillation", config)),
            "by where the queries of the Q-Former look" if queries else "",
        ),
    ]


def _adapters(vlm: VLM, saved: Path | None) -> list[dict[str, Any]]:
    """Parameters of the published adapter, of the default one and of the one on disk."""
    chosen: list[tuple[str, Callable[[], AdapterConfig]]] = [
        ("paper", lambda: AdapterConfig.paper(vlm)),
        ("default", AdapterConfig),
        ("calibration alone", lambda: AdapterConfig(shift_layers=(), calibration=True)),
    ]
    rows = []
    for name, make in chosen:
        try:
            rows.append(_cost(name, make(), vlm))
        except (TypeError, ValueError) as error:
            rows.append({"adapter": name, "why": str(error)})
    if saved is not None:
        adapter, base = read_config(saved)
        if base.get("model_type") != vlm.config.model_type:
            raise ValueError(
                f"{saved} was saved from {base.get('model_type')}, and this is "
                f"{vlm.config.model_type}"
            )
        rows.append(_cost(str(saved), adapter, vlm))
    return rows


def _cost(name: str, adapter: AdapterConfig, vlm: VLM) -> dict[str, Any]:
    counts = dict(adapter_parameters(adapter, config_of(vlm)))
    total = counts.pop("total")
    return {
        "adapter": name,
        "hidden_dim": adapter.shift_hidden_dim,
        "parameters": total,
        "by_part": counts,
        "weight_bytes": _WEIGHT * total,
        "gradient_bytes": _GRADIENT * total,
        "adamw_bytes": _MOMENTS * total,
    }


def show_model(report: dict[str, Any]) -> None:
    """Print what `examine_model` found."""
    about = [
        ("family", f"{report['family']} ({report['class']})"),
        ("parameters", f"{report['parameters']:,}"),
        ("weights", f"{_size(report['bytes'])} in {report['dtype']}"),
    ]
    if "tower" in report:
        tower, decoder = report["tower"], report["decoder"]
        width = "" if tower["width"] is None else f", {tower['width']} wide"
        read = f", read up to {tower['last_read']}" if "last_read" in tower else ""
        half = f", upper half from {tower['upper_half']}" if "upper_half" in tower else ""
        layers = f"{tower['layers']} layers{width}{read}{half}"
        about.append(("vision tower", f"{tower['class']}: {layers}"))
        about.append(("decoder", f"{decoder['layers']} layers, {decoder['width']} wide"))
    table("Model", ("", report["path"]), about)
    parts = [(p["part"], "yes" if p["works"] else "no", p["why"]) for p in report["parts"]]
    table("What works with it", ("part", "works", "why"), parts)
    rows = []
    for row in report["adapters"]:
        if "why" in row:
            rows.append((row["adapter"], "-", "-", "-", row["why"]))
            continue
        hidden = row["hidden_dim"]
        sizes = [_size(row[key]) for key in ("weight_bytes", "gradient_bytes", "adamw_bytes")]
        shown = "" if hidden is None else f"{hidden} channels"
        rows.append((row["adapter"], f"{row['parameters']:,}", sizes[0], " + ".join(sizes), shown))
    table("Adapters", ("adapter", "parameters", "float32", "+ gradients + AdamW", ""), rows)


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
