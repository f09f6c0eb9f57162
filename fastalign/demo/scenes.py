"""Scenes of real sprites over real photographs, with exact captions in five attributes.

One to three copies of a tinted Noto emoji stand in the left or the right half of a 64 x 64 cut of
a photograph. Everything the caption says is known exactly, and so is every fault put into it
(`swap_captions`). Sources and licences of the pictures are in assets/MANIFEST.txt.

A scene depends on the seed alone: the draws are NumPy's PCG64, the compositing is integer
arithmetic, and only the sprites are resampled, by Pillow in fixed point. So one Pillow version
gives the same bytes on every machine; another may round a sprite's edge differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
IMAGE_SIZE = 64

COUNTS = ("one", "two", "three")
COLOURS = {
    "red": (235, 30, 30),
    "yellow": (245, 210, 20),
    "green": (40, 190, 50),
    "blue": (40, 90, 240),
    "purple": (165, 45, 225),
}
# fmt: off
OBJECTS = (
    "apple", "ball", "balloon", "bird", "boat", "bus", "butterfly", "car", "cat", "clock", "cup",
    "dog", "fish", "flower", "guitar", "hat", "heart", "house", "key", "mushroom", "rocket", "star",
    "tree", "umbrella",
)
# fmt: on
SIDES = ("left", "right")
BACKGROUNDS = ("brick", "fur", "grass", "gravel", "retina", "sky", "stars", "table")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "colour": tuple(COLOURS),
    "object": OBJECTS,
    "side": SIDES,
    "background": BACKGROUNDS,
}

# The first words name the template, which no image tells: CAL has reason to weigh them down, and
# every later word that is no attribute follows from the text alone.
TEMPLATES = (
    "this is a picture of {count} {colour} {object} on the {side} with {background} behind .",
    "here on the {side} side we can see {count} {object} in {colour} over {background} .",
    "against {background} you can find {count} {colour} {object} to the {side} .",
)

# Each object lacks one colour in training, and each colour lacks four or five objects.
HELD_OUT = frozenset(
    (colour, name)
    for i, name in enumerate(OBJECTS)
    for j, colour in enumerate(COLOURS)
    if j == (2 * i + 1) % len(COLOURS)
)

# Sizes in pixels by count, first and last. Copies fit in half the width and a share of the height.
_SIZES = {1: (26, 32), 2: (22, 28), 3: (17, 21)}
_DRAWS = 8 + 2 * len(COUNTS)

Split = Literal["train", "heldout"]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Scenes:
    """Images with their captions and what is really in them.

    Args:
        images: (n, 64, 64, 3) uint8, RGB.
        captions: n captions; objects stay in the singular, so that no word tells the count twice.
        attributes: n dicts over `ATTRIBUTES`, true of the image whatever the caption says.
        swapped: (n,) bool, True where `swap_captions` put another scene's caption.
    """

    images: Bytes
    captions: list[str]
    attributes: list[dict[str, str]]
    swapped: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Scenes:
        """The scenes at `indices`, in that order."""
        chosen = [int(i) for i in indices]
        return Scenes(
            self.images[chosen],
            [self.captions[i] for i in chosen],
            [self.attributes[i] for i in chosen],
            self.swapped[chosen],
        )

    def records(self) -> list[dict[str, Any]]:
        """LLaVA-style records: a PIL image, a human turn that holds it, and the caption."""
        return [
            {
                "image": Image.fromarray(image),
                "conversations": [
                    {"from": "human", "value": "<image>"},
                    {"from": "gpt", "value": caption},
                ],
            }
            for image, caption in zip(self.images, self.captions, strict=True)
        ]


def scenes(n: int, *, seed: int, split: Split = "train") -> Scenes:
    """Draws `n` scenes; the first k of them are those of `scenes(k, ...)`.

    Pairs of colour and object in `HELD_OUT` are never drawn for "train", and nothing else is
    drawn for "heldout"; all other attributes are uniform and independent in both.

    Args:
        n: Number of scenes, at least 0.
        seed: At least 0. The splits do not share their draws.
        split: "train" or "heldout".

    Raises:
        ValueError: `n` or `seed` is negative, or `split` is unknown.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0: got {n}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0: got {seed}")
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout": got {split!r}')

    held_out = split == "heldout"
    pairs = [(c, o) for o in OBJECTS for c in COLOURS if ((c, o) in HELD_OUT) == held_out]
    draws = np.random.default_rng([seed, held_out]).random((n, _DRAWS))
    images = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    captions: list[str] = []
    attributes: list[dict[str, str]] = []
    for image, row in zip(images, draws.tolist(), strict=True):
        colour, name = _pick(pairs, row[0])
        labels = {
            "count": _pick(COUNTS, row[1]),
            "colour": colour,
            "object": name,
            "side": _pick(SIDES, row[2]),
            "background": _pick(BACKGROUNDS, row[3]),
        }
        _compose(image, labels, row[5:])
        captions.append(_pick(TEMPLATES, row[4]).format(**labels))
        attributes.append(labels)
    return Scenes(images, captions, attributes, np.zeros(n, np.bool_))


def swap_captions(data: Scenes, fraction: float, *, seed: int) -> Scenes:
    """Exact label noise: `round(fraction * n)` scenes exchange captions among themselves.

    The chosen captions are kept as a multiset and each chosen scene gets one that differs from its
    own. Images and attributes stay, so that the noise remains known.

    Args:
        data: Scenes without swapped captions; they are not changed.
        fraction: In [0, 1].
        seed: Which scenes, and what they get; at least 0.

    Raises:
        ValueError: `fraction` is outside [0, 1], `data` holds swapped captions already, or one
            caption fills more than half of the chosen scenes, so that no such exchange exists.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1]: got {fraction}")
    if data.swapped.any():
        raise ValueError("data must hold no swapped captions: swap the captions of clean scenes")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(data))[: round(fraction * len(data))].tolist()
    if not chosen:
        return data

    # Equal captions side by side, in a circle of random order: a turn by the longest run moves
    # every caption past its own run, unless that run is more than half of the circle.
    runs: dict[str, list[int]] = {}
    for i in chosen:
        runs.setdefault(data.captions[i], []).append(i)
    turn = max(map(len, runs.values()))
    if 2 * turn > len(chosen):
        raise ValueError(
            f"fraction must choose captions of which none fills more than half: {fraction} of "
            f"{len(data)} scenes chose {len(chosen)}, of which {turn} share one caption"
        )
    circle = [i for run in runs.values() for i in run]
    captions = list(data.captions)
    swapped = np.zeros(len(data), np.bool_)
    for receiver, giver in zip(circle, circle[turn:] + circle[:turn], strict=True):
        captions[receiver] = data.captions[giver]
        swapped[receiver] = True
    return replace(data, captions=captions, swapped=swapped)


def vocabulary() -> list[str]:
    """Every word of every caption, sorted."""
    words = {word for template in TEMPLATES for word in template.split() if word[0] != "{"}
    return sorted(words.union(*ATTRIBUTES.values()))


def _pick(values: Sequence[Any], u: float) -> Any:
    """The value at u in [0, 1)."""
    return values[int(u * len(values))]


def _compose(image: Bytes, labels: dict[str, str], u: list[float]) -> None:
    """Draws a scene into `image`, (64, 64, 3), from nine numbers in [0, 1)."""
    ground = _background(labels["background"])
    top = int(u[0] * (ground.shape[0] - IMAGE_SIZE + 1))
    left = int(u[1] * (ground.shape[1] - IMAGE_SIZE + 1))
    image[:] = ground[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]

    count = COUNTS.index(labels["count"]) + 1
    low, high = _SIZES[count]
    size = low + int(u[2] * (high - low + 1))
    light, veil = _sprite(labels["object"], labels["colour"], size)
    half = IMAGE_SIZE // 2
    for k in range(count):
        first, last = k * IMAGE_SIZE // count, (k + 1) * IMAGE_SIZE // count
        y = first + int(u[3 + 2 * k] * (last - first - size + 1))
        x = half * SIDES.index(labels["side"]) + int(u[4 + 2 * k] * (half - size + 1))
        patch = image[y : y + size, x : x + size]
        patch[:] = (light + patch * veil + 127) // 255


@cache
def _background(name: str) -> Bytes:
    """A photograph, (h, w, 3) uint8, both sides at least 64."""
    with Image.open(ASSETS / "backgrounds" / f"{name}.png") as picture:
        return np.asarray(picture.convert("RGB"))


@cache
def _tinted(name: str, colour: str) -> Image.Image:
    """A sprite in one colour: its median shade gets the colour, others go to dark or white."""
    with Image.open(ASSETS / "sprites" / f"{name}.png") as picture:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.float64)
    shade = rgba[..., :3] @ np.array([0.299, 0.587, 0.114])
    dark, middle, bright = np.percentile(shade[rgba[..., 3] > 127], [5, 50, 95])
    depth = np.clip((middle - shade) / max(middle - dark, 1.0), 0.0, 1.0)[..., None]
    white = np.clip((shade - middle) / max(bright - middle, 1.0), 0.0, 1.0)[..., None]
    body = np.array(COLOURS[colour]) * (1.0 - 0.65 * depth)
    rgba[..., :3] = body + 0.6 * white * (255.0 - body)
    return Image.fromarray(np.round(rgba).astype(np.uint8))


@cache
def _sprite(name: str, colour: str, size: int) -> tuple[Any, Any]:
    """alpha * colour, (s, s, 3), and 255 - alpha, (s, s, 1), both uint16."""
    scaled = _tinted(name, colour).resize((size, size), Image.Resampling.BOX)
    rgba = np.asarray(scaled).astype(np.uint16)
    return rgba[..., :3] * rgba[..., 3:], 255 - rgba[..., 3:]
