"""hadamard_reweight: kernel against float64, reference by hand, and what must not change."""

import pytest
import torch
from _emulated import HadamardReweightEmulated
from _paths import Paths
from fastalign_kernels import hadamard_reweight as kernels
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalign as fa
from fastalign.ops.hadamard_reweight import HadamardReweight, HadamardReweightNative
from fastalign.reference.hadamard_reweight import hadamard_reweight as reference
from fastalign.testing import assert_matches_reference, cases, value_and_grads

public = fa.ops.hadamard_reweight
fused = HadamardReweight.apply  # which the public function passes by on a CPU
paths = Paths(
    public, fused, reference, HadamardReweightNative.apply, HadamardReweightEmulated.apply
)
WIDTHS = (1, 2, 3, 5, 7, 8, 9)


@paths.kernels
@pytest.mark.parametrize("case", cases("hadamard_reweight"), ids=str)
def test_kernel_matches_reference(case, fn, device):
    assert_matches_reference(fn, reference, case.inputs(device))


@paths.every
def test_by_hand(fn, device):
    # u = (3 * 1, 4 * 0) = (3, 0); |h| = 5, |u| = 3: y = 5/3 u = (5, 0).
    # Second row: u = (2, -2), |h| = 2 sqrt(2) = |u|: y = u.
    h = torch.tensor([[3.0, 4.0], [2.0, 2.0]], device=device, requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [1.0, -1.0]], device=device)
    y = fn(h, w)
    torch.testing.assert_close(y, torch.tensor([[5.0, 0.0], [2.0, -2.0]], device=device))
    # Where w keeps one channel, y_0 = |h|, so dy_0/dh = h / |h| = (0.6, 0.8).
    y[0, 0].backward()
    torch.testing.assert_close(h.grad, torch.tensor([[0.6, 0.8], [0.0, 0.0]], device=device))


@paths.every
def test_zero_row_gives_zero_and_no_gradient(fn, device):
    h = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 1.0]], device=device)
    w = torch.tensor([[5.0, 0.0], [1.0, 1.0], [0.0, 0.0]], device=device)
    for result in value_and_grads(fn, (h, w)):
        assert torch.equal(result, torch.zeros_like(h))


@paths.every
def test_nan_stays_in_its_row(fn, device):
    h = torch.ones(2, 5, device=device)
    h[0, 3] = float("nan")
    y = fn(h, torch.ones_like(h))
    assert y[0].isnan().all() and torch.equal(y[1], h[1])


@paths.every
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_do_not_leave_the_range(fn, scale, device):
    h, w = torch.randn(2, 3, 17, device=device)
    torch.testing.assert_close(fn(h, scale * w), fn(h, w))
    torch.testing.assert_close(fn(scale * h, w) / scale, fn(h, w))


@pytest.mark.parametrize("rows", [(1,), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(rows, d, shared):
    h = torch.randn(*rows, d, dtype=torch.float64, requires_grad=True)
    w = torch.randn(d) if shared else torch.randn(*rows, d)
    assert torch.autograd.gradcheck(public, (h, w.double().requires_grad_()))


@given(n=st.integers(0, 4), d=st.integers(1, 40), seed=st.integers(0, 999))
def test_energy_is_kept(n, d, seed, device):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(2, n, d, generator=g).to(device)
    for fn in paths.usable:
        torch.testing.assert_close(fn(h, w).square().sum(-1), h.square().sum(-1))


@given(log_factor=st.floats(-15, 15), d=st.integers(1, 40), seed=st.integers(0, 999))
def test_factor_on_w_changes_nothing(log_factor, d, seed, device):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(2, 2, d, generator=g).to(device)
    for fn in paths.usable:
        torch.testing.assert_close(fn(h, 10**log_factor * w), fn(h, w))


@paths.every
def test_strided_and_expanded_inputs(fn, device):
    base = torch.randn(9, 4, 3, device=device)
    h, w = base.permute(2, 1, 0), base[:, 0, 0].expand(3, 4, 9)
    assert not h.is_contiguous() and w.stride()[:2] == (0, 0)
    expected = fn(h.contiguous(), w.contiguous())
    torch.testing.assert_close(fn(h, w), expected, rtol=0, atol=0)
    torch.testing.assert_close(fn(h, base[:, 0, 0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("programs", [1, 2, 3, 8])
def test_shared_w_sums_over_any_number_of_programs(programs, device, monkeypatch):
    monkeypatch.setattr(kernels, "_PARTIALS", programs)
    inputs = torch.randn(7, 5, device=device), torch.randn(5, device=device)
    torch.testing.assert_close(value_and_grads(fused, inputs), value_and_grads(reference, inputs))


@paths.kernels
def test_detached_w_gets_no_gradient(fn, device):
    h, w = torch.randn(2, 3, 8, device=device)
    h.requires_grad_()
    for weights in (w, w[0]):
        (dh,) = torch.autograd.grad(fn(h, weights).sum(), h)
        torch.testing.assert_close(dh, torch.autograd.grad(reference(h, weights).sum(), h)[0])
    unused = kernels.hadamard_reweight_bwd(torch.ones_like(h), h.detach(), w, False)[1]
    assert unused.numel() == 0


def test_cuda_branch_on_fake_tensors():
    with FakeTensorMode():
        h = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
        y = public(h, torch.empty(64, device="cuda"))
        assert (y.shape, y.dtype, y.device.type) == (h.shape, h.dtype, "cuda")
        with pytest.raises(ValueError, match="dtype of h on CUDA must be one of torch.float16"):
            public(h.double(), h)
        with pytest.raises(ValueError, match="d <= 16384 on CUDA: got 20000"):
            wide = torch.empty(2, 20000, device="cuda")
            public(wide, wide)


def test_dtypes_and_widths(device):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert public(torch.ones(2, 3, dtype=dtype), torch.ones(3)).dtype == dtype
    assert public(torch.ones(2, 0), torch.ones(2, 0)).shape == (2, 0)
    for fn in paths.usable:
        assert fn(*torch.ones(2, 2, 0, device=device)).shape == (2, 0)
        h, w = torch.ones(2, 0, device=device), torch.ones(0, device=device)
        assert [x.shape for x in value_and_grads(fn, (h, w))] == [(2, 0), (2, 0), (0,)]


def test_bad_input():
    h = torch.ones(2, 3)
    with pytest.raises(TypeError, match="h must have a floating-point dtype: got torch.int64"):
        public(h.long(), h)
    with pytest.raises(ValueError, match=r"w must have the shape of h or \(3,\): got \(2,\)"):
        public(h, torch.ones(2))
    with pytest.raises(ValueError, match="h must have at least 1 dimension"):
        public(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="w must have the device of h: got meta and cpu"):
        public(h, h.to("meta"))
