"""Makes the demo's pictures from a Debian font and a scikit-image wheel (maintainers only).

    apt-get download fonts-noto-color-emoji && dpkg -x fonts-noto-color-emoji_*.deb font
    python -m fastalign.demo.make_assets --skimage SITE_PACKAGES/skimage \
        --font font/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \
        --font-licence font/usr/share/doc/fonts-noto-color-emoji/copyright

Needs fontTools, which nothing else in the package does. The shipped files were made from
fonts-noto-color-emoji 2.042-0+deb12u1 and scikit-image 0.26.0. Backgrounds are stored at
the scale at which scenes crop them, so that composing a scene only resamples sprites.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

SPRITE_SIZE = 64

CODE_POINTS = {
    "apple": 0x1F34E,
    "ball": 0x1F3C0,
    "balloon": 0x1F388,
    "bird": 0x1F426,
    "boat": 0x26F5,
    "bus": 0x1F68C,
    "butterfly": 0x1F98B,
    "car": 0x1F697,
    "cat": 0x1F431,
    "clock": 0x23F0,
    "cup": 0x2615,
    "dog": 0x1F436,
    "fish": 0x1F41F,
    "flower": 0x1F33B,
    "guitar": 0x1F3B8,
    "hat": 0x1F3A9,
    "heart": 0x2764,
    "house": 0x1F3E0,
    "key": 0x1F511,
    "mushroom": 0x1F344,
    "rocket": 0x1F680,
    "star": 0x2B50,
    "tree": 0x1F333,
    "umbrella": 0x2602,
}


class Photograph(NamedTuple):
    """A file of skimage/data, the box cut from it (left, top, right, bottom) and its terms."""

    file: str
    box: tuple[int, int, int, int]
    short_side: int
    licence: str


PHOTOGRAPHS = {
    "brick": Photograph(
        "brick.png", (0, 0, 512, 512), 160, "CC0 1.0; CC0Textures, Bricks25, cut by scikit-image"
    ),
    "fur": Photograph("chelsea.png", (40, 0, 340, 220), 130, "CC0 1.0; Stefan van der Walt"),
    "grass": Photograph(
        "grass.png", (0, 0, 512, 512), 160, "CC0 1.0; linolafett, Grass 01, cut by scikit-image"
    ),
    "gravel": Photograph(
        "gravel.png", (0, 0, 400, 400), 160, "CC0 1.0; CC0Textures, Gravel04, cut by scikit-image"
    ),
    "retina": Photograph(
        "retina.jpg",
        (280, 280, 1130, 1130),
        160,
        "CC0 1.0; Mikael Haggstrom, Fundus photograph of normal left eye",
    ),
    "sky": Photograph(
        "rocket.jpg", (0, 0, 640, 427), 130, "public domain; SpaceX, launch of DSCOVR"
    ),
    "stars": Photograph(
        "hubble_deep_field.jpg",
        (300, 200, 750, 650),
        160,
        "public domain; NASA, Hubble eXtreme Deep Field, from HubbleSite",
    ),
    "table": Photograph("coffee.png", (0, 0, 600, 400), 130, "CC0 1.0; Rachel Michetti"),
}


def cut_sprite(font: Any, code_point: int) -> Image.Image:
    """The bitmap glyph of one character, cut to its ink, in a square: (64, 64) RGBA.

    Raises:
        KeyError: The font has no colour bitmap for the character.
    """
    glyph = font["CBDT"].strikeData[0][font.getBestCmap()[code_point]]
    with Image.open(io.BytesIO(glyph.imageData)) as bitmap:
        picture = bitmap.convert("RGBA")
    ink = picture.crop(picture.getbbox())
    side = max(ink.size)
    square = Image.new("RGBA", (side, side))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def cut_photograph(data: Path, photograph: Photograph) -> Image.Image:
    """The box of a photograph, scaled to its short side; grey files stay grey."""
    with Image.open(data / photograph.file) as picture:
        cut = picture.crop(photograph.box)
    scale = photograph.short_side / min(cut.size)
    size = (round(cut.width * scale), round(cut.height * scale))
    return cut.resize(size, Image.Resampling.LANCZOS)


def write_png(picture: Image.Image, path: Path) -> str:
    """Writes a picture without metadata and returns the SHA-256 of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(font_path: Path, font_licence: Path, skimage: Path, out: Path) -> None:
    """Writes sprites/, backgrounds/, LICENSE-OFL.txt and MANIFEST.txt under `out`."""
    from fontTools.ttLib import TTFont

    font: Any = TTFont(font_path)
    names = font["name"]
    rows = [
        "Source and licence of every picture here, made by fastalign/demo/make_assets.py.",
        f"Sprites: {names.getDebugName(1)}, {names.getDebugName(5)}, {names.getDebugName(0)},",
        "from Debian's fonts-noto-color-emoji; SIL Open Font License 1.1 (LICENSE-OFL.txt).",
        "Backgrounds: cut and scaled from photographs of scikit-image's wheel (skimage/data/),",
        "each under the terms that skimage.data states for it.",
        "",
        "file | source | licence | SHA-256",
    ]
    for name, code_point in CODE_POINTS.items():
        file = f"sprites/{name}.png"
        digest = write_png(cut_sprite(font, code_point), out / file)
        rows.append(f"{file} | U+{code_point:04X} of NotoColorEmoji.ttf | OFL 1.1 | {digest}")
    for name, photograph in PHOTOGRAPHS.items():
        file = f"backgrounds/{name}.png"
        digest = write_png(cut_photograph(skimage / "data", photograph), out / file)
        rows.append(
            f"{file} | skimage/data/{photograph.file} {photograph.box} | "
            f"{photograph.licence} | {digest}"
        )
    (out / "MANIFEST.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")

    licence = font_licence.read_text(encoding="utf-8").split("License:   SIL-1.1\n")[-1]
    lines = [line.removeprefix(" ") for line in licence.splitlines()]
    body = "\n".join("" if line == "." else line for line in lines)
    notice = f"{names.getDebugName(0)}\n{names.getDebugName(7)}\n\n"
    (out / "LICENSE-OFL.txt").write_text(notice + body.strip() + "\n", encoding="utf-8")


def main() -> None:
    """Reads the paths from the command line."""
    parser = argparse.ArgumentParser(description="make the pictures of the demo")
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf with CBDT")
    parser.add_argument("--font-licence", type=Path, required=True, help="Debian's copyright file")
    parser.add_argument("--skimage", type=Path, required=True, help="the installed skimage package")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    args = parser.parse_args()
    make(args.font, args.font_licence, args.skimage, args.out)


if __name__ == "__main__":
    main()
