"""The sizes of a model that costs follow from, read off its modules on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.adapters._config import last_read_layer
from fastalign.models import VLM, layer_stack
from fastalign.models._packed import LAYER_TYPES
from fastalign.planning._options import PlanConfig

_ANY_SIZE = 448  # pixels, of a picture whose tower takes any size, where none is asked for
# Tokens before the patches, by tower.
_DENSE = {"clip_vision_model": 1, "internvl_vision": 1, "siglip_vision_model": 0}
_QWEN = ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision")
# Families whose image tokens follow from the patches alone; of others they have to be given.
_COUNTED = ("llava", "internvl", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Stack:
    """The layers of a tower or a decoder, which are alike.

    Attributes:
        layers: How many.
        width: Of the hidden states.
        heads: Of the queries.
        queries, keys: Width of all queries, and of all keys.
        inner: Width between the matrices of the MLP.
        gated: Whether the MLP has a gate.
        rms: Whether its norms are written out in products, as RMSNorm is, and keep more.
        readers: Matrices that read the first norm, and the second.
        act: Name of its activation.
        linear: Entries of the matrices of a layer.
        rowless: Of these, the ones that keys and values need: every row, even where few are wanted.
        closing: Of the last one where no recomputation needs it: nobody keeps its product, unless a
            learned scale follows.
        parameters: Of a layer.
    """

    layers: int
    width: int
    heads: int
    queries: int
    keys: int
    inner: int
    gated: bool
    rms: bool
    readers: tuple[int, int]
    act: str
    linear: int
    rowless: int
    closing: int
    parameters: int


@dataclass(frozen=True)
class Picture:
    """What the pictures of one sample are to the tower and to the decoder.

    Attributes:
        views: Pictures that the tower sees.
        patches: Of each.
        tokens: Of each in the tower, those before its patches too.
        spans: Lengths within which a layer attends, for each layer of the tower, of one picture.
        merged: Rows of the projector for each.
        image_tokens: Of the sample, in the decoder.
    """

    views: int
    patches: int
    tokens: int
    spans: tuple[tuple[int, ...], ...]
    merged: int
    image_tokens: int


@dataclass(frozen=True)
class Sizes:
    """A model.

    Attributes:
        family: Its `model_type`.
        parameters: Of "tower", "projector", "decoder" and "head"; they add up to the model's.
        tower, decoder: Their layers.
        last_read: Highest layer of the tower that the decoder reads, from 1.
        unread: Parameters of the tower above it, which never get a gradient.
        patch, projector, head: Entries of the matrices of the patch embedding, between tower and
            decoder, and of the output embedding.
        vocabulary: Rows of the latter.
        picture: What its pictures are.
    """

    family: str
    parameters: dict[str, int]
    tower: Stack
    decoder: Stack
    last_read: int
    unread: int
    patch: int
    projector: int
    head: int
    vocabulary: int
    picture: Picture


def matrices(module: nn.Module, *kinds: type[nn.Module]) -> int:
    """Entries of the matrices of a module's layers of some kinds."""
    found = (m for m in module.modules() if isinstance(m, kinds))
    return sum(m.weight.numel() for m in found)  # type: ignore[operator, misc]


def measure(config: Any, options: PlanConfig) -> Sizes:
    """The sizes of a model. No weight is read or made.

    Args:
        config: Of the whole model.
        options: How large its pictures are.

    Raises:
        TypeError: The model is no image-text-to-text model, or its tower is not known here.
        ValueError: Its decoder has experts or recurrent layers, or image tokens must be given.
    """
    from transformers import AutoModelForImageTextToText

    build: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model: nn.Module = build.from_config(config)
    vlm = VLM(model)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if kinds or any(p.dim() > 2 for p in vlm.decoder.parameters()):
        raise ValueError(
            f"the decoder must be of attention and dense MLPs to be planned: {config.model_type} "
            f"has {', '.join(sorted(kinds)) or 'experts'}"
        )
    text, stacks = config.get_text_config(), (layer_stack(vlm.vision_tower), vlm.layers)
    inside = {id(m) for stack in stacks for m in stack.modules()}
    between = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and id(m) not in inside and m is not vlm.head
    ]
    embeds = (m for m in vlm.vision_tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    return Sizes(
        family=config.model_type,
        parameters=_parts(vlm),
        tower=_stack(stacks[0], config.vision_config),
        decoder=_stack(stacks[1], text),
        last_read=last_read_layer(config),
        unread=_unread(vlm),
        patch=sum(m.weight.numel() for m in embeds),
        projector=sum(m.weight.numel() for m in between),
        head=vlm.head.weight.numel(),
        vocabulary=vlm.head.weight.shape[0],
        picture=_picture(config, options),
    )


def _parts(vlm: VLM) -> dict[str, int]:
    """Parameters by part, each counted once: a tied head belongs to the decoder."""
    seen: set[int] = set()

    def new(parameters: Any) -> int:
        fresh = {id(p): p.numel() for p in parameters if id(p) not in seen}
        seen.update(fresh)
        return sum(fresh.values())

    merger = [p for n, m in vlm.vision_tower.named_children() if "merger" in n
              for p in m.parameters()]  # fmt: skip
    projector = new(merger)
    tower = new(vlm.vision_tower.parameters())
    decoder, head = new(vlm.decoder.parameters()), new(vlm.head.parameters())
    projector += new(vlm.model.parameters())
    return {"tower": tower, "projector": projector, "decoder": decoder, "head": head}


def _unread(vlm: VLM) -> int:
    """Parameters above the last layer that is read; of CLIP also the norm of its class token."""
    layers = list(layer_stack(vlm.vision_tower))[last_read_layer(vlm.config) :]
    modules = [*layers]
    if type(vlm.config.vision_config).model_type == "clip_vision_model":
        named = vlm.vision_tower.named_modules()
        modules += [m for n, m in named if n.split(".")[-1] == "post_layernorm"]
    return sum(p.numel() for m in modules for p in m.parameters())


def _stack(stack: nn.ModuleList, config: Any) -> Stack:
    layer = stack[0]
    counts = {matrices(each, nn.Linear) for each in stack}
    if len(counts) != 1:
        raise ValueError(f"layers of {type(layer).__name__} must be alike to be planned")
    named = {n.split(".")[-1]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    keys = [named[n] for n in ("k_proj", "v_proj") if n in named]
    width: int = getattr(config, "embed_dim", None) or config.hidden_size
    heads: int = getattr(config, "num_attention_heads", None) or config.num_heads
    last = next(m for n, m in named.items() if n in ("down_proj", "fc2"))
    return Stack(
        layers=len(stack),
        width=width,
        heads=heads,
        queries=named["q_proj"].out_features if "q_proj" in named else width,
        keys=keys[0].out_features if keys else width,
        inner=last.in_features,
        gated="gate_proj" in named,
        rms=not any(isinstance(m, nn.LayerNorm) for m in layer.modules()),
        readers=(3 if keys else 1, 2 if "gate_proj" in named else 1),
        act=getattr(config, "hidden_act", "silu"),
        linear=counts.pop(),
        rowless=sum(m.weight.numel() for m in keys),
        closing=0 if hasattr(layer, "lambda_2") else last.weight.numel(),
        parameters=sum(p.numel() for p in layer.parameters()),
    )


# -- pictures ------------------------------------------------------------------------------------


def _sides(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _picture(config: Any, options: PlanConfig) -> Picture:
    vision = config.vision_config
    kind = type(vision).model_type
    if kind in _QWEN:
        return _any_size(config, options)
    if kind not in _DENSE:
        raise TypeError(
            f"the vision tower cannot be planned: got {kind}; planned are "
            f"{', '.join((*_DENSE, *_QWEN))}"
        )
    if options.image_size is not None:
        raise ValueError(
            f"image_size must be None for {config.model_type}, whose tower has a size of its own; "
            "tiles says how many pictures it sees"
        )
    (height, width), (ph, pw) = _sides(vision.image_size), _sides(vision.patch_size)
    patches = (height // ph) * (width // pw)
    ratio = getattr(config, "downsample_ratio", 1.0)
    merged = round(patches * ratio**2)
    if getattr(config, "vision_feature_select_strategy", "default") == "full":
        merged += _DENSE[kind] if config.model_type == "llava" else 0
    tokens = patches + _DENSE[kind]
    spans = ((tokens,),) * vision.num_hidden_layers
    image_tokens = _tokens(config, options, options.tiles * merged)
    return Picture(options.tiles, patches, tokens, spans, merged, image_tokens)


def _tokens(config: Any, options: PlanConfig, derived: int) -> int:
    if options.image_tokens is not None:
        return options.image_tokens
    if config.model_type not in _COUNTED:
        raise ValueError(
            f"image_tokens must be given for {config.model_type}, whose number of them depends on "
            f"more than the patches; counted are {', '.join(_COUNTED)}"
        )
    return derived


def _any_size(config: Any, options: PlanConfig) -> Picture:
    """Qwen's towers: sides rounded to whole blocks of patches, and windows in some layers."""
    vision = config.vision_config
    patch, merge = _sides(vision.patch_size)[0], vision.spatial_merge_size
    given = options.image_size or (_ANY_SIZE, _ANY_SIZE)
    blocks = [max(1, round(side / (patch * merge))) for side in given]
    patches = blocks[0] * blocks[1] * merge**2
    whole: tuple[int, ...] = (patches,)
    spans = [whole] * vision.depth
    window = getattr(vision, "window_size", 0) // merge // patch
    if window:
        rows, cols = ([min(window, n - i) for i in range(0, n, window)] for n in blocks)
        cut = tuple(r * c * merge**2 for r in rows for c in cols)
        spans = [whole if k in vision.fullatt_block_indexes else cut for k in range(vision.depth)]
    merged = blocks[0] * blocks[1]
    image_tokens = _tokens(config, options, options.tiles * merged)
    return Picture(options.tiles, patches, patches, tuple(spans), merged, image_tokens)
