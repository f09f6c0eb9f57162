"""The trainable parts of a model with an adapter, and the hooks that run them."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.adapters._config import AdapterConfig, build_parts
from fastalign.adapters._metadata import metadata
from fastalign.models import VLM, Patches, first_tensor, layer_stack
from fastalign.models._patches import find_patches
from fastalign.models._side_stream import whole_tensor
from fastalign.models._towers import Layout, tower_layout

NAME = "fastalign_adapter"
# Calls of the tower in one pass that are remembered: images and videos are one each.
_CALLS = 8


class Adapter(nn.Module):
    """The trainable parts of one `AdapterConfig` and the hooks that run them.

    `enabled` False makes every hook the identity.

    A vision tower that takes pictures of any size reads their grids from the device; the adapter
    reads them too, at the tower's entrance, and waits for nothing else there. With
    `decoder_shift_layers` a pass with images counts the image tokens, for which it waits once.
    """

    def __init__(self, vlm: VLM, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata = metadata(config, vlm)
        self.enabled = True
        self._model_config, self._image_tokens = vlm.config, vlm.image_token_ids
        parts = build_parts(config, vlm.config)
        self.shifts, self.decoder_shifts = parts["shifts"], parts["decoder_shifts"]
        self.calibrations = parts["calibrations"]
        # What the running pass is about; kept until the next pass for checkpointed layers, which
        # run again in the backward.
        self._inside = self._in_tower = self._in_decoder = False
        self._ended = True
        self._layouts: deque[Layout] = deque(maxlen=_CALLS)
        self._pictures: dict[str, Any] = {}
        self._image: Tensor | None = None
        self._patches: Patches | None = None
        self._prompt: Tensor | None = None
        # What the decoder's layers act on: the above, or nothing for an image-free forward.
        self._acting: tuple[Tensor | None, Patches | None] = None, None
        self._handles: list[Any] = []

    def place(self, vlm: VLM) -> None:
        """Give each part the device and dtype of the layer it follows."""
        for parts, layers in self._followed(vlm):
            for name, part in parts.items():
                weights = layers[int(name) - 1].parameters()
                part.to(next(p for p in weights if p.is_floating_point()))

    def _followed(self, vlm: VLM) -> Iterator[tuple[nn.ModuleDict, nn.ModuleList]]:
        yield self.shifts, layer_stack(vlm.vision_tower)
        yield self.decoder_shifts, vlm.layers
        yield self.calibrations, vlm.layers

    def hook(self, vlm: VLM) -> None:
        """Install the hooks. Bound methods, so that a deep copy of the model runs its own adapter.

        Layer hooks are prepended: transformers' recorders of hidden states must see their output.
        """
        add = self._handles.append
        base: nn.Module = vlm.model.base_model
        add(base.register_forward_pre_hook(self._enter, with_kwargs=True))
        add(base.register_forward_hook(self._leave, always_call=True))
        add(vlm.decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        add(vlm.decoder.register_forward_hook(self._leave_decoder, always_call=True))
        add(vlm.vision_tower.register_forward_pre_hook(self._enter_tower, with_kwargs=True))
        add(vlm.vision_tower.register_forward_hook(self._leave_tower, always_call=True))
        if hasattr(vlm.config, "qformer_config"):
            embedding = vlm.model.get_input_embeddings()
            add(embedding.register_forward_pre_hook(self._embed))
        for parts, layers in self._followed(vlm):
            # The calibration, registered last, runs first.
            run = self._calibrate if parts is self.calibrations else self._shift_decoder
            run = self._shift if parts is self.shifts else run
            for name in parts:
                hook = functools.partial(run, name)
                add(layers[int(name) - 1].register_forward_hook(hook, prepend=True))

    def unhook(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # The pass

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        names = inspect.signature(module.forward).parameters if args else ()
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids: Tensor | None = inputs.get("input_ids")
        if ids is None and (self.calibrations or self.decoder_shifts):
            raise ValueError(
                "input_ids must be given to a model with an adapter in its decoder, which finds "
                "the image tokens by them: got inputs_embeds alone"
            )
        self._inside, self._prompt = True, None
        self._image = None if ids is None else self._is_image(ids)
        self._patches = self._find_patches(inputs) if self.decoder_shifts else None

    def _leave(self, *_: Any) -> None:
        self._inside, self._ended = False, True

    def _is_image(self, ids: Tensor) -> Tensor:
        first, *others = self._image_tokens
        mask = ids == first
        for token in others:
            mask = mask | (ids == token)
        return mask

    def _find_patches(self, inputs: dict[str, Any]) -> Patches | None:
        """Patches among the tokens of this call; None where it brings no images."""
        if inputs.get("pixel_values") is not None:
            return find_patches(self._model_config, inputs)
        encoded = inputs.get("mm_encoder_outputs") or {}
        if encoded.get("image") is None:
            return None
        # Generation runs the tower before the model, and keeps the pictures from it.
        given = {**self._pictures, "input_ids": inputs["input_ids"]}
        if hasattr(self._model_config, "image_grid_pinpoints"):
            raise ValueError(
                f"generate cannot run decoder_shift_layers of {self._model_config.model_type}: it "
                "keeps image_sizes from the model, on which the grids depend; call the model "
                "itself, or use shift_layers"
            )
        return find_patches(self._model_config, given)

    # The decoder

    def _embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Models with a Q-Former hand a prompt's embeddings to their language model's generate."""
        if self.enabled and not (self._inside or self._in_decoder):
            self._prompt = self._is_image(args[0])

    def _enter_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._in_decoder = True
        if self._inside:
            self._acting = self._image, self._patches
            return
        # Called on its own, the decoder runs on text, unless it was given a prompt.
        prompt, self._prompt = self._prompt, None
        embeds = kwargs.get("inputs_embeds")
        if prompt is not None and embeds is not None:
            prompt = prompt.repeat_interleave(embeds.shape[0] // prompt.shape[0], 0)  # beams
        self._acting = None if embeds is None else prompt, None

    def _leave_decoder(self, *_: Any) -> None:
        self._in_decoder = False
        self._acting = self._image, self._patches

    def _calibrate(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        mask, _ = self._acting
        if not self.enabled or mask is None:
            return None
        return _replace(output, self.calibrations[name](first_tensor(output), mask))

    def _shift_decoder(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        _, patches = self._acting
        if not self.enabled or patches is None:
            return None
        hidden = first_tensor(output)
        moved = self.decoder_shifts[name](patches.of(hidden), patches.grids)
        length = hidden.shape[1]
        at = patches.places // length, patches.places % length
        # No view of the flat rows: FSDP hooks the gradient of what a layer gives back.
        return _replace(output, torch.index_put(hidden, at, moved))

    # The vision tower

    def _enter_tower(self, module: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        if not self.enabled:
            return
        if self._ended:
            self._layouts.clear()
            self._pictures, self._ended = {}, False
        self._in_tower = True
        if self.shifts:
            self._layouts.append(tower_layout(self._model_config.vision_config, args, kw))
        if self.decoder_shifts and not self._pictures:
            self._pictures = _pictures_of(args, kw)

    def _leave_tower(self, *_: Any) -> None:
        self._in_tower = False

    def _shift(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled:
            return None
        hidden = first_tensor(output)
        return _replace(output, self._layout_of(hidden).apply(self.shifts[name], hidden))

    def _layout_of(self, hidden: Tensor) -> Layout:
        """That of the tower's running call; after it, of the call whose layer runs again."""
        if self._in_tower:
            return self._layouts[-1]
        fitting = [layout for layout in self._layouts if layout.fits(hidden)]
        if len({layout.grids for layout in fitting}) != 1:
            raise RuntimeError(
                "a checkpointed layer of the vision tower runs again, and it is not known for "
                f"which pictures: {len(fitting)} calls of the latest pass had hidden states of its "
                f"{tuple(hidden.shape)}; call backward before the next pass, and images and videos "
                "of equally many patches in batches of their own"
            )
        return fitting[-1]

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """`fastalign.save_adapter` by the name that PEFT and transformers give it."""
        from fastalign.adapters._files import write_adapter

        write_adapter(self, save_directory)

    @classmethod
    def from_pretrained(cls, model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
        """`fastalign.load_adapter` by the name that PEFT and transformers give it."""
        from fastalign.adapters._files import load_adapter

        return load_adapter(model, path)

    def probe_names(self) -> list[str]:
        """What `probe` gives."""
        named = [f"calibrations.{name}" for name in self.calibrations]
        for kind, parts in (("shifts", self.shifts), ("decoder_shifts", self.decoder_shifts)):
            named += [f"{kind}.{name}{end}" for name in parts for end in ("", ".packed")]
        return named

    @torch.no_grad()
    def probe(self) -> dict[str, Tensor]:
        """Each part's output on a fixed pseudo-random input: what a file must restore.

        In float32 on the CPU, so that every device and precision mode gives the same. Shifts run on
        a dense batch and on packed pictures of several sizes.
        """
        outputs = {}
        for name in self.probe_names():
            kind, layer, *packed = name.split(".")
            part: Any = copy.deepcopy(getattr(self, kind)[layer])
            whole = {name: whole_tensor(value) for name, value in part.state_dict().items()}
            part.load_state_dict(whole, assign=True)
            part = part.to("cpu", torch.float32)
            x = torch.randn(1, 16, part.dim, generator=torch.Generator().manual_seed(part.dim))
            if packed:
                outputs[name] = part(x[0], [(2, 3), (1, 4), (3, 2)])
            elif kind == "calibrations":
                outputs[name] = part(x, torch.ones(x.shape[:-1], dtype=torch.bool))
            else:
                outputs[name] = part(x, (4, 4))
        return outputs


def _pictures_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A tower's inputs under the names of its model's, its pixels as a number that takes no room.

    Of the pixels `find_patches` reads how many pictures there are, and which are all zeros: the
    tower is not handed those.
    """
    first = kwargs.get("pixel_values")
    pixels: Tensor = args[0] if args else kwargs["hidden_states"] if first is None else first
    ones = pixels.new_ones(()).expand(pixels.shape)
    pictures: dict[str, Any] = {"pixel_values": ones}
    if "patch_attention_mask" in kwargs:  # Idefics3's model has them by samples
        pictures["pixel_values"] = ones[None]
    names = {"grid_thw": "image_grid_thw"}
    for name in ("grid_thw", "image_sizes", "spatial_shapes"):
        if kwargs.get(name) is not None:
            pictures[names.get(name, name)] = kwargs[name]
    return pictures


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
        TypeError: `shift_layers` are given and the order of the tower's patches is not known.
        ValueError: The model already has an adapter, lacks a layer named by `config`, or cannot
            have a part of it: images that are no tokens cannot be calibrated, a Q-Former's queries
            have no grid.
    """
    if getattr(model, NAME, None) is not None:
        raise ValueError("model must not have an adapter yet: call fastalign.detach first")
    vlm = VLM(model)
    return install(vlm, Adapter(vlm, config or AdapterConfig()))


def install(vlm: VLM, adapter: Adapter) -> Adapter:
    """Place an adapter in its model and hook it."""
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
