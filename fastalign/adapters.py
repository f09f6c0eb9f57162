"""Small trainable parts hooked into a frozen model: attach, detach, save, load.

The model's own modules, classes and forwards stay as they are. `attach` registers one submodule,
`model.fastalign_adapter`, and hooks; `detach` removes both.
"""

import copy
import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import VLM, first_tensor, layer_stack
from fastalign.nn import ModalityCalibration, ModalityShift

NAME = "fastalign_adapter"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FORMAT = 1
_PROBE = "probe."


@dataclass(frozen=True)
class AdapterConfig:
    """What to insert and where.

    Attributes:
        shift_layers: Encoder layers, from 1, after which a `ModalityShift` stands (DeepAlign,
            appendix A: 4 and 6). Empty for none.
        shift_hidden_dim: Channels between its two convolutions; the encoder's width when None. The
            published 200 M parameters at width 1024 are about 5440.
        kernel_size: Of the convolutions, odd.
        calibration: A `ModalityCalibration` after every layer of the decoder (MoCa, section 4).
        calibration_init_std: Spread of its start around the identity; 0 as published.
    """

    shift_layers: tuple[int, ...] = (4, 6)
    shift_hidden_dim: int | None = None
    kernel_size: int = 3
    calibration: bool = False
    calibration_init_std: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift_layers", tuple(self.shift_layers))
        if not self.shift_layers and not self.calibration:
            raise ValueError(
                "an adapter must hold something: got no shift_layers and calibration=False"
            )
        if len(set(self.shift_layers)) != len(self.shift_layers):
            raise ValueError(f"shift_layers must not repeat: got {self.shift_layers}")


class Adapter(nn.Module):
    """The trainable parts of one `AdapterConfig` and the hooks that run them.

    `enabled` False makes every hook the identity.
    """

    def __init__(self, vlm: VLM, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.enabled = True
        self.image_token_id = vlm.image_token_id
        self.patch_size: int = vlm.config.vision_config.patch_size
        width: int = vlm.config.vision_config.hidden_size
        _check_shift_layers(config.shift_layers, len(layer_stack(vlm.vision_tower)), vlm.config)
        self.shifts = nn.ModuleDict(
            {
                str(k): ModalityShift(width, config.shift_hidden_dim or width, config.kernel_size)
                for k in config.shift_layers
            }
        )
        self.calibrations = nn.ModuleDict(
            {
                str(k): ModalityCalibration(vlm.hidden_size, config.calibration_init_std)
                for k in range(1, config.calibration * vlm.num_layers + 1)
            }
        )
        # What the running pass is about; kept until the next pass for checkpointed layers.
        self._inside = False
        self._image: Tensor | None = None
        self._vision_mask: Tensor | None = None
        self._grid: tuple[int, int] | None = None
        self._handles: list[Any] = []

    def place(self, vlm: VLM) -> None:
        """Give each part the device and dtype of the layer it follows."""
        for parts, layers in (
            (self.shifts, layer_stack(vlm.vision_tower)),
            (self.calibrations, vlm.layers),
        ):
            for name, part in parts.items():
                part.to(next(layers[int(name) - 1].parameters()))

    def hook(self, vlm: VLM) -> None:
        """Install the hooks. Bound methods, so that a deep copy of the model runs its own adapter.

        Layer hooks are prepended: transformers' recorders of hidden states must see their output.
        """
        add = self._handles.append
        base: nn.Module = vlm.model.base_model
        add(base.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(base.register_forward_hook(self._leave, always_call=True))
        add(vlm.decoder.register_forward_pre_hook(self._enter_decoder))
        add(vlm.decoder.register_forward_hook(self._leave_decoder, always_call=True))
        add(vlm.vision_tower.register_forward_pre_hook(self._enter_tower, with_kwargs=True))
        encoder = layer_stack(vlm.vision_tower)
        for name in self.shifts:
            run = functools.partial(self._shift, name)
            add(encoder[int(name) - 1].register_forward_hook(run, prepend=True))
        for name in self.calibrations:
            run = functools.partial(self._calibrate, name)
            add(vlm.layers[int(name) - 1].register_forward_hook(run, prepend=True))

    def unhook(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None and self.calibrations and self.enabled:
            raise ValueError(
                "input_ids must be given to a model with a calibration adapter, which finds the "
                "image tokens by them: got inputs_embeds alone"
            )
        self._inside = True
        self._image = None if ids is None else torch.eq(ids, self.image_token_id)

    def _leave(self, *_: Any) -> None:
        self._inside = False

    def _enter_decoder(self, *_: Any) -> None:
        # Called on its own, the decoder runs on text.
        self._vision_mask = self._image if self._inside else None

    def _leave_decoder(self, *_: Any) -> None:
        self._vision_mask = self._image

    def _enter_tower(self, module: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        pixels: Tensor = args[0] if args else kw["pixel_values"]
        self._grid = pixels.shape[-2] // self.patch_size, pixels.shape[-1] // self.patch_size

    def _shift(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled:
            return None
        return _replace(output, self.shifts[name](first_tensor(output), self._grid))

    def _calibrate(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled or self._vision_mask is None:
            return None
        return _replace(output, self.calibrations[name](first_tensor(output), self._vision_mask))

    @torch.no_grad()
    def probe(self) -> dict[str, Tensor]:
        """Each part's output on a fixed pseudo-random input: what a file must restore.

        In float32 on the CPU, so that every device and precision mode gives the same.
        """
        side = 4
        outputs = {}
        for kind, parts in (("shifts", self.shifts), ("calibrations", self.calibrations)):
            for name, original in parts.items():
                part: Any = copy.deepcopy(original).to("cpu", torch.float32)
                generator = torch.Generator().manual_seed(part.dim)
                x = torch.randn(1, side * side, part.dim, generator=generator)
                everywhere = torch.ones(x.shape[:-1], dtype=torch.bool)
                outputs[f"{kind}.{name}"] = part(
                    x, (side, side) if kind == "shifts" else everywhere
                )
        return outputs


def _check_shift_layers(layers: tuple[int, ...], depth: int, config: Any) -> None:
    """The layers must exist, and lie below the one whose output the language model reads."""
    chosen = getattr(config, "vision_feature_layer", -1)
    chosen = [chosen] if isinstance(chosen, int) else list(chosen or [-1])
    last = max(k if k >= 0 else depth + 1 + k for k in chosen)
    for k in layers:
        if not 1 <= k <= last:
            raise ValueError(
                f"shift_layers must lie in 1..{last}, the encoder layers that the language model "
                f"reads (vision_feature_layer {chosen} of {depth}): got {k}"
            )


def _replace(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def adapter_of(model: nn.Module) -> Adapter:
    """The adapter attached to `model`.

    Raises:
        ValueError: There is none.
    """
    adapter = getattr(model, NAME, None)
    if not isinstance(adapter, Adapter):
        raise ValueError("model must have an adapter: got none; call fastalign.attach first")
    return adapter


def attach(model: nn.Module, config: AdapterConfig | None = None) -> Adapter:
    """Insert adapters into a model. Outputs stay bit for bit the same until they are trained.

    The new parameters take the device and dtype of the layer they follow. No parameter of the model
    is frozen here; training with `trainable="adapters"` does that.

    Args:
        model: See `VLM`.
        config: What to insert; `AdapterConfig()` when None.

    Returns:
        The adapter, also at `model.fastalign_adapter`.

    Raises:
        ValueError: The model already has an adapter, or lacks a layer named by `config`.
    """
    if getattr(model, NAME, None) is not None:
        raise ValueError("model must not have an adapter yet: call fastalign.detach first")
    vlm = VLM(model)
    return _install(vlm, Adapter(vlm, config or AdapterConfig()))


def _install(vlm: VLM, adapter: Adapter) -> Adapter:
    adapter.place(vlm)
    adapter.hook(vlm)
    adapter.train(vlm.model.training)
    vlm.model.add_module(NAME, adapter)
    return adapter


def detach(model: nn.Module) -> None:
    """Remove the adapter and its hooks: the model is again what it was before `attach`.

    Raises:
        ValueError: The model has no adapter.
    """
    adapter_of(model).unhook()
    delattr(model, NAME)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model's own outputs, for as long as the context lasts."""
    adapter = adapter_of(model)
    before, adapter.enabled = adapter.enabled, False
    try:
        yield
    finally:
        adapter.enabled = before


def _base(vlm: VLM) -> dict[str, Any]:
    """What a model must share with the one an adapter was trained on."""
    return {
        "model_type": vlm.config.model_type,
        "vision_hidden_size": vlm.config.vision_config.hidden_size,
        "vision_layers": len(layer_stack(vlm.vision_tower)),
        "hidden_size": vlm.hidden_size,
        "num_layers": vlm.num_layers,
    }


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

    Everything is checked before the model changes: the base's sizes, every key, every shape. Then
    each part must give the output it gave when it was saved.

    Args:
        model: Of the type and sizes that the adapter was saved from.
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
    config, base = _read_config(folder / CONFIG)
    vlm = VLM(model)
    if base != _base(vlm):
        raise ValueError(f"{folder} was saved from another model: {base}, and this is {_base(vlm)}")
    existing = getattr(model, NAME, None)
    if existing is not None and existing.config != config:
        raise ValueError(
            f"model has an adapter of another configuration: {existing.config} and {config} in "
            f"{folder}; call fastalign.detach first"
        )
    fresh = Adapter(vlm, config)
    try:
        _load_weights(fresh, folder)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} must be a safetensors file: {error}") from None
    if existing is not None:
        existing.load_state_dict(fresh.state_dict())
        return adapter_of(model)
    return _install(vlm, fresh)


def _load_weights(fresh: Adapter, folder: Path) -> None:
    """Every key and shape, then the values, then the probe."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        expected = fresh.state_dict()
        wanted = {*expected, *(_PROBE + k for k in fresh.probe())}
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
        fresh.load_state_dict({key: file.get_tensor(key) for key in expected})
        _check_probe(fresh, {k: file.get_tensor(_PROBE + k) for k in fresh.probe()}, folder)


def _read_config(path: Path) -> tuple[AdapterConfig, dict[str, Any]]:
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
