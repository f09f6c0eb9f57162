"""Images as they come: turned, in other modes, cut off, tiny, huge, and no images at all."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from _processors import PROCESSORS
from PIL import Image, ImageFile
from transformers import CLIPImageProcessorPil

from fastalign.data import Collator, Record, SampleError, open_image, plain_template
from fastalign.data._images import for_processor

RED, WHITE = (255, 0, 0), (255, 255, 255)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def reason(source, **options):
    with pytest.raises(SampleError) as error:
        open_image(source, **options)
    return error.value.reason, str(error.value)


def half_and_half():
    """A red left half and a blue right half."""
    image = Image.new("RGB", (16, 16), "blue")
    image.paste(RED, (0, 0, 8, 16))
    return image


# What turns each orientation back upright, from the standard's definition of its row and column 0:
# where the corner that is red (left half red) lies in the upright picture.
@pytest.mark.parametrize(
    ("orientation", "red", "blue"),
    [
        (1, (2, 8), (13, 8)),
        (2, (13, 8), (2, 8)),
        (3, (13, 8), (2, 8)),
        (4, (2, 8), (13, 8)),
        (5, (8, 2), (8, 13)),
        (6, (8, 2), (8, 13)),
        (7, (8, 13), (8, 2)),
        (8, (8, 13), (8, 2)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, orientation, red, blue):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = open_image(saved(tmp_path / "a.png", half_and_half(), exif=exif))
    assert upright.getpixel(red) == RED and upright.getpixel(blue) == (0, 0, 255)


def test_cmyk_jpeg(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    image = open_image(path)
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - RED).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "HSV", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = open_image(Image.new("RGB", (3, 2), "white").convert(mode))
    assert image.mode == "RGB" and image.size == (3, 2)
    assert np.abs(np.asarray(image).astype(int) - 255).max() <= 1


def test_transparency_is_laid_on_white(tmp_path):
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 51))  # a fifth of black over white: 255 * 0.8 = 204
    image = open_image(saved(tmp_path / "a.png", rgba))
    assert [image.getpixel((i, 0)) for i in range(3)] == [RED, (204, 204, 204), WHITE]
    grey = Image.new("LA", (2, 2), (0, 0))
    assert open_image(saved(tmp_path / "b.png", grey)).getpixel((0, 0)) == WHITE


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    for name in ("a.png", "a.gif"):
        opened = open_image(saved(tmp_path / name, image, transparency=0))
        assert [opened.getpixel((i, 0)) for i in range(2)] == [WHITE, RED]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)  # 257 * (0, 1, 128, 255)
    for name in ("a.png", "a.tiff"):
        opened = open_image(saved(tmp_path / name, Image.fromarray(values)))
        assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]
    wide = Image.fromarray(np.array([[70000]], dtype=np.int32))
    assert "at most 16 bits" in reason(saved(tmp_path / "b.tiff", wide))[1]
    floats = Image.fromarray(np.array([[0.5]], dtype=np.float32))
    assert "integer channels" in reason(saved(tmp_path / "c.tiff", floats))[1]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_a_file_that_ends_early_is_never_half_grey(tmp_path, monkeypatch, suffix, lenient):
    """Also where another library told Pillow to fill what is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"whole.{suffix}", Image.fromarray(noise)).read_bytes()
    for part in (0.3, 0.6, 0.9):
        path = tmp_path / f"cut.{suffix}"
        path.write_bytes(whole[: int(part * len(whole))])
        kind, message = reason(path)
        assert kind == "unreadable_image" and str(path) in message
        assert reason(path.read_bytes())[0] == "unreadable_image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient
    assert open_image(whole).size == (64, 64)


def test_what_is_no_image(tmp_path):
    for name, content in (("zero.png", b""), ("text.jpg", b"no image"), ("a.gif", b"GIF89a")):
        (tmp_path / name).write_bytes(content)
        kind, message = reason(tmp_path / name)
        assert kind == "unreadable_image" and name in message
    with pytest.raises(FileNotFoundError, match="gone.png is not a file"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        open_image(tmp_path)


def test_an_animation_shows_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
        assert open_image(path).getpixel((4, 4)) == RED


def png_header(width, height):
    """A PNG of that size with no pixel data to speak of, 60 bytes long."""

    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def test_thirty_thousand_pixels_wide(tmp_path):
    wide = Image.new("L", (30_000, 200), 255)
    assert open_image(saved(tmp_path / "a.png", wide)).size == (30_000, 200)
    jpeg = saved(tmp_path / "a.jpg", wide)
    assert open_image(jpeg).size == (30_000, 200)
    # 6 M pixels at a half are 1.5 M, at a quarter 375,000, at an eighth 93,750.
    assert open_image(jpeg, max_pixels=1_500_000).size == (15_000, 100)
    assert open_image(jpeg, max_pixels=400_000).size == (7_500, 50)
    assert open_image(jpeg.read_bytes(), max_pixels=93_750).size == (3_750, 25)
    for path in (jpeg, tmp_path / "a.png"):
        kind, message = reason(path, max_pixels=90_000)
        assert kind == "image_size" and "at most 90000 pixels: got 30000 x 200" in message
    assert reason(wide, max_pixels=90_000)[0] == "image_size"


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    assert "got 30000 x 5000" in reason(png_header(30_000, 5_000))[1]
    kind, message = reason(png_header(30_000, 30_000))  # Pillow's own limit
    assert kind == "image_size" and "at most 89478485 pixels" in message


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (30, 1), (1, 30), (30, 3)])
def test_tiny_images_reach_the_model_as_they_look(size):
    """Rows of an image must not be taken for its channels."""
    processor = CLIPImageProcessorPil(
        size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8}
    )
    seen = [
        processor(for_processor(open_image(Image.new("RGB", s, "red"))), return_tensors="pt")
        for s in (size, (64, 64))
    ]
    assert torch.equal(seen[0]["pixel_values"], seen[1]["pixel_values"])


@pytest.mark.parametrize("size", [(1, 1), (30_000, 200)], ids=["1 x 1", "30000 x 200"])
@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "mllama"])
def test_every_processor_takes_the_smallest_and_the_widest(name, size):
    processor = PROCESSORS[name]()
    if processor.chat_template is None:
        processor.chat_template = plain_template(processor)
    batch = Collator(processor)([Record.from_caption(Image.new("RGB", size, "red"), "w9")])
    assert batch["pixel_values"].isfinite().all() and batch["pixel_values"].numel()
    assert set(batch["labels"].unique().tolist()) >= {-100, 9}


def test_threads_decode_strictly_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / "a.png", Image.fromarray(noise)).read_bytes()

    def decode(i):
        return reason(whole[: len(whole) // 2])[0] if i % 2 else open_image(whole).size

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(decode, range(64))) == [(64, 64), "unreadable_image"] * 32
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_an_image_that_is_all_length_is_refused():
    assert for_processor(Image.new("RGB", (200, 1))).size == (400, 2)
    with pytest.raises(SampleError, match="200 times as long as wide: got 30000 x 100") as error:
        for_processor(Image.new("RGB", (30_000, 100)))
    assert error.value.reason == "image_size"


def test_a_pil_image_and_bytes_are_sources_too():
    buffer = io.BytesIO()
    half_and_half().save(buffer, "png")
    assert open_image(buffer.getvalue()).tobytes() == open_image(half_and_half()).tobytes()
