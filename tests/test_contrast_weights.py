"""CAL's token weights: numbers worked out by hand, sample borders, the released code, contracts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastalign.losses import contrast_weights

DELTA = torch.tensor([0.0, 3.0, 10.0, -2.0, 4.0])  # clamped to [1, 5]: 1, 3, 5, 1, 4
FLOATS = st.floats(-100, 100, width=32)


def test_one_sample_by_hand():
    # (1 + 3) / 2, (1 + 3 + 5) / 3, (3 + 5 + 1) / 3, (5 + 1 + 4) / 3, (1 + 4) / 2
    expected = torch.tensor([2.0, 3.0, 3.0, 10 / 3, 2.5])
    torch.testing.assert_close(contrast_weights(DELTA), expected)
    whole = contrast_weights(DELTA, torch.tensor([0, 5], dtype=torch.int32))
    torch.testing.assert_close(whole, expected)


def test_windows_end_at_the_sample():
    # 1, 3 and 5, 1, 4: (1 + 3) / 2 twice, then (5 + 1) / 2, (5 + 1 + 4) / 3, (1 + 4) / 2.
    expected = torch.tensor([2.0, 2.0, 3.0, 10 / 3, 2.5])
    for dtype in (torch.int32, torch.int64):
        weights = contrast_weights(DELTA, torch.tensor([0, 2, 5], dtype=dtype))
        torch.testing.assert_close(weights, expected)


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


def test_nan_stays_in_its_windows():
    delta = torch.tensor([1.0, 2.0, float("nan"), 4.0, 5.0, 5.0])
    lost = contrast_weights(delta).isnan()
    assert lost.tolist() == [False, True, True, True, False, False]
    lost = contrast_weights(delta, torch.tensor([0, 3, 6], dtype=torch.int32)).isnan()
    assert lost.tolist() == [False, True, True, False, False, False]
    infinite = contrast_weights(torch.tensor([float("inf"), -float("inf")]))
    torch.testing.assert_close(infinite, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("offsets", [None, [0], [0, 0]])
def test_no_label(offsets):
    offsets = None if offsets is None else torch.tensor(offsets)
    assert contrast_weights(torch.zeros(0), offsets).shape == (0,)


def test_types_and_gradient():
    delta = DELTA.clone().requires_grad_()
    assert not contrast_weights(delta).requires_grad
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weights = contrast_weights(DELTA.to(dtype))
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights, contrast_weights(DELTA))
    assert contrast_weights(DELTA.double()).dtype == torch.float64
    strided = torch.stack([DELTA, DELTA], 1)[:, 0]
    assert torch.equal(contrast_weights(strided), contrast_weights(DELTA))


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
