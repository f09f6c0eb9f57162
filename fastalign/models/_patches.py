"""Which image tokens are patches, on what grid, and the pixels that each grid shows.

What stands here is what each family does between its vision tower and its language model.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Grid = tuple[int, int]
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Patches:
    """The image tokens of a batch that are patches, picture by picture ("view" by view).

    A view is a picture whose tokens make one grid: an image, a tile of it, or, of LLaVA-NeXT, the
    whole picture and its tiles put together.

    Attributes:
        places: Places in the flattened batch (b * L), (n,) int64, each view's row by row.
        grids: Rows and columns of each view.
    """

    places: Tensor
    grids: tuple[Grid, ...]

    @property
    def lengths(self) -> list[int]:
        """Patches of each view."""
        return [height * width for height, width in self.grids]

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each view begins among the patches, and their number: (views + 1,) int32."""
        ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.places.device)

    def of(self, hidden: Tensor) -> Tensor:
        """The patches' rows of a layer's output, (b, L, d) -> (n, d)."""
        return hidden.flatten(0, 1).index_select(0, self.places)


class _Picture(NamedTuple):
    """One image among the tokens: its grids, and tokens that are no patches after some of them."""

    grids: tuple[Grid, ...]
    newlines: tuple[int, ...]  # for each grid: tokens after every row of it
    tail: int = 0  # tokens after the last grid


def find_patches(config: Any, batch: Inputs) -> Patches:
    """Places and grids of the patches among a batch's image tokens.

    Args:
        config: The model's configuration.
        batch: Its inputs, `input_ids` (b, L) among them.

    Raises:
        ValueError: There are no images, they are no tokens of the language model, their tokens are
            no grid (a Q-Former's), or there are more or fewer of them than the images need.
    """
    return _placed(config, batch, list(_rule(config).pictures(config, batch)))


def _placed(config: Any, batch: Inputs, pictures: list[_Picture]) -> Patches:
    """The places of the pictures' patches among the image tokens."""
    ids: Tensor = batch["input_ids"]
    kept, total = _kept(pictures)
    tokens = ids.flatten().eq(config.image_token_id)
    if not torch.compiler.is_compiling():
        found = int(tokens.sum())
        if found != total:
            raise ValueError(
                f"input_ids must hold {total} image tokens for the {len(pictures)} images of "
                f"{config.model_type}: got {found}"
            )
    places = torch.nonzero_static(tokens, size=total)[:, 0]
    if kept is not None:
        places = places[torch.tensor(kept, device=places.device)]
    return Patches(places, tuple(grid for picture in pictures for grid in picture.grids))


def find_queries(config: Any, batch: Inputs) -> Patches:
    """The image tokens of a Q-Former model, one row of `num_query_tokens` an image.

    Raises:
        ValueError: There are no images, or the model has no Q-Former.
    """
    if config.model_type not in _QFORMERS:
        raise ValueError(f"queries are those of a Q-Former: {config.model_type} has none")
    pictures = _dense((1, config.num_query_tokens), len(_pixels_of(batch)))
    return _placed(config, batch, list(pictures))


def count_views(config: Any, batch: Inputs) -> int:
    """Pictures of a batch: grids of patches, or images where they are no patches."""
    if config.model_type in _NO_TOKENS:
        return int((batch["aspect_ratio_ids"] > 0).sum())
    if config.model_type in _QFORMERS:
        return len(_pixels_of(batch))
    return sum(len(picture.grids) for picture in _rule(config).pictures(config, batch))


def find_views(config: Any, batch: Inputs) -> list[Tensor]:
    """The pixels of each view of `find_patches`, (3, H, W), as the model is given them.

    Raises:
        ValueError: There are no images, or they are no tokens of the language model.
    """
    if config.model_type in _QFORMERS:
        return list(_pixels_of(batch))
    return list(_rule(config).views(config, batch))


def _kept(pictures: Sequence[_Picture]) -> tuple[list[int] | None, int]:
    """Which of the image tokens are patches (None for all), and how many tokens there are."""
    kept: list[int] = []
    start = 0
    for picture in pictures:
        for (height, width), extra in zip(picture.grids, picture.newlines, strict=True):
            for _ in range(height):
                kept += range(start, start + width)
                start += width + extra
        start += picture.tail
    return (None if len(kept) == start else kept), start


class _Rule(NamedTuple):
    """How a family lays its images out."""

    pictures: Callable[[Any, Inputs], Iterator[_Picture]]
    views: Callable[[Any, Inputs], Iterator[Tensor]]


def _rule(config: Any) -> _Rule:
    kind: str = config.model_type
    if kind in _QFORMERS:
        raise ValueError(
            f"image tokens must be patches: those of {kind} are a Q-Former's queries, without a "
            "grid; see VLM.queries"
        )
    if kind in _NO_TOKENS:
        raise ValueError(
            f"images must be tokens of the language model: {kind} reads them by cross-attention"
        )
    if kind == "llava" and config.vision_config.model_type == "pixtral":
        return _RULES["mistral3"]
    if kind in _RULES:
        return _RULES[kind]
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "image_size") and hasattr(vision, "patch_size"):
        return _RULES["llava"]  # a token a patch, or `find_patches` will say otherwise
    raise ValueError(
        f"the grid of image tokens is known for {', '.join(sorted(_RULES))}, and for models with "
        f"one token for each patch of a square image: got {kind}"
    )


def _pixels_of(batch: Inputs) -> Tensor:
    pixels = batch.get("pixel_values")
    if pixels is None:
        raise ValueError("batch has no pixel_values: patches need images")
    found: Tensor = pixels
    return found


def pair(value: Any) -> Grid:
    """Height and width of what a configuration gives as one number or as two."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def tower_grid(config: Any) -> Grid:
    """Patches of the vision tower, rows and columns."""
    vision = config.vision_config
    (height, width), (ph, pw) = pair(vision.image_size), pair(vision.patch_size)
    return height // ph, width // pw


# One grid an image: as many tokens as patches, or fewer by a fixed factor


def _dense(grid: Grid, images: int) -> Iterator[_Picture]:
    return iter([_Picture((grid,), (0,))] * images)


def _pixels(config: Any, batch: Inputs) -> Iterator[Tensor]:
    return iter(_pixels_of(batch))


def _square(config: Any, batch: Inputs) -> Iterator[_Picture]:
    return _dense(tower_grid(config), len(_pixels_of(batch)))


def _pooled(config: Any, batch: Inputs) -> Iterator[_Picture]:
    side = int(config.mm_tokens_per_image**0.5)
    return _dense((side, side), len(_pixels_of(batch)))


def _shuffled(config: Any, batch: Inputs) -> Iterator[_Picture]:
    height, width = tower_grid(config)
    ratio = config.downsample_ratio
    return _dense((int(height * ratio), int(width * ratio)), len(_pixels_of(batch)))


# Idefics3: samples are filled up with images of zeros, which the model leaves out


def _real_tiles(config: Any, batch: Inputs) -> Iterator[Tensor]:
    tiles = _pixels_of(batch).flatten(0, 1)
    return iter(tiles[(tiles != 0).flatten(1).any(1)])


def _idefics(config: Any, batch: Inputs) -> Iterator[_Picture]:
    height, width = tower_grid(config)
    scale = config.scale_factor
    return _dense((height // scale, width // scale), len(list(_real_tiles(config, batch))))


# LLaVA-NeXT: the whole picture, then its tiles as one grid without its padding, a token a row


class _AnyRes(NamedTuple):
    """Tiles of one image: rows and columns of tiles, and the cells that hold no padding."""

    tiles: Grid
    rows: tuple[int, int]
    cols: tuple[int, int]


def _anyres(config: Any, size: Sequence[int]) -> _AnyRes:
    """How an image of (height, width) pixels is tiled, by the model's own functions."""
    own: Any = importlib.import_module("transformers.models.llava_next.modeling_llava_next")
    side, per_side = pair(config.vision_config.image_size)[0], tower_grid(config)[0]
    tiles = own.get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, side)
    rows, cols = tiles[0] * per_side, tiles[1] * per_side
    cells = torch.arange(rows * cols).view(1, rows, cols)
    left = own.unpad_image(cells, tuple(size))[0]
    (top, first), (bottom, last) = (divmod(int(left[i, i]), cols) for i in (0, -1))
    return _AnyRes(tiles, (top, bottom + 1), (first, last + 1))


def _tilings(config: Any, batch: Inputs) -> list[_AnyRes | None]:
    """For each image its tiles, or None for the whole picture alone (OneVision's several)."""
    sizes = batch["image_sizes"].tolist()
    counts = batch.get("batch_num_images")
    alone = [True] * len(sizes)
    if counts is not None:
        alone = [n == 1 for n in counts.tolist() for _ in range(n)]
    return [
        _anyres(config, size) if single else None for size, single in zip(sizes, alone, strict=True)
    ]


def _most_cells(config: Any) -> int | None:
    """OneVision's bound of a picture's tiles; it shrinks what is larger."""
    ratio = getattr(config, "vision_aspect_ratio", None)
    return None if ratio is None else int(ratio.removeprefix("anyres_max_"))


def _next(config: Any, batch: Inputs) -> Iterator[_Picture]:
    base = tower_grid(config)
    most = _most_cells(config)
    for tiling in _tilings(config, batch):
        if tiling is None:
            yield _Picture((base,), (0,), tail=1)
            continue
        height, width = tiling.rows[1] - tiling.rows[0], tiling.cols[1] - tiling.cols[0]
        if most is not None:
            ratio = (height * width / (most * base[0] ** 2)) ** 0.5
            if ratio > 1.1:
                height, width = int(height // ratio), int(width // ratio)
        yield _Picture((base, (height, width)), (0, 1))


def _next_views(config: Any, batch: Inputs) -> Iterator[Tensor]:
    pixels, patch = _pixels_of(batch), pair(config.vision_config.patch_size)[0]
    start = 0
    for i, tiling in enumerate(_tilings(config, batch)):
        count = 1 if tiling is None else 1 + tiling.tiles[0] * tiling.tiles[1]
        tiles = pixels[i, :count] if pixels.dim() == 5 else pixels[start : start + count]
        start += count
        yield tiles[0]
        if tiling is not None:
            whole = tiles[1:].reshape(*tiling.tiles, *tiles.shape[1:]).permute(2, 0, 3, 1, 4)
            whole = whole.flatten(3, 4).flatten(1, 2)
            rows, cols = (slice(a * patch, b * patch) for a, b in (tiling.rows, tiling.cols))
            yield whole[:, rows, cols]


# Qwen: images of any size as rows of flat patches, 2 x 2 of them a token


def _thw(config: Any, batch: Inputs) -> list[list[int]]:
    _pixels_of(batch)
    grids: list[list[int]] = batch["image_grid_thw"].tolist()
    return grids


def _qwen(config: Any, batch: Inputs) -> Iterator[_Picture]:
    merge = config.vision_config.spatial_merge_size
    for frames, height, width in _thw(config, batch):
        yield _Picture(((height // merge, width // merge),) * frames, (0,) * frames)


def _qwen_views(config: Any, batch: Inputs) -> Iterator[Tensor]:
    vision = config.vision_config
    merge, patch, times = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    pixels, start = _pixels_of(batch), 0
    for frames, height, width in _thw(config, batch):
        for _ in range(frames):
            rows = pixels[start : start + height * width]
            start += height * width
            cells = (height // merge, width // merge, merge, merge)
            blocks = rows.view(*cells, -1, times, patch, patch)
            # A still image is repeated over the frames of a patch.
            still = blocks[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            yield still.reshape(-1, height * patch, width * patch)


# Pixtral: images of any size, padded to the largest


def _ragged(config: Any, batch: Inputs) -> Iterator[_Picture]:
    _pixels_of(batch)
    cell = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    for height, width in batch["image_sizes"].tolist():
        yield _Picture(((height // cell, width // cell),), (0,))


def _ragged_views(config: Any, batch: Inputs) -> Iterator[Tensor]:
    sizes = batch["image_sizes"].tolist()
    for picture, (height, width) in zip(_pixels_of(batch), sizes, strict=True):
        yield picture[:, :height, :width]


# LFM2-VL: images of any size as rows of flat patches, each filled up to the longest


def _flat(config: Any, batch: Inputs) -> Iterator[_Picture]:
    _pixels_of(batch)
    factor = config.downsample_factor
    for height, width in batch["spatial_shapes"].tolist():
        yield _Picture(((height // factor, width // factor),), (0,))


def _flat_views(config: Any, batch: Inputs) -> Iterator[Tensor]:
    patch = config.vision_config.patch_size
    shapes = batch["spatial_shapes"].tolist()
    for rows, (height, width) in zip(_pixels_of(batch), shapes, strict=True):
        cells = rows[: height * width].view(height, width, patch, patch, -1)
        yield cells.permute(4, 0, 2, 1, 3).reshape(-1, height * patch, width * patch)


_RULES = {
    "llava": _Rule(_square, _pixels),
    "paligemma": _Rule(_square, _pixels),
    "gemma3": _Rule(_pooled, _pixels),
    "internvl": _Rule(_shuffled, _pixels),
    "idefics3": _Rule(_idefics, _real_tiles),
    "smolvlm": _Rule(_idefics, _real_tiles),
    "llava_next": _Rule(_next, _next_views),
    "llava_onevision": _Rule(_next, _next_views),
    "qwen2_vl": _Rule(_qwen, _qwen_views),
    "qwen2_5_vl": _Rule(_qwen, _qwen_views),
    "qwen3_vl": _Rule(_qwen, _qwen_views),
    "qwen3_vl_moe": _Rule(_qwen, _qwen_views),
    "qwen3_5": _Rule(_qwen, _qwen_views),
    "qwen3_5_moe": _Rule(_qwen, _qwen_views),
    "lfm2_vl": _Rule(_flat, _flat_views),
    "mistral3": _Rule(_ragged, _ragged_views),
}
_QFORMERS = ("blip-2", "instructblip", "instructblipvideo")
_NO_TOKENS = ("mllama",)
