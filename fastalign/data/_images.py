"""Images from files, bytes and Pillow: upright, in RGB, whole, or an error that says why not."""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastalign.data._errors import SampleError

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = Path | str | bytes | Image.Image

MAX_PIXELS = 89_478_485  # Pillow's own threshold of a decompression bomb: 256 MiB of RGB
MAX_ASPECT = 200  # Qwen's processors refuse more; CLIP's would enlarge the short side first
CHANNELS = (1, 3)  # processors take a first axis of these sizes for that of the channels
_JPEG_SCALES = (2, 4, 8)


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`source`, upright (EXIF) and in RGB.

    What is transparent is laid on white, 16 bits a channel become 8 by division, CMYK is converted
    without its ICC profile, and of an animation the first frame is taken. A file that ends early is
    an error even where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set, which would fill it with grey.

    Args:
        source: A path, the bytes of a file, or a PIL image.
        max_pixels: A JPEG with more is decoded at a half, a quarter or an eighth of its size; any
            other image with more is an error, raised before it is decoded. Pillow itself refuses
            twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        FileNotFoundError: There is no such file.
        SampleError: It is no image that Pillow can read to its end, or it is too large. A
            `ValueError`; `reason` tells which.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "fastalign[hf]"') from error

    if isinstance(source, Image.Image):
        _fit(source, max_pixels, "a PIL image")
        return _rgb(source)
    if isinstance(source, bytes):
        name, file = f"{len(source)} bytes", cast("Path | io.BytesIO", io.BytesIO(source))
    else:
        name, file = str(source), Path(source)
        if not file.is_file():
            raise FileNotFoundError(f"image must be a readable file: {name} is not a file")
    try:
        with _strict, _opened(file) as image:
            _fit(image, max_pixels, name)
            return _rgb(image)
    except SampleError as error:
        raise SampleError(f"{error}: {name}", error.reason) from None
    except Image.DecompressionBombError as error:
        raise SampleError(
            f"image must have at most {max_pixels} pixels: {name}: {error}", "image_size"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise SampleError(f"image must be readable: {name}: {error}", "unreadable_image") from error


class _Strict:
    """Pillow's error for files that end early, while any thread decodes; then as it was set.

    Another library may have told Pillow to fill them with grey, for the whole process.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.lenient = threading.Lock(), 0, False

    def __enter__(self) -> None:
        from PIL import ImageFile

        with self.lock:
            if not self.inside:
                self.lenient, ImageFile.LOAD_TRUNCATED_IMAGES = (
                    ImageFile.LOAD_TRUNCATED_IMAGES,
                    False,
                )
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        from PIL import ImageFile

        with self.lock:
            self.inside -= 1
            if not self.inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.lenient


def _new_lock() -> None:
    """A worker must not wait for a thread that was not forked with it."""
    _strict.lock = threading.Lock()


_strict = _Strict()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_new_lock)


def _opened(file: Path | io.BytesIO) -> Image.Image:
    """The image, its header read; `_fit` is what speaks of its size."""
    from PIL import Image

    with _strict.lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file)


def _fit(image: Image.Image, max_pixels: int, name: str) -> None:
    """Have a JPEG that is too large decoded smaller; any other raises."""
    width, height = image.size
    if width * height <= max_pixels:
        return
    if image.format == "JPEG" and not getattr(image, "_im", None):
        for scale in _JPEG_SCALES:
            if -(-width // scale) * -(-height // scale) <= max_pixels:
                image.draft(None, (width // scale, height // scale))
                break
    if image.width * image.height > max_pixels:
        raise SampleError(
            f"image must have at most {max_pixels} pixels: got {width} x {height}; make it smaller "
            "or raise max_pixels",
            "image_size",
        )


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode == "F":
        raise SampleError(
            "image must have integer channels: got floating point, whose range is unknown",
            "unreadable_image",
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits a pixel to 8, rounded; `convert` would clip instead."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise SampleError(
            f"image must have at most 16 bits a channel: got values from {values.min()} to "
            f"{values.max()}",
            "unreadable_image",
        )
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def for_processor(image: Image.Image, *, guesses_channels: bool = True) -> Image.Image:
    """`image` as a processor can take it.

    Args:
        image: In RGB.
        guesses_channels: Double an image of 1 or 3 rows, each pixel repeated: the processor finds
            the axis of the channels by its size, as the image processors of transformers do.

    Raises:
        SampleError: One side is more than `MAX_ASPECT` times the other.
    """
    width, height = image.size
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise SampleError(
            f"image must not be more than {MAX_ASPECT} times as long as wide: got {width} x "
            f"{height}, which a processor would enlarge beyond memory",
            "image_size",
        )
    if not guesses_channels or height not in CHANNELS:
        return image
    return image.resize((2 * width, 2 * height), 0)  # 0: nearest
