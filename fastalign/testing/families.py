"""Tiny random models of every vision-language family, and mixed batches for them.

Each batch has what the family's processor would add: image tokens between their wrapper tokens,
grids, tiles, token types, cross-attention masks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.testing import _families_models as models
from fastalign.testing._families_models import END, IMAGE, PATCH, QUERIES, SIDE, START, VOCABULARY

FIRST_TEXT, LAST_TEXT = 5, 490  # the ids above and below are special
FAKE, TILE, GLOBAL = 504, 505, 506  # idefics3; FAKE also ends a row of mistral3


@dataclass(frozen=True)
class Layout:
    """The text of a batch, from which a family makes its other inputs.

    Attributes:
        ids: Input ids, (b, L).
        labels: (b, L), -100 where none.
        images: Which of the family's image sizes each image of each sample has.
        randn: Normal values of a shape, in the dtype of the batch.
        image: The image token of the family.
    """

    ids: Tensor
    labels: Tensor
    images: list[list[int]]
    randn: Callable[..., Tensor]
    image: int

    @property
    def sizes(self) -> list[int]:
        """The sizes of all images, in order."""
        return [size for row in self.images for size in row]

    @property
    def is_image(self) -> Tensor:
        return torch.eq(self.ids, self.image)

    def pixels(self) -> Tensor:
        """One square image each, (images, 3, 56, 56)."""
        return self.randn(len(self.sizes), 3, SIDE, SIDE)


Inputs = dict[str, Any]


def _pixels(layout: Layout) -> Inputs:
    return {"pixel_values": layout.pixels()}


def _high(layout: Layout) -> Inputs:
    return {"pixel_values": layout.randn(len(layout.sizes), 3, 2 * SIDE, 2 * SIDE)}


def _anyres(layout: Layout) -> Inputs:
    # Tiles of the largest grid, 2 x 2, and the whole image; the model skips those it does not need.
    sizes = [((100, 80), (50, 100))[size] for size in layout.sizes]
    pixels = layout.randn(len(sizes), 5, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _tiles(layout: Layout) -> Inputs:
    return {"pixel_values": layout.randn(sum(1 + k for k in layout.sizes), 3, SIDE, SIDE)}


def _qwen(layout: Layout) -> Inputs:
    grids = [((1, 4, 6), (1, 2, 4))[size] for size in layout.sizes]
    patches = sum(t * h * w for t, h, w in grids)
    return {
        "pixel_values": layout.randn(patches, 3 * 2 * PATCH * PATCH),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": layout.is_image.long(),
    }


def _idefics(layout: Layout) -> Inputs:
    b, most = len(layout.images), 2 * max(map(len, layout.images))
    pixels = torch.zeros_like(layout.randn(b, most, 3, SIDE, SIDE))  # zero: not an image
    mask = torch.zeros(b, most, SIDE, SIDE, dtype=torch.bool)
    for i, row in enumerate(layout.images):
        pixels[i, : 2 * len(row)] = layout.randn(2 * len(row), 3, SIDE, SIDE)
        mask[i, : 2 * len(row)] = True
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _mistral(layout: Layout) -> Inputs:
    sizes = [((SIDE, SIDE), (SIDE // 2, SIDE))[size] for size in layout.sizes]
    return {"pixel_values": layout.pixels(), "image_sizes": torch.tensor(sizes)}


def _gemma(layout: Layout) -> Inputs:
    return {"pixel_values": layout.pixels(), "token_type_ids": layout.is_image.long()}


def _paligemma(layout: Layout) -> Inputs:
    # The suffix begins at the first label: before it, attention goes both ways.
    suffix = (layout.labels != -100).cumsum(1) > 0
    return {"pixel_values": layout.pixels(), "token_type_ids": suffix.long()}


def _mllama(layout: Layout) -> Inputs:
    (b, length), most = layout.ids.shape, max(map(len, layout.images))
    ids = torch.zeros(b, most, dtype=torch.long)
    tiles = torch.zeros(b, most, 2, dtype=torch.long)
    tiles[:, :, 0] = 1  # as the processor does, also where there is no image
    cross = torch.zeros(b, length, most, 2, dtype=torch.long)
    for i, row in enumerate(layout.images):
        starts = layout.is_image[i].nonzero()[:, 0].tolist()
        for k, size in enumerate(row):
            ids[i, k], tiles[i, k, : 1 + size] = 1 + size, 1
            # A token sees the last image before it.
            end = starts[k + 1] if k + 1 < len(starts) else length
            cross[i, starts[k] : end, k, : 1 + size] = 1
    side = 2 * PATCH
    return {
        "pixel_values": layout.randn(b, most, 2, 3, side, side),
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": cross,
    }


def _instructblip(layout: Layout) -> Inputs:
    ids = layout.ids[:, QUERIES : QUERIES + 3]  # the instruction
    return {
        "pixel_values": layout.pixels(),
        "qformer_input_ids": ids,
        "qformer_attention_mask": (ids != 0).long(),
    }


def _lfm(layout: Layout) -> Inputs:
    n, patches = len(layout.sizes), (SIDE // PATCH) ** 2
    return {
        "pixel_values": layout.randn(n, patches, 3 * PATCH * PATCH),
        "spatial_shapes": torch.tensor([[SIDE // PATCH] * 2] * n),
        "pixel_attention_mask": torch.ones(n, patches, dtype=torch.long),
    }


@dataclass(frozen=True)
class _Family:
    """How to build a model and what one image of a batch is.

    Attributes:
        model: Makes the model.
        images: Tokens of an image, for each size it may have.
        inputs: The other inputs of a batch with images.
        front: Every sample has one image, at its front.
        image: The image token.
    """

    model: Callable[[], Any]
    images: tuple[list[int], ...]
    inputs: Callable[[Layout], Inputs]
    front: bool = False
    image: int = IMAGE


_ANYRES = ([IMAGE] * 72, [IMAGE] * 52)  # whole image, tiles without their padding, row ends
_QWEN = ([START] + [IMAGE] * 6 + [END], [START] + [IMAGE] * 2 + [END])
_IDEFICS = [FAKE, TILE] + [IMAGE] * 4 + [FAKE, GLOBAL] + [IMAGE] * 4 + [FAKE]
_PIXTRAL = ([IMAGE, IMAGE, FAKE, IMAGE, IMAGE, END], [IMAGE, IMAGE, END])

_FAMILIES = {
    "llava": _Family(models.llava, ([IMAGE] * 16,), _pixels),
    "llava_next": _Family(models.llava_next, _ANYRES, _anyres),
    "llava_onevision": _Family(models.llava_onevision, _ANYRES, _anyres),
    "internvl": _Family(
        models.internvl, ([START] + [IMAGE] * 4 + [END], [START] + [IMAGE] * 8 + [END]), _tiles
    ),
    "two_towers": _Family(models.two_towers, ([IMAGE] * 16,), _high),
    "qwen2_vl": _Family(models.qwen2_vl, _QWEN, _qwen),
    "qwen2_5_vl": _Family(models.qwen2_5_vl, _QWEN, _qwen),
    "qwen3_vl": _Family(models.qwen3_vl, _QWEN, _qwen),
    "idefics3": _Family(models.idefics3, (_IDEFICS,), _idefics),
    "smolvlm": _Family(models.smolvlm, (_IDEFICS,), _idefics),
    "mistral3": _Family(models.mistral3, _PIXTRAL, _mistral),
    "gemma3": _Family(models.gemma3, ([START] + [IMAGE] * 4 + [END],), _gemma),
    "paligemma": _Family(models.paligemma, ([IMAGE] * 16,), _paligemma, front=True),
    "paligemma2": _Family(models.paligemma2, ([IMAGE] * 16,), _paligemma, front=True),
    "mllama": _Family(models.mllama, ([VOCABULARY], [VOCABULARY]), _mllama, image=VOCABULARY),
    "instructblip": _Family(models.instructblip, ([IMAGE] * QUERIES,), _instructblip, front=True),
    "instructblip_opt": _Family(
        models.instructblip_opt, ([IMAGE] * QUERIES,), _instructblip, front=True
    ),
    "blip2": _Family(models.blip2, ([IMAGE] * QUERIES,), _pixels, front=True),
}
_OTHERS = {
    "qwen3_5": _Family(models.qwen3_5, _QWEN, _qwen),
    "lfm2_vl": _Family(models.lfm2_vl, ([IMAGE] * 4,), _lfm),
    "blip2_t5": _Family(models.blip2_t5, ([IMAGE] * QUERIES,), _pixels, front=True),
    "instructblip_t5": _Family(
        models.instructblip_t5, ([IMAGE] * QUERIES,), _instructblip, front=True
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
RECURRENT: tuple[str, ...] = ("qwen3_5", "lfm2_vl")
ENCODER_DECODER: tuple[str, ...] = ("blip2_t5", "instructblip_t5")


def family(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    head_scale: float = 3.0,
) -> nn.Module:
    """A model of 4 decoder layers of width 64 with random weights, in evaluation mode.

    Args:
        name: One of `FAMILIES`, `RECURRENT` (state passes from token to token) and
            `ENCODER_DECODER` (T5 below a Q-Former).
        seed: Of the weights.
        dtype: Of the weights.
        head_scale: Factor on the output embedding. At 3, contrasts lie between about -10 and 10:
            on both sides of both clamps of CAL, so that weights differ from token to token.

    Raises:
        ValueError: There is no such family.
    """
    entry = _entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = entry.model()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # large enough that an image changes the text's states
                    parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
                elif parameter.numel() == 1:  # a gate, closed at the start of training
                    parameter.fill_(0.7)
            model.get_output_embeddings().weight.mul_(head_scale)  # type: ignore[operator]
    return model.to(dtype).eval()


def samples_for(name: str) -> list[str]:
    """Samples of every kind that the family can mix, of different lengths.

    Text and image, an image right before a label, two images with labels before and between them,
    text alone, and padding on all but the longest.
    """
    if _entry(name).front:
        return ["itttyyyyyyyy", "iyyyyy", "ityyyyttyyyytty", "ittyt"]
    return [
        *("ttittyyyyyyyy", "tiyyyyttityyyyy", "tyytiyyyityyyy"),
        *("tttyyyyy", "ityyyyi", "iyyyy"),
    ]


def family_batch(
    name: str,
    model: nn.Module,
    samples: list[str],
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Inputs:
    """A right-padded batch, one letter a piece of each sample.

    "t": a text token without label; "y": a labelled one; "i": an image with its wrapper tokens,
    which have no labels. Images take turns between the sizes of the family.

    Args:
        name: The family, see `family`.
        model: The model that the batch is for.
        samples: One string each.
        seed: Of the text and the pixels.
        dtype: Of the pixels; that of `model` unless given.

    Returns:
        input_ids, attention_mask and labels, (b, L), and the family's other inputs, which are
        absent when no sample has an image.

    Raises:
        ValueError: There is no such family, or it takes exactly one image at the front of every
            sample and `samples` differ from that.
    """
    entry = _entry(name)
    for sample in samples:
        if entry.front and (sample[:1] != "i" or sample.count("i") != 1):
            raise ValueError(
                f"samples of {name} must each begin with their only image: got {sample!r}"
            )
    generator = torch.Generator().manual_seed(seed)
    wanted = next(model.parameters()).dtype if dtype is None else dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(wanted)

    rows: list[list[int]] = []
    labels: list[list[int]] = []
    images: list[list[int]] = []
    for sample in samples:
        row: list[int] = []
        label: list[int] = []
        sizes: list[int] = []
        for piece in sample:
            if piece == "i":
                sizes.append((sum(map(len, images)) + len(sizes)) % len(entry.images))
                row += entry.images[sizes[-1]]
                label += [-100] * len(entry.images[sizes[-1]])
                continue
            token = int(torch.randint(FIRST_TEXT, LAST_TEXT, (1,), generator=generator))
            row.append(token)
            label.append(token if piece == "y" else -100)
        rows.append(row)
        labels.append(label)
        images.append(sizes)
    length = max(map(len, rows))
    batch: Inputs = {
        "input_ids": _padded(rows, length, 0),
        "attention_mask": _padded([[1] * len(row) for row in rows], length, 0),
        "labels": _padded(labels, length, -100),
    }
    if any(images):
        layout = Layout(batch["input_ids"], batch["labels"], images, randn, entry.image)
        batch |= entry.inputs(layout)
    return batch


def _entry(name: str) -> _Family:
    entries = _FAMILIES | _OTHERS
    if name not in entries:
        raise ValueError(f"name must be one of {sorted(entries)}: got {name!r}")
    return entries[name]


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
