"""calibrate: the kernel against float64, the reference by hand, and text tokens bit for bit."""

import pytest
import torch
from _paths import Paths
from fastalign_kernels import calibrate as kernels
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalign as fa
from fastalign.ops.calibrate import Calibrate, CalibrateNative
from fastalign.reference.calibrate import calibrate as reference
from fastalign.testing import assert_matches_reference, cases, cotangent_like, value_and_grads

public = fa.ops.calibrate
fused = Calibrate.apply  # which the public function passes by on a CPU
paths = Paths(public, fused, reference, CalibrateNative.apply)


def make(*rows, d=8, device="cpu", dtype=torch.float32):
    x, scale, shift = torch.randn(*rows, d), torch.randn(d), torch.randn(d)
    made = x.to(dtype), torch.rand(rows) < 0.5, scale.to(dtype), shift.to(dtype)
    return tuple(t.to(device) for t in made)


@paths.kernels
@pytest.mark.parametrize("case", cases("calibrate"), ids=str)
def test_kernel_matches_reference(case, fn, device):
    assert_matches_reference(fn, reference, case.inputs(device))


@paths.every
def test_by_hand(fn, device):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    mask = torch.tensor([True, False, True], device=device)
    scale, shift = torch.tensor([[2.0, -1.0], [0.5, 10.0]], device=device)
    # (2 * 1 + 1/2, -2 + 10); text; (2 * 5 + 1/2, -6 + 10). Cotangents -1, -7/8, ..., -3/8:
    # dscale = (-1 * 1 - 1/2 * 5, -7/8 * 2 - 3/8 * 6), dshift = (-1 - 1/2, -7/8 - 3/8).
    y, dx, dscale, dshift = value_and_grads(fn, (x, mask, scale, shift))
    assert y.tolist() == [[2.5, 8.0], [3.0, 4.0], [10.5, 4.0]]
    assert dx.tolist() == [[-2.0, 0.875], [-0.75, -0.625], [-1.0, 0.375]]
    assert dscale.tolist() == [-3.5, -4.0] and dshift.tolist() == [-1.5, -1.25]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, interpreting
@paths.every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_text_passes_bit_for_bit(fn, dtype, device):
    # Every pattern of 16 bits: subnormals, both zeros, infinities and NaN with its payload.
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    patterns = patterns * 65521 if dtype == torch.float32 else patterns
    x = patterns.to(bits).view(dtype).view(16, 4096)
    mask = torch.zeros(16, dtype=torch.bool, device=device)
    scale = torch.full((4096,), 3.0, device=device)
    assert torch.equal(fn(x, mask, scale, scale).view(bits), x.view(bits))


@paths.every
def test_identity_parameters_change_nothing(fn, device):
    x, mask, scale, shift = make(3, 4, device=device, dtype=torch.bfloat16)
    assert torch.equal(fn(x, mask, torch.ones_like(scale), torch.zeros_like(shift)), x)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 7, 8])
def test_gradcheck(rows, d):
    x, mask, scale, shift = make(*rows, d=d, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    assert torch.autograd.gradcheck(lambda x, u, v: public(x, mask, u, v), leaves)


@given(n=st.integers(0, 12), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_text_and_vision_rows_are_independent(n, d, seed, device):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(n, d, generator=g).to(device), torch.rand(n, generator=g) < 0.5
    mask, (scale, shift) = mask.to(device), torch.randn(2, d, generator=g).to(device)
    for fn in paths.usable:
        y = fn(x, mask, scale, shift)
        assert torch.equal(y[~mask], x[~mask])
        torch.testing.assert_close(y[mask], x[mask] * scale + shift)


@given(n=st.integers(1, 12), d=st.integers(1, 9), seed=st.integers(0, 999))
def test_column_sums_are_those_of_vision_rows(n, d, seed, device):
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(n, d, generator=g).to(device), torch.rand(n, generator=g) < 0.5
    mask, (scale, shift) = mask.to(device), torch.randn(2, d, generator=g).to(device)
    dy = cotangent_like(x)
    for fn in paths.usable:
        _, _, dscale, dshift = value_and_grads(fn, (x, mask, scale, shift))
        torch.testing.assert_close(dscale, (x * dy)[mask].sum(0))
        torch.testing.assert_close(dshift, dy[mask].sum(0))


@pytest.mark.parametrize("programs", [1, 2, 3])
def test_column_sums_over_any_number_of_programs(programs, device, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    inputs = make(37, d=5, device=device)
    torch.testing.assert_close(value_and_grads(fused, inputs), value_and_grads(reference, inputs))


@paths.every
def test_strided_and_expanded_inputs(fn, device):
    x, mask, scale, shift = make(3, 4, device=device)
    expected = value_and_grads(fn, (x, mask, scale, shift))
    doubled = torch.stack([scale, shift], 1)
    strided = (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), mask.mT.contiguous().mT)
    results = value_and_grads(fn, (*strided, doubled[:, 0], doubled[:, 1]))
    torch.testing.assert_close(results, expected)
    wide = (x[:1].expand(3, 4, 8), mask[:1].expand(3, 4), scale[:1].expand(8), shift)
    plain = tuple(t.contiguous() for t in wide)
    torch.testing.assert_close(value_and_grads(fn, wide), value_and_grads(fn, plain))


@paths.kernels
def test_runs_are_bit_equal_and_inputs_stay(fn, device):
    inputs = make(40, d=5, device=device)
    before = [t.clone() for t in inputs]
    first = value_and_grads(fn, inputs)
    for _ in range(2):
        assert all(map(torch.equal, first, value_and_grads(fn, inputs)))
    assert all(map(torch.equal, before, inputs))


def test_cuda_branch_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
        mask, scale = torch.empty(2, 3, device="cuda") > 0, torch.empty(64, device="cuda")
        y = public(x, mask, scale, scale)
        assert (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, "cuda")
        with pytest.raises(ValueError, match="dtype of x on CUDA must be one of torch.float16"):
            public(x.double(), mask, scale, scale)


def test_dtypes_and_widths(device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x, mask, scale, shift = make(3, dtype=dtype)
        assert public(x, mask, scale.float(), shift.float()).dtype == dtype
    for fn in paths.usable:
        inputs = make(3, d=0, device=device)
        assert [x.shape for x in value_and_grads(fn, inputs)] == [(3, 0), (3, 0), (0,), (0,)]


def test_bad_input():
    x, mask, scale, shift = make(2, 3)
    with pytest.raises(TypeError, match="x must have a floating-point dtype: got torch.int64"):
        public(x.long(), mask, scale, shift)
    with pytest.raises(TypeError, match="vision_mask must be bool: got torch.int64; use"):
        public(x, mask.long(), scale, shift)
    with pytest.raises(ValueError, match=r"vision_mask must have the shape .* \(2, 3\): got \(3,"):
        public(x, mask.mT, scale, shift)
    with pytest.raises(ValueError, match=r"scale must have the shape \(d,\) = \(8,\): got \(7,\)"):
        public(x, mask, scale[:7], shift)
    with pytest.raises(ValueError, match="shift must have the dtype of scale: got torch.float64"):
        public(x, mask, scale, shift.double())
    with pytest.raises(ValueError, match="x must have at least 1 dimension"):
        public(torch.tensor(1.0), torch.tensor(True), scale, shift)
