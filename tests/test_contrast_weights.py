"""CAL's token weights: the kernel, numbers by hand, sample borders, the released code."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastalign.losses import contrast_weights
from fastalign.ops.contrast_weights import fused
from fastalign.reference.contrast_weights import contrast_weights as reference
from fastalign.testing import cases
from fastalign.testing.accuracy import assert_as_accurate

both = pytest.mark.parametrize("fn", [contrast_weights, fused], ids=["public", "fused"])
DELTA = torch.tensor([0.0, 3.0, 10.0, -2.0, 4.0])  # clamped to [1, 5]: 1, 3, 5, 1, 4
FLOATS = st.floats(-100, 100, width=32)


# -- the kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("case", cases("contrast_weights"), ids=str)
def test_kernel_matches_reference(case, window, device):
    delta, offsets = case.inputs(device)
    weights = fused(delta, offsets, window=window)
    eager = reference(delta, offsets, window=window)
    assert_as_accurate(weights, eager, reference(delta.double(), offsets, window=window))


@pytest.mark.parametrize("window", [251, 253, 255, 257, 2**40 + 1])
@pytest.mark.parametrize("packed", [False, True])
def test_kernel_at_windows_of_the_row_and_wider(window, packed, device):
    delta = 2 + 4 * torch.randn(127, device=device)
    offsets = torch.tensor([0, 50, 127], device=device) if packed else None
    # Two tokens further than the row is long, the reference sees the same neighbours.
    exact = reference(delta.double(), offsets, window=min(window, 257))
    # A sum of at most 127 positive numbers errs by half a unit an addition.
    rtol = 127 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(
        fused(delta, offsets, window=window).double(), exact, rtol=rtol, atol=0
    )


@pytest.mark.parametrize("samples", [*range(1, 10), 31, 32, 33])
def test_kernel_finds_every_sample(samples, device):
    """With each token's own number as delta and one number a sample, no window may mix them."""
    lengths = torch.randint(4, (samples,))
    lengths[0] += 1
    for dtype in (torch.int32, torch.int64):
        offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(device, dtype)
        delta = torch.arange(samples).repeat_interleave(lengths).to(device, torch.float32)
        assert torch.equal(fused(delta, offsets, (0.0, 100.0), 5), delta)


def test_kernel_is_safe_on_wrong_offsets(device):
    """Offsets on a GPU are not checked: tokens of no sample get NaN, nothing beyond is read."""
    memory = torch.full((9,), float("nan"), device=device)
    delta = memory[2:7].copy_(DELTA)  # NaN on both sides

    def missing(*offsets: int) -> list[bool]:
        return fused(delta, torch.tensor(offsets, device=device)).isnan().tolist()

    assert missing(0, 2) == [False, False, True, True, True]
    assert missing(2, 5) == [True, True, False, False, False]
    assert missing(0) == [True] * 5
    assert missing(-2, 7) == missing(0, 9) == [False] * 5


# -- by hand ---------------------------------------------------------------------------------------


def test_one_sample_by_hand():
    # (1 + 3) / 2, (1 + 3 + 5) / 3, (3 + 5 + 1) / 3, (5 + 1 + 4) / 3, (1 + 4) / 2
    expected = torch.tensor([2.0, 3.0, 3.0, 10 / 3, 2.5])
    torch.testing.assert_close(contrast_weights(DELTA), expected)
    whole = contrast_weights(DELTA, torch.tensor([0, 5], dtype=torch.int32))
    torch.testing.assert_close(whole, expected)


@both
def test_windows_end_at_the_sample_by_hand(fn, device):
    # 1, 3 and 5, 1, 4: (1 + 3) / 2 twice, then (5 + 1) / 2, (5 + 1 + 4) / 3, (1 + 4) / 2.
    expected = torch.tensor([2.0, 2.0, 3.0, 10 / 3, 2.5])
    for dtype in (torch.int32, torch.int64):
        weights = fn(DELTA.to(device), torch.tensor([0, 2, 5], dtype=dtype, device=device))
        torch.testing.assert_close(weights.cpu(), expected)


def test_samples_without_a_label():
    offsets = torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32)
    expected = contrast_weights(DELTA, torch.tensor([0, 2, 5], dtype=torch.int32))
    assert torch.equal(contrast_weights(DELTA, offsets), expected)


def test_clamp_and_window():
    # Clamped to [0, 4]: 0, 3, 4, 0, 4. Windows of 5, cut at the borders.
    expected = torch.tensor([7 / 3, 7 / 4, 11 / 5, 11 / 4, 8 / 3])
    torch.testing.assert_close(contrast_weights(DELTA, clamp=(0.0, 4.0), window=5), expected)
    # A window wider than the row averages all of it.
    torch.testing.assert_close(contrast_weights(DELTA, window=11), torch.full((5,), 14 / 5))


def test_official_by_hand():
    """The released pool does not count its padding: at a border it divides by 2, not by 3."""
    # Two samples of three positions, the ignored ones among them; clamped: 1, 5, 2 and 5, 1, 3.
    delta = torch.tensor([0.5, 7.0, 2.0, 9.0, 0.0, 3.0])
    # The third and fourth windows cross the samples: (5 + 2 + 5) / 3 and (2 + 5 + 1) / 3.
    expected = torch.tensor([(1 + 5) / 2, 8 / 3, 12 / 3, 8 / 3, 9 / 3, (1 + 3) / 2])
    torch.testing.assert_close(contrast_weights(delta, compat="official"), expected)


@pytest.mark.parametrize("t", [1, 2, 3, 7, 127, 1025])
def test_official_is_the_released_layer(t):
    delta = 4 * torch.randn(t)
    pool = torch.nn.AvgPool1d(3, stride=1, padding=1, count_include_pad=False)
    expected = pool(delta.clamp(1, 5)[None, None])[0, 0]
    weights = contrast_weights(delta, compat="official")
    torch.testing.assert_close(weights, expected, rtol=2e-7, atol=0)


@both
def test_nan_stays_in_its_windows(fn, device):
    delta = torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0, 5.0], device=device)
    lost = fn(delta).isnan()
    assert lost.tolist() == [False, True, True, True, False, False]
    lost = fn(delta, torch.tensor([0, 3, 6], dtype=torch.int32, device=device)).isnan()
    assert lost.tolist() == [False, True, True, False, False, False]
    assert fn(delta, window=7).isnan().tolist() == [True] * 6
    infinite = fn(torch.tensor([float("inf"), -float("inf")], device=device))
    torch.testing.assert_close(infinite.cpu(), torch.tensor([3.0, 3.0]))


@both
@pytest.mark.parametrize("offsets", [None, [0], [0, 0]])
def test_no_label(fn, offsets, device):
    offsets = None if offsets is None else torch.tensor(offsets, device=device)
    assert fn(torch.zeros(0, device=device), offsets).shape == (0,)


@both
def test_types_and_gradient(fn, device):
    delta = DELTA.to(device)
    assert not fn(delta.clone().requires_grad_()).requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = fn(delta.to(dtype))
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, fn(delta))
    assert contrast_weights(delta.double()).dtype == torch.float64
    strided = torch.stack([delta, delta], 1)[:, 0]
    assert torch.equal(fn(strided), fn(delta))
    offsets = torch.tensor([0, 0, 2, 2, 5, 5], device=device)[1::2]
    assert torch.equal(fn(delta, offsets), fn(delta, offsets.contiguous()))


def test_cuda_branch_on_fake_tensors():
    with FakeTensorMode():
        offsets = torch.empty(3, device="cuda", dtype=torch.int64)
        for place in (offsets, None):
            weights = contrast_weights(torch.empty(5, device="cuda", dtype=torch.bfloat16), place)
            assert (weights.shape, weights.dtype) == ((5,), torch.float32)
            assert weights.device.type == "cuda"
        with pytest.raises(ValueError, match="dtype of delta on CUDA must be one of torch.float"):
            contrast_weights(torch.empty(5, device="cuda", dtype=torch.float8_e4m3fn))


def test_float64_on_cuda_is_computed_by_the_reference(monkeypatch):
    from fastalign.ops import contrast_weights as module

    asked = []
    monkeypatch.setattr(module, "reference", lambda delta, *rest: asked.append(rest) or delta)
    with FakeTensorMode():
        delta = torch.empty(5, device="cuda", dtype=torch.float64)
        assert contrast_weights(delta, window=5) is delta
    assert asked == [(None, (1.0, 5.0), 5, "paper")]


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=40), FLOATS, FLOATS, st.integers(0, 4), st.data())
def test_weights_lie_within_the_clamp(values, first, second, half, data):
    low, high = sorted((first, second))
    cuts = data.draw(st.lists(st.integers(0, len(values)), max_size=5))
    offsets = torch.tensor([0, *sorted(cuts), len(values)], dtype=torch.int32)
    weights = contrast_weights(
        torch.tensor(values, dtype=torch.float64), offsets, clamp=(low, high), window=2 * half + 1
    )
    assert weights.shape == (len(values),)
    assert (weights >= low - 1e-9).all() and (weights <= high + 1e-9).all()


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    half=st.integers(0, 4),
    values=st.integers(0, 999),
    data=st.data(),
)
def test_no_window_crosses_a_sample(lengths, half, values, data, device):
    """NaN in every other sample leaves one sample's weights as they are, on both paths."""
    g = torch.Generator().manual_seed(values)
    delta = (4 * torch.randn(sum(lengths), generator=g)).to(device)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    mine = slice(*offsets[chosen : chosen + 2].tolist())
    broken = torch.full_like(delta, float("nan"))
    broken[mine] = delta[mine]
    for fn in (contrast_weights, fused):
        options = {"clamp": (1.0, 5.0), "window": 2 * half + 1}
        weights = fn(delta, offsets, **options)
        assert torch.equal(fn(broken, offsets, **options)[mine], weights[mine])
        # Sums of up to nine numbers: four units in the last place of the bound.
        assert (weights >= 1 - 1e-6).all() and (weights <= 5 + 5e-6).all()


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    half=st.integers(0, 4),
    data=st.data(),
)
def test_samples_may_come_in_any_order(lengths, half, data, device):
    samples = [4 * torch.randn(n, device=device) for n in lengths]
    order = data.draw(st.permutations(range(len(lengths))))

    def weights(fn, chosen):
        offsets = torch.tensor([0, *(len(samples[i]) for i in chosen)]).cumsum(0)
        packed = torch.cat([samples[i] for i in chosen])
        found = fn(packed, offsets.to(device), window=2 * half + 1)
        return dict(zip(chosen, found.split(offsets.diff().tolist()), strict=True))

    for fn in (contrast_weights, fused):
        first, second = weights(fn, range(len(lengths))), weights(fn, order)
        assert all(torch.equal(first[i], second[i]) for i in order)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, max_size=40), st.sampled_from(["paper", "official"]))
def test_window_of_one_is_the_clamp(values, compat):
    delta = torch.tensor(values)
    assert torch.equal(contrast_weights(delta, window=1, compat=compat), delta.clamp(1.0, 5.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(FLOATS, max_size=8), min_size=1, max_size=5), st.integers(0, 3))
def test_packed_is_each_sample_by_itself(samples, half):
    window = 2 * half + 1
    packed = [torch.tensor(sample, dtype=torch.float64) for sample in samples]
    offsets = torch.tensor([0, *(len(s) for s in samples)]).cumsum(0)
    alone = torch.cat([contrast_weights(sample, window=window) for sample in packed])
    weights = contrast_weights(torch.cat(packed), offsets, window=window)
    torch.testing.assert_close(weights, alone)


# -- contracts -------------------------------------------------------------------------------------


def test_every_candidate_of_the_launch_computes_the_same(harness, device):
    tune = importlib.import_module("benchmarks.tune")
    module = importlib.import_module("fastalign_kernels.contrast_weights")
    (case,) = [c for c in cases("contrast_weights") if str(c) == "1025x5-float32-packed"]
    (table,) = tune.CANDIDATES["contrast_weights"]
    run = tune.step(fused, case.inputs(device), table.gradients)
    (expected,) = run()
    for candidate in table.candidates:
        with tune.configured(module, table.function, candidate):
            assert torch.equal(run()[0], expected)


def test_bad_input():
    with pytest.raises(ValueError, match="window must be odd and at least 1.*got 4"):
        contrast_weights(DELTA, window=4)
    with pytest.raises(ValueError, match="window must be odd and at least 1.*got -1"):
        contrast_weights(DELTA, window=-1)
    with pytest.raises(ValueError, match=r"alpha <= beta: got \(5.0, 1.0\)"):
        contrast_weights(DELTA, clamp=(5.0, 1.0))
    with pytest.raises(ValueError, match="compat must be one of 'paper', 'official': got 'code'"):
        contrast_weights(DELTA, compat="code")
    with pytest.raises(ValueError, match='cu_seqlens must be None with compat="official"'):
        contrast_weights(DELTA, torch.tensor([0, 5]), compat="official")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 5"):
        contrast_weights(DELTA, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"delta must have 1 dimension.*shape \(1, 5\)"):
        contrast_weights(DELTA[None])
    with pytest.raises(TypeError, match="delta must have a floating-point dtype"):
        contrast_weights(DELTA.long())
