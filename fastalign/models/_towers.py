"""Where the patches are in the hidden states of a vision tower's layers.

What stands here is what each tower of transformers does with the pictures that it is called with:
what comes before the patches, in which order they lie, and which of them are padding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastalign.models._patches import Grid, pair

Call = Mapping[str, Any]


class GridModule(Protocol):
    """What runs on patches: `fastalign.nn.ModalityShift`, or anything called as it is."""

    def __call__(
        self, x: Tensor, grid: Grid | Sequence[Grid], mask: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """The patches among the hidden states of a tower's layers, for one call of the tower.

    Attributes:
        shape: Of the hidden states, without their width.
        grids: Rows and columns of each picture.
        dense: Whether the hidden states are (b, n, d), all pictures on one grid, patches row by row
            after what is no patch (CLS).
        order: Of the others: row of the flattened hidden states at which each patch lies, picture
            by picture and row by row, (sum n,); None where they lie in this order.
        mask: Of dense ones: true where a patch is no padding, (b, n); None for all.
    """

    shape: tuple[int, ...]
    grids: tuple[Grid, ...]
    dense: bool
    order: Tensor | None = None
    mask: Tensor | None = None

    def fits(self, hidden: Tensor) -> bool:
        """Whether hidden states have the shape of this call's."""
        return tuple(hidden.shape[:-1]) == self.shape

    def apply(self, module: GridModule, hidden: Tensor) -> Tensor:
        """Run `module` on the patches of a layer's output; every other token passes unchanged.

        Raises:
            ValueError: `hidden` has another shape than the tower's inputs led to expect.
        """
        if not self.fits(hidden):
            raise ValueError(
                f"hidden states of the vision tower must be {(*self.shape, 'd')} for pictures of "
                f"{list(dict.fromkeys(self.grids))} patches: got {tuple(hidden.shape)}"
            )
        if self.dense:
            return module(hidden, self.grids[0], self.mask) if self.grids else hidden
        flat = hidden.flatten(0, -2)
        if self.order is None:
            flat = module(flat, self.grids)
        else:
            moved = module(flat.index_select(0, self.order), self.grids)
            flat = flat.index_copy(0, self.order, moved)
        return flat if hidden.dim() == 2 else flat.view_as(hidden)


class Tower(NamedTuple):
    """What a vision tower's configuration says.

    Attributes:
        width: Of the hidden states between its layers.
        depth: Number of its layers.
    """

    width: int
    depth: int


def describe_tower(config: Any) -> Tower:
    """Width and depth of a vision tower.

    Args:
        config: The tower's own configuration (`model.config.vision_config`).

    Raises:
        TypeError: The order of its patches is not known; names the towers that are.
    """
    rule = _rule(config)
    return Tower(getattr(config, rule.width), getattr(config, rule.depth))


def tower_layout(config: Any, args: tuple[Any, ...], kwargs: Call) -> Layout:
    """Where the patches are, given what a tower is called with.

    Of towers for pictures of any size the grids are read from the device, in one copy. They read
    the same grids themselves right after, so that this call waits for what they would wait for.

    Args:
        config: The tower's own configuration.
        args, kwargs: Of the call.

    Raises:
        TypeError: As `describe_tower`.
    """
    rule = _rule(config)
    call = {**dict(zip(rule.inputs, args, strict=False)), **kwargs}
    return rule.layout(config, call)


# Pictures of one size


def _dense(config: Any, call: Call, leading: int) -> Layout:
    pixels: Tensor = call["pixel_values"]
    ph, pw = pair(config.patch_size)
    images, height, width = pixels.shape[0], pixels.shape[-2] // ph, pixels.shape[-1] // pw
    shape = images, leading + height * width
    return Layout(shape, ((height, width),) * images, dense=True)


def _masked(config: Any, call: Call) -> Layout:
    """Idefics3's tiles: a picture fills a part of its tile, the upper left one."""
    layout = _dense(config, call, leading=0)
    mask: Tensor | None = call.get("patch_attention_mask")
    if mask is None:
        return layout
    return Layout(layout.shape, layout.grids, dense=True, mask=mask.flatten(1).bool())


# Pictures of any size, one after the other


def _pixtral(config: Any, call: Call) -> Layout:
    pixels: Tensor = call["pixel_values"]
    sizes: Any = call.get("image_sizes")
    patch, (most_rows, most_cols) = config.patch_size, pixels.shape[-2:]
    if sizes is None:
        sizes = [(most_rows, most_cols)] * len(pixels)
    elif isinstance(sizes, Tensor):
        sizes = sizes.tolist()
    grids = tuple((min(h, most_rows) // patch, min(w, most_cols) // patch) for h, w in sizes)
    return Layout((1, sum(h * w for h, w in grids)), grids, dense=False)


def _qwen(config: Any, call: Call, windows: bool = False) -> Layout:
    """Frames are pictures; patches lie in blocks that the merger makes one token of."""
    thw: Tensor = call["grid_thw"]
    merge: int = config.spatial_merge_size
    window = config.window_size // merge // config.patch_size if windows else 0
    grids = tuple((h, w) for t, h, w in thw.tolist() for _ in range(t))
    orders = {grid: block_order(grid, merge, window, thw.device) for grid in dict.fromkeys(grids)}
    rows, start = [], 0
    for grid in grids:
        rows.append(orders[grid] + start)
        start += grid[0] * grid[1]
    return Layout((start,), grids, dense=False, order=torch.cat(rows))


def block_order(
    grid: Grid, merge: int, window: int = 0, device: torch.device | None = None
) -> Tensor:
    """Place of each patch of a picture, row by row, where Qwen's towers put it, (h * w,) int64.

    Args:
        grid: Rows and columns of patches, multiples of `merge`.
        merge: Side of the blocks of patches that become one token; block after block.
        window: Side of the windows of blocks of Qwen2.5-VL, window after window; 0 for none.
        device: Of the result.
    """
    height, width = grid[0] // merge, grid[1] // merge
    blocks = torch.arange(height * width, device=device).view(height, width)
    if window:
        row = torch.arange(height, device=device)[:, None]
        col = torch.arange(width, device=device)
        across = -(-width // window)
        number = row // window * across + col // window
        key = (number * window + row % window) * window + col % window
        blocks = key.flatten().argsort().argsort().view(height, width)
    inside = torch.arange(merge * merge, device=device).view(merge, 1, merge)
    return (blocks[:, None, :, None] * merge**2 + inside).flatten()


def _siglip2(config: Any, call: Call) -> Layout:
    """Each picture's patches in a row of the batch, padding at its end."""
    pixels: Tensor = call["pixel_values"]
    grids = tuple((h, w) for h, w in call["spatial_shapes"].tolist())
    images, length = pixels.shape[:2]
    places = torch.arange(images * length, device=pixels.device).view(images, length)
    order = [row[: h * w] for row, (h, w) in zip(places, grids, strict=True)]
    return Layout((images, length), grids, dense=False, order=torch.cat(order))


class _Rule(NamedTuple):
    """How a tower lays its patches out.

    Attributes:
        layout: Of a configuration and a call.
        inputs: Names of the call's positional arguments.
        width, depth: Names of these in the configuration.
    """

    layout: Callable[[Any, Call], Layout]
    inputs: tuple[str, ...] = ("pixel_values",)
    width: str = "hidden_size"
    depth: str = "num_hidden_layers"


_QWEN = _Rule(_qwen, ("hidden_states", "grid_thw"), depth="depth")
_WITH_CLASS = _Rule(partial(_dense, leading=1))
_TOWERS: dict[str, _Rule] = {
    "clip_vision_model": _WITH_CLASS,
    "internvl_vision": _WITH_CLASS,
    "blip_2_vision_model": _WITH_CLASS,
    "instructblip_vision_model": _WITH_CLASS,
    "siglip_vision_model": _Rule(partial(_dense, leading=0)),
    "siglip2_vision_model": _Rule(_siglip2, ("pixel_values", "attention_mask", "spatial_shapes")),
    "idefics3_vision": _Rule(_masked, ("pixel_values", "patch_attention_mask")),
    "smolvlm_vision": _Rule(_masked, ("pixel_values", "patch_attention_mask")),
    "pixtral": _Rule(_pixtral, ("pixel_values", "image_sizes")),
    "qwen2_vl_vision": _QWEN._replace(width="embed_dim"),
    "qwen2_5_vl_vision": _QWEN._replace(layout=partial(_qwen, windows=True)),
    "qwen3_vl_vision": _QWEN,
    "qwen3_vl_moe_vision": _QWEN,
    "qwen3_5_vision": _QWEN,
    "qwen3_5_moe_vision": _QWEN,
}


_REFUSED = {
    "mllama_vision_model": "the tiles of an image, their CLS and padding share one row of its "
    "hidden states"
}


def _rule(config: Any) -> _Rule:
    kind = type(config).model_type  # a checkpoint's own file may name its whole model here
    if kind not in _TOWERS:
        why = _REFUSED.get(kind, "where patches stand in its hidden states is unknown")
        raise TypeError(
            f"the vision tower cannot be {kind} ({type(config).__name__}): {why}; supported are "
            f"{', '.join(sorted(_TOWERS))}"
        )
    return _TOWERS[kind]
