"""Corrupted images: exact numbers of cells, the blur of scipy, and the patches of Qwen2-VL."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from fastalign.models._corrupt import (
    corrupt,
    flatten_qwen,
    gaussian_blur,
    patch_mask,
    unflatten_qwen,
)

# -- patch masking ---------------------------------------------------------------------------------


def cells(masked: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which cells of ones (H, W) are 0; a cell that is so in part fails."""
    height, width = masked.shape
    found = torch.zeros(grid, dtype=torch.bool)
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * height // grid[0], (i + 1) * height // grid[0])
            columns = slice(j * width // grid[1], (j + 1) * width // grid[1])
            cell = masked[rows, columns]
            assert cell.numel() and cell.unique().numel() == 1
            found[i, j] = cell[0, 0] == 0
    return found


@pytest.mark.parametrize(("ratio", "count"), [(0.5, 100), (0.7, 140), (0.9, 180), (0, 0), (1, 200)])
@pytest.mark.parametrize("shape", [(2, 3, 336, 336), (2, 5, 3, 45, 31), (3, 20, 10)], ids=str)
def test_exactly_this_many_of_the_200_cells(ratio, count, shape):
    # 20 in height and 10 in width, in each image and tile, and in all its channels.
    masked = patch_mask(torch.ones(shape), ratio, generator=0)
    for image in masked.reshape(-1, *shape[-3:]):
        assert int(cells(image[0], (20, 10)).sum()) == count
        assert torch.equal(image, image[:1].expand_as(image))


def test_cells_by_hand():
    # 5 pixels in 2 cells: floor(5 / 2) = 2, so of 2 and 3; 4 pixels in 3: at 0, 1, 2, of 1, 1, 2.
    for seed in range(20):
        masked = patch_mask(torch.ones(1, 5, 4), 0.5, grid=(2, 3), generator=seed)[0]
        sizes = torch.tensor([[2, 2, 4], [3, 3, 6]])
        hidden = cells(masked, (2, 3))
        assert int(hidden.sum()) == 3 and int((masked == 0).sum()) == int(sizes[hidden].sum())


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_size_and_grid(height, width, ratio, seed, data):
    grid = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    masked = patch_mask(torch.ones(1, height, width), ratio, grid=grid, generator=seed)
    assert int(cells(masked[0], grid).sum()) == round(ratio * grid[0] * grid[1])


def test_images_and_tiles_are_masked_each_on_their_own():
    masked = patch_mask(torch.ones(4, 3, 1, 40, 40), generator=1)[:, :, 0].flatten(0, 1)
    assert len({cells(image, (20, 10)).numpy().tobytes() for image in masked}) == 12


def test_every_cell_is_as_likely():
    masked = patch_mask(torch.ones(4000, 1, 4, 3), 0.5, grid=(4, 3), generator=0)
    share = (masked == 0).double().mean(0)
    # A share of 4000 draws has a standard deviation of 0.5 / sqrt(4000) = 0.008; five of them.
    assert (share - 0.5).abs().max() < 0.04


def test_seeds_and_generators_give_the_same_cells():
    pixels = torch.randn(2, 3, 40, 40)
    before = pixels.clone()
    first = patch_mask(pixels, generator=7)
    assert torch.equal(first, patch_mask(pixels, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, patch_mask(pixels, generator=8))
    source = torch.Generator().manual_seed(7)
    assert torch.equal(first, patch_mask(pixels, generator=source))
    assert not torch.equal(first, patch_mask(pixels, generator=source))  # goes on
    torch.manual_seed(7)
    assert torch.equal(first, patch_mask(pixels))  # the global generator
    assert torch.equal(pixels, before)
    kept = first != 0
    assert torch.equal(first[kept], pixels[kept])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_fill_and_dtype(dtype):
    masked = patch_mask(torch.ones(1, 3, 20, 10, dtype=dtype), 0.7, generator=0, fill=-2.0)
    assert masked.dtype == dtype
    assert masked.unique().tolist() == [-2.0, 1.0] and int((masked == -2).sum()) == 3 * 140


@pytest.mark.parametrize("generator", [None, 3], ids=str)
def test_no_device_is_waited_for(generator):
    """Meta tensors raise where a value is asked for, as a synchronisation would be."""
    pixels = torch.empty(2, 5, 3, 30, 30, device="meta", dtype=torch.bfloat16)
    for found in (patch_mask(pixels, generator=generator), gaussian_blur(pixels, 10)):
        assert found.is_meta and found.shape == pixels.shape and found.dtype == pixels.dtype


# -- blur ------------------------------------------------------------------------------------------


def scipy_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W) by scipy: torch's reflection is its "mirror", the repeated pixel its "nearest"."""
    radius = math.ceil(3 * sigma)
    mode = ["mirror" if side > radius else "nearest" for side in image.shape]
    return gaussian_filter(image, sigma, mode=mode, radius=radius)


@pytest.mark.parametrize("sigma", [0.3, 1, 2.5, 10])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (2, 3), (4, 5), (31, 30), (31, 70), (64, 8)], ids=str
)
def test_blur_is_that_of_scipy(sigma, size):
    pixels = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    blurred = gaussian_blur(pixels, sigma)
    for found, image in zip(blurred.flatten(0, 2), pixels.flatten(0, 2), strict=True):
        expected = torch.from_numpy(scipy_blur(image.numpy(), sigma))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_blur_by_hand():
    # sigma with exp(-1 / 2 sigma^2) = 1/2, so sigma = 0.849 and the radius is 3: weights of
    # 1, 2^-1, 2^-4, 2^-9, whose sum over both sides is 1 + 2 (1/2 + 1/16 + 1/512) = 545 / 256.
    sigma = (2 * math.log(2)) ** -0.5
    pixels = torch.zeros(1, 1, 9, dtype=torch.float64)
    pixels[..., 4] = 545.0
    expected = [0.0, 0.5, 16.0, 128.0, 256.0, 128.0, 16.0, 0.5, 0.0]
    torch.testing.assert_close(gaussian_blur(pixels, sigma)[0, 0].tolist(), expected)
    # Pixel 1 is also seen as its reflection, pixel -1: at distance 1, 2 and 3 from 0, 1 and 2.
    pixels = pixels.roll(-3, -1)
    expected = [2 * 128.0, 256 + 16.0, 128 + 0.5, 16.0, 0.5, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(gaussian_blur(pixels, sigma)[0, 0].tolist(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma", [1, 10])
@pytest.mark.parametrize("size", [(5, 40), (336, 1)], ids=str)
def test_a_constant_image_stays(dtype, sigma, size):
    pixels = torch.full((2, 3, *size), -1.7, dtype=dtype)
    blurred = gaussian_blur(pixels, sigma)
    assert blurred.dtype == dtype
    torch.testing.assert_close(blurred, pixels)


def test_images_and_channels_are_blurred_each_on_their_own():
    pixels = torch.randn(3, 2, 3, 20, 15, dtype=torch.float64)
    whole = gaussian_blur(pixels, 1)
    for i in range(3):
        alone = gaussian_blur(pixels[i, 1, 2:], 1)
        torch.testing.assert_close(whole[i, 1, 2:], alone, rtol=1e-13, atol=1e-13)


def test_half_precision_is_blurred_in_float32_whatever_autocast_says():
    pixels = torch.randn(2, 3, 40, 40).bfloat16()
    exact = gaussian_blur(pixels.double(), 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        blurred = gaussian_blur(pixels, 10)
        wide = gaussian_blur(pixels.float(), 10)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, rtol=0, atol=1e-6)
    assert torch.equal(blurred, wide.bfloat16())


def test_blur_is_differentiable():
    pixels = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gaussian_blur(x, 1.0), pixels)


# -- the patches of Qwen2-VL -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def processed():
    """Two images of Qwen2-VL's processor, as their pixels before and after."""
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = processors.Qwen2VLImageProcessorPil(do_resize=False)
    g = np.random.default_rng(0)
    images = [g.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((56, 84), (112, 28))]
    mean, std = (np.array(x) for x in (processor.image_mean, processor.image_std))
    normalised = [torch.from_numpy((x / 255 - mean) / std).permute(2, 0, 1) for x in images]
    return normalised, processor(images, return_tensors="pt")


def test_patches_of_the_processor_become_its_images(processed):
    images, batch = processed
    found = unflatten_qwen(batch["pixel_values"], batch["image_grid_thw"])
    assert [tuple(x.shape) for x in found] == [(2, 3, 56, 84), (2, 3, 112, 28)]
    for image, frames in zip(images, found, strict=True):
        for frame in frames:  # the processor repeats a still image
            torch.testing.assert_close(frame.double(), image, rtol=0, atol=1e-5)
    assert torch.equal(flatten_qwen(found, patch_size=14), batch["pixel_values"])


@pytest.mark.parametrize(("mode", "options"), [("blur", {"sigma": 1}), ("patch-mask", {})])
def test_corrupted_patches_are_those_of_the_corrupted_image(processed, mode, options):
    images, batch = processed
    source = torch.Generator().manual_seed(3)
    changed = [
        gaussian_blur(x, 1) if mode == "blur" else patch_mask(x, generator=source) for x in images
    ]
    expected = flatten_qwen([x.expand(2, -1, -1, -1) for x in changed], patch_size=14)
    found = corrupt(batch, mode, generator=3, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@given(
    sizes=st.lists(st.tuples(*[st.integers(1, 3)] * 3), min_size=1, max_size=3),
    merge=st.integers(1, 3),
    frames=st.integers(1, 2),
    side=st.integers(1, 4),
)
def test_round_trip(sizes, merge, frames, side):
    grid = torch.tensor([[t, h * merge, w * merge] for t, h, w in sizes])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * frames * side * side)
    images = unflatten_qwen(patches, grid, merge_size=merge)
    for (t, h, w), image in zip(grid.tolist(), images, strict=True):
        assert image.shape == (t * frames, 3, h * side, w * side)
    back = flatten_qwen(images, patch_size=side, temporal_patch_size=frames, merge_size=merge)
    assert torch.equal(back, patches)


def test_bad_patches():
    patches, grid = torch.zeros(16, 1176), torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match=r"must have the 8 patches of image_grid_thw: got 16"):
        unflatten_qwen(patches, torch.tensor([[1, 2, 4]]))
    with pytest.raises(ValueError, match=r"image_grid_thw must be \(images, 3\): got shape \(3,\)"):
        unflatten_qwen(patches, grid[0])
    with pytest.raises(ValueError, match="merge_size must divide the heights.*got 3 for"):
        unflatten_qwen(patches, grid, merge_size=3)
    with pytest.raises(ValueError, match="width of 3 T p p: .*got 1177"):
        unflatten_qwen(torch.zeros(16, 1177), grid)
    with pytest.raises(TypeError, match="image_grid_thw must be int32 or int64"):
        unflatten_qwen(patches, grid.float())
    with pytest.raises(ValueError, match="images must hold at least one image"):
        flatten_qwen([], patch_size=14)
    with pytest.raises(ValueError, match=r"patch_size \* merge_size = 28: got \(2, 3, 28, 14\)"):
        flatten_qwen([torch.zeros(2, 3, 28, 14)], patch_size=14)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 30, 30), (2, 5, 3, 30, 30), (1, 2, 4, 3, 30, 30)])
def test_corrupt_finds_images(shape):
    batch = {"input_ids": torch.zeros(2, 4), "pixel_values": torch.randn(shape)}
    pixels = batch["pixel_values"]
    options = {"ratio": 0.5, "grid": (3, 2), "fill": 1.0}
    masked = corrupt(batch, "patch-mask", generator=2, **options)
    assert torch.equal(masked, patch_mask(pixels, generator=2, **options))
    assert torch.equal(corrupt(batch, "blur", sigma=2.0), gaussian_blur(pixels, 2.0))
    assert torch.equal(corrupt(batch, "blur"), gaussian_blur(pixels, 10.0))


def test_no_image_of_patches():
    batch = {"pixel_values": torch.zeros(0, 1176), "image_grid_thw": torch.zeros(0, 3).long()}
    assert corrupt(batch, "blur").shape == (0, 1176)


def test_bad_batches():
    grid = torch.tensor([[1, 4, 4]])
    for pixels, found in (
        (None, "NoneType"),
        ([torch.zeros(3, 8, 8)], "list"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 4), r"shape \(2, 8, 8, 4\)"),  # channels last
        (torch.zeros(16, 1176), r"shape \(16, 1176\)"),  # and no grid
    ):
        with pytest.raises(ValueError, match=rf"got {found} in a batch of \['pixel_values'\]"):
            corrupt({"pixel_values": pixels}, "blur")
    with pytest.raises(ValueError, match=r"\(16, 3, 14, 14\) in a batch of \['image_grid_thw', 'p"):
        corrupt({"pixel_values": torch.zeros(16, 3, 14, 14), "image_grid_thw": grid}, "blur")
    with pytest.raises(ValueError, match="mode must be one of 'patch-mask', 'blur': got 'drop'"):
        corrupt({"pixel_values": torch.zeros(1, 3, 8, 8)}, "drop")


def test_bad_options():
    pixels = torch.zeros(1, 3, 8, 30)
    with pytest.raises(ValueError, match=r"from 1 to the \(8, 30\) pixels .*got \(20, 10\); small"):
        patch_mask(pixels)
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\]: got 70"):
        patch_mask(pixels, 70)
    for sigma in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"sigma must be a number .*: got {sigma}"):
            gaussian_blur(pixels, sigma)
    for fn in (patch_mask, lambda x: gaussian_blur(x, 1)):
        with pytest.raises(TypeError, match="pixels must have a floating-point dtype"):
            fn(pixels.to(torch.uint8))
        with pytest.raises(ValueError, match=r"pixels must be \(..., C, H, W\) .*got \(8, 30\)"):
            fn(pixels[0, 0])
