"""Corrupted images to contrast with: random patch masking and Gaussian blur.

The two other contrasting conditions of CAL's ablation (NeurIPS 2024, appendix, tables 8 and 9),
beside leaving the image out. Plain functions of pixels, and `corrupt`, which finds them in a batch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_dim, check_floating, check_integer, check_one_of

CORRUPTIONS = ("patch-mask", "blur")
Seed = torch.Generator | int | None


def patch_mask(
    pixels: Tensor,
    ratio: float = 0.7,
    *,
    grid: tuple[int, int] = (20, 10),
    generator: Seed = None,
    fill: float = 0.0,
) -> Tensor:
    """Each image with some cells of a grid, chosen at random, filled (CAL, appendix).

    The paper cuts an image into 20 pieces in height by 10 in width and masks 50, 70 or 90 % of the
    200. Here an image is what has a height and a width: of LLaVA-NeXT each tile by itself. Cell i
    of n along a side of s pixels is [floor(i s / n), floor((i + 1) s / n)).

    Args:
        pixels: (..., C, H, W), any floating dtype; all channels of an image share their cells.
        ratio: Fraction of the cells to fill, in [0, 1]: exactly `round(ratio * cells)` an image.
        grid: (rows, columns), at most (H, W).
        generator: Where the choice comes from: a torch.Generator; an int, its seed, which gives the
            same cells on every device; or None, the global one of the device of `pixels`. No device
            is waited for, even if the generator is on the CPU and `pixels` are not.
        fill: Value of the cells. In pixels that a processor has normalised 0 is the mean colour.

    Returns:
        The shape, dtype and device of `pixels`; another tensor.

    Raises:
        TypeError: `pixels` is not floating point.
        ValueError: `pixels` is no image, or an option is out of range.
    """
    _check_images(pixels)
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1]: got {ratio}")
    *images, _, height, width = pixels.shape
    rows, columns = grid
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(
            f"grid must be (rows, columns), from 1 to the ({height}, {width}) pixels of an image: "
            f"got {grid}; small images need a coarser grid"
        )
    cells = rows * columns
    source = _generator(generator)
    device = pixels.device if source is None else source.device
    # A random order of the cells; those numbered below the count are as many.
    order = torch.rand(math.prod(images), cells, generator=source, device=device).argsort(1)
    chosen = (order < round(ratio * cells)).to(pixels.device, non_blocking=True)
    y, x = (
        ((torch.arange(side, device=pixels.device) + 1) * n - 1) // side
        for side, n in ((height, rows), (width, columns))
    )
    hidden = chosen.view(-1, rows, columns)[:, y[:, None], x]
    return pixels.masked_fill(hidden.view(*images, 1, height, width), fill)


def gaussian_blur(pixels: Tensor, sigma: float) -> Tensor:
    r"""Images convolved with a Gaussian, $\propto \exp(-k^2 / 2 \sigma^2)$ along each side.

    CAL's ablation (appendix) takes sigma 1, which blurs what OCR needs, and 10, which blurs all.
    The kernel ends at $|k| = \lceil 3 \sigma \rceil$ and has the sum 1. Beyond a border the image
    is reflected about its last pixel, or, along a side that is not longer than the kernel's radius,
    the last pixel is repeated. A row is multiplied by the dense matrix of the whole rule.

    Args:
        pixels: (..., C, H, W), any floating dtype.
        sigma: Standard deviation in pixels, above 0.

    Returns:
        The shape, dtype and device of `pixels`, computed in float32 or wider. Differentiable.

    Raises:
        TypeError: `pixels` is not floating point.
        ValueError: `pixels` is no image, or `sigma` is not a positive number.
    """
    _check_images(pixels)
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a number of pixels above 0: got {sigma}")
    x = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    height, width = (_blur_matrix(side, sigma, x) for side in x.shape[-2:])
    with no_autocast(x):
        blurred: Tensor = height @ x @ width.mT
    return blurred.to(pixels.dtype)


def unflatten_qwen(
    pixel_values: Tensor, image_grid_thw: Tensor, *, merge_size: int = 2
) -> list[Tensor]:
    """Images from the flat patches of Qwen2-VL's image processor; the inverse of `flatten_qwen`.

    A row is one patch, (C, T, p, p) with C = 3. Patches stand in the order of time, then of blocks
    of `merge_size` x `merge_size` patches, which the model merges to one token, then inside them.
    The width tells p and T, which is 1 or 2: no 3 p^2 is twice another.

    The order shows in no shape. It is that of Qwen2-VL to Qwen3-VL, GLM-4V and ERNIE-4.5-VL; with
    `merge_size=1` that of VideoLLaMA3, and of processors that go row by row (Kimi-K2.5, Hunyuan).
    Those that put colours last (Cosmos3-Edge, Inkling2) would be mixed up.

    Args:
        pixel_values: (sum t h w, 3 T p p).
        image_grid_thw: Patches in time, height and width of each image, (images, 3) int32 or int64;
            read by the host, as the model does: on a GPU that waits for it.
        merge_size: `spatial_merge_size` of the model's vision configuration.

    Returns:
        For each image (t T, 3, h p, w p): a still image has t = 1, and T times the same frame.

    Raises:
        TypeError: `image_grid_thw` is not integer.
        ValueError: The sizes do not fit together.
    """
    check_dim("pixel_values", pixel_values, 2)
    check_integer(image_grid_thw=image_grid_thw)
    if image_grid_thw.dim() != 2 or image_grid_thw.shape[1] != 3:
        raise ValueError(
            f"image_grid_thw must be (images, 3): got shape {tuple(image_grid_thw.shape)}"
        )
    side, frames = _patch_layout(pixel_values.shape[1])
    grids: list[list[int]] = image_grid_thw.tolist()
    total = sum(math.prod(sizes) for sizes in grids)
    if total != len(pixel_values):
        raise ValueError(
            f"pixel_values must have the {total} patches of image_grid_thw: got {len(pixel_values)}"
        )
    m = merge_size
    if m < 1 or any(h % m or w % m for _, h, w in grids):
        raise ValueError(
            f"merge_size must divide the heights and widths of image_grid_thw: got {m} for "
            f"{grids}; the model's vision_config.spatial_merge_size is the right one"
        )
    images = []
    parts = torch.split(pixel_values, [math.prod(sizes) for sizes in grids])
    for (t, h, w), part in zip(grids, parts, strict=True):
        patches = part.reshape(t, h // m, w // m, m, m, 3, frames, side, side)
        image = patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
        images.append(image.reshape(t * frames, 3, h * side, w * side))
    return images


def flatten_qwen(
    images: Sequence[Tensor],
    *,
    patch_size: int,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
) -> Tensor:
    """The flat patches of Qwen2-VL's image processor; see `unflatten_qwen`.

    Args:
        images: At least one, (t T, 3, H, W) each, of one dtype and device.
        patch_size: p; p times `merge_size` divides H and W.
        temporal_patch_size: T.
        merge_size: Patches along a side that become one token.

    Returns:
        (sum t H W / p^2, 3 T p p) in the dtype of `images`.

    Raises:
        ValueError: There is no image, or sizes do not fit.
    """
    if not images:
        raise ValueError("images must hold at least one image: got none")
    p, m, rows = patch_size, merge_size, []
    for i, image in enumerate(images):
        check_dim(f"images[{i}]", image, 4)
        frames, channels, height, width = image.shape
        if channels != 3 or frames % temporal_patch_size or height % (p * m) or width % (p * m):
            raise ValueError(
                f"images[{i}] must be (frames, 3, H, W) with frames divisible by "
                f"temporal_patch_size = {temporal_patch_size}, and H and W by patch_size * "
                f"merge_size = {p * m}: got {tuple(image.shape)}"
            )
        t, h, w = frames // temporal_patch_size, height // (p * m), width // (p * m)
        parts = image.reshape(t, temporal_patch_size, 3, h, m, p, w, m, p)
        patches = parts.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        rows.append(patches.reshape(t * h * w * m * m, 3 * temporal_patch_size * p * p))
    return torch.cat(rows)


def corrupt(
    batch: Mapping[str, Any],
    mode: str,
    *,
    ratio: float = 0.7,
    sigma: float = 10.0,
    grid: tuple[int, int] = (20, 10),
    generator: Seed = None,
    fill: float = 0.0,
    merge_size: int = 2,
) -> Tensor:
    """The `pixel_values` of a batch with its images masked or blurred (CAL, appendix).

    Args:
        batch: What a processor makes: `pixel_values` of (b, C, H, W), (b, tiles, C, H, W) or (b,
            images, tiles, C, H, W); or flat patches, (n, 3 T p p), with `image_grid_thw`, as of
            Qwen2-VL. Tiles, and images padded to one size, are corrupted as they are.
        mode: "patch-mask", see `patch_mask`; or "blur", see `gaussian_blur`.
        ratio, grid, generator, fill: Of "patch-mask".
        sigma: Of "blur".
        merge_size: Of flat patches, whose order it must fit: see `unflatten_qwen`. Frames of one
            image share their cells.

    Returns:
        A tensor like `batch["pixel_values"]`.

    Raises:
        TypeError: The pixels are not floating point.
        ValueError: An option is wrong, or `pixel_values` are absent or in another format.
    """
    check_one_of("mode", mode, CORRUPTIONS)
    pixels = batch.get("pixel_values")
    if mode == "blur":
        change = partial(gaussian_blur, sigma=sigma)
    else:
        source = _generator(generator)  # once, so that a seed gives each image its own cells
        change = partial(patch_mask, ratio=ratio, grid=grid, generator=source, fill=fill)
    grids = sorted(key for key in batch if "grid" in key)
    if isinstance(pixels, Tensor):
        if pixels.dim() == 2 and "image_grid_thw" in grids:
            return _corrupt_patches(pixels, batch["image_grid_thw"], change, merge_size)
        # With a grid (n, C, p, p) are patches too, and n is no number of images.
        if pixels.dim() in (4, 5, 6) and pixels.shape[-3] in (1, 3) and not grids:
            return change(pixels)
    found = f"shape {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
    raise ValueError(
        "pixel_values must be (b, ..., C, H, W) with 4 to 6 dimensions and 1 or 3 channels, or "
        f"flat patches (n, 3 T p p) with image_grid_thw: got {found} in a batch of "
        f'{sorted(batch)}; other formats have the contrast modes "drop" and "mask"'
    )


def _corrupt_patches(
    pixels: Tensor, image_grid_thw: Tensor, change: Callable[[Tensor], Tensor], merge_size: int
) -> Tensor:
    images = unflatten_qwen(pixels, image_grid_thw, merge_size=merge_size)
    if not images:
        return pixels.clone()
    side, frames = _patch_layout(pixels.shape[1])
    # All frames as channels of one image: they share the cells of its mask.
    changed = [change(image.flatten(0, 1)).view_as(image) for image in images]
    return flatten_qwen(changed, patch_size=side, temporal_patch_size=frames, merge_size=merge_size)


def _patch_layout(width: int) -> tuple[int, int]:
    """Pixels along a side of a flat patch, and its frames, from the width 3 T p p."""
    for frames in (1, 2):
        side = math.isqrt(width // (3 * frames))
        if side and 3 * frames * side * side == width:
            return side, frames
    raise ValueError(
        "pixel_values must have a width of 3 T p p: colours, T = 1 or 2 frames, and a square patch "
        f"of p x p pixels: got {width}"
    )


def _blur_matrix(side: int, sigma: float, like: Tensor) -> Tensor:
    """(side, side): row i holds the weights of pixel i, those beyond a border where it is taken."""
    radius = math.ceil(3 * sigma)
    pixel = torch.arange(side, device=like.device)
    beyond = torch.arange(-radius, side + radius, device=like.device)
    k = (beyond - pixel[:, None]).to(like.dtype)
    weights = torch.exp(-0.5 * (k / sigma).square()).masked_fill(k.abs() > radius, 0.0)
    weights = weights / weights.sum(1, keepdim=True)
    before, matrix, after = torch.split(weights, [radius, side, radius], 1)
    matrix = matrix.clone()
    if side > radius:  # pixel -k is pixel k
        matrix[:, 1 : radius + 1] += before.flip(1)
        matrix[:, side - 1 - radius : side - 1] += after.flip(1)
    else:
        matrix[:, 0] += before.sum(1)
        matrix[:, -1] += after.sum(1)
    return matrix


def _generator(generator: Seed) -> torch.Generator | None:
    if isinstance(generator, int):
        return torch.Generator().manual_seed(generator)
    return generator


def _check_images(pixels: Tensor) -> None:
    check_floating(pixels=pixels)
    if pixels.dim() < 3 or 0 in pixels.shape[-2:]:
        raise ValueError(
            f"pixels must be (..., C, H, W) with H and W of at least 1: got {tuple(pixels.shape)}"
        )
