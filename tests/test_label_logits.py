"""label_logits: the kernel against float64, the reference by hand, and the full product."""

import pytest
import torch
from _paths import Paths
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalign as fa
from fastalign.ops.label_logits import LabelLogits, LabelLogitsNative
from fastalign.reference.label_logits import label_logits as reference
from fastalign.testing import assert_matches_reference, cases, value_and_grads

public = fa.ops.label_logits


def fused(hidden, weight, labels, bias=None):
    return LabelLogits.apply(hidden, weight, labels, bias)


def native(hidden, weight, labels, bias=None):
    return LabelLogitsNative.apply(hidden, weight, labels, bias)


paths = Paths(public, fused, reference, native)


def make(t=4, v=5, d=8, device="cpu", dtype=torch.float32):
    hidden, weight = torch.randn(t, d, dtype=dtype), torch.randn(v, d, dtype=dtype)
    labels = torch.randint(v, (t,)).masked_fill(torch.arange(t) % 4 == 2, -100)
    return tuple(x.to(device) for x in (hidden, weight, labels, torch.randn(v, dtype=dtype)))


@paths.kernels
@pytest.mark.parametrize("case", cases("label_logits"), ids=str)
def test_kernel_matches_reference(case, fn, device):
    assert_matches_reference(fn, reference, case.inputs(device))


@paths.every
@pytest.mark.parametrize("label_dtype", [torch.int32, torch.int64])
def test_by_hand(fn, label_dtype, device):
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    weight = torch.tensor([[1.0, 10.0], [2.0, -1.0]], device=device)
    labels = torch.tensor([1, -100, 1], device=device, dtype=label_dtype)
    bias = torch.tensor([7.0, 0.5], device=device)
    # <(1, 2), (2, -1)> + 0.5 = 0.5; ignored; <(5, 6), (2, -1)> + 0.5 = 4.5
    y = fn(hidden, weight, labels, bias)
    assert torch.equal(y, torch.tensor([0.5, 0.0, 4.5], device=device))
    # The cotangents are -1, -7/8, -3/4: dweight_1 = -(1, 2) - 3/4 (5, 6), dbias_1 = -1 - 3/4.
    _, dhidden, dweight, dbias = value_and_grads(fn, (hidden, weight, labels, bias))
    assert dhidden.tolist() == [[-2.0, 1.0], [0.0, 0.0], [-1.5, 0.75]]
    assert dweight.tolist() == [[0.0, 0.0], [-4.75, -6.5]] and dbias.tolist() == [0.0, -1.75]


@paths.every
def test_all_ignored(fn, device):
    hidden, weight, labels, bias = make(device=device)
    for result in value_and_grads(fn, (hidden, weight, torch.full_like(labels, -100), bias)):
        assert torch.equal(result, torch.zeros_like(result))


@paths.every
def test_ignored_rows_may_hold_anything(fn, device):
    hidden, weight, labels, bias = make(device=device)
    clean = value_and_grads(fn, (hidden, weight, labels, bias))
    hidden[2] = float("nan")
    torch.testing.assert_close(value_and_grads(fn, (hidden, weight, labels, bias)), clean)


def test_label_beyond_the_vocabulary(device):
    hidden, weight, labels, bias = make(device=device)
    labels[0] = len(weight)
    for result in value_and_grads(fused, (hidden, weight, labels, bias))[:2]:
        assert result[0].isnan().all() and result[1:].isfinite().all()
    on_cpu = [x.cpu() for x in (hidden, weight, labels)]
    for fn in paths.usable:
        if fn is not fused:
            with pytest.raises(IndexError, match="out of range|must be below 5.*: got 5; negative"):
                fn(*on_cpu)


@pytest.mark.parametrize("t", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("d", [1, 2, 3, 7])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(t, d, with_bias):
    hidden, weight, labels, bias = make(t, 3, d, dtype=torch.float64)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    inputs += [bias.requires_grad_()] if with_bias else []
    assert torch.autograd.gradcheck(lambda h, w, *b: public(h, w, labels, *b), inputs)


@paths.every
def test_bfloat16_gradient_of_a_frequent_label_adds_up_in_float32(fn, device):
    # A bfloat16 sum of ones stops at 256, where adding 1 rounds away; it can hold 304.
    hidden = torch.ones(304, 2, device=device, dtype=torch.bfloat16)
    weight = torch.ones(2, 2, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.ones(304, device=device, dtype=torch.int64)
    fn(hidden, weight, labels).sum().backward()
    assert weight.grad.tolist() == [[0.0, 0.0], [304.0, 304.0]]


@given(t=st.integers(0, 6), v=st.integers(1, 6), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_equals_gathering_the_full_product(t, v, d, seed, device):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(t, d, generator=g), torch.randn(v, d, generator=g)
    bias, labels = torch.randn(v, generator=g), torch.randint(-1, v, (t,), generator=g)
    logits = (hidden @ weight.mT + bias).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    expected = logits.masked_fill(labels < 0, 0)
    for fn in paths.usable:
        found = fn(*(x.to(device) for x in (hidden, weight, labels, bias)))
        torch.testing.assert_close(found.cpu(), expected)


@given(t=st.integers(1, 8), v=st.integers(1, 4), seed=st.integers(0, 999))
def test_gradient_equals_that_of_the_full_product(t, v, seed, device):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(t, 3, generator=g), torch.randn(v, 3, generator=g)
    labels = torch.randint(v, (t,), generator=g)

    def full(hidden, weight):
        return (hidden @ weight.mT).gather(1, labels[:, None])[:, 0]

    expected = value_and_grads(full, (hidden, weight))
    for fn in paths.usable:
        found = value_and_grads(fn, [x.to(device) for x in (hidden, weight, labels)])
        torch.testing.assert_close([x.cpu() for x in found], list(expected))


@paths.every
def test_strided_and_expanded_inputs(fn, device):
    hidden, weight, labels, bias = make(device=device)
    expected = fn(hidden, weight, labels, bias)
    twice = labels.repeat_interleave(2)[::2]
    strided = fn(hidden.mT.contiguous().mT, weight.mT.contiguous().mT, twice, bias)
    torch.testing.assert_close(strided, expected, rtol=0, atol=0)
    row = hidden[:1]
    torch.testing.assert_close(
        value_and_grads(fn, (row.expand(4, 8), weight, labels)),
        value_and_grads(fn, (row.repeat(4, 1), weight, labels)),
    )


@paths.kernels
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_asked_for(needed, fn, device):
    hidden, weight, labels, bias = make(device=device)
    leaves = [hidden, weight, bias]
    asked = [leaves[i].requires_grad_() for i in needed]
    got = torch.autograd.grad(fn(hidden, weight, labels, bias).square().sum(), asked)
    expected = torch.autograd.grad(reference(hidden, weight, labels, bias).square().sum(), asked)
    torch.testing.assert_close(got, expected)


def test_cuda_branch_on_fake_tensors():
    with FakeTensorMode():
        hidden = torch.empty(3, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(5, 64, device="cuda", dtype=torch.bfloat16)
        labels = torch.empty(3, device="cuda", dtype=torch.int64)
        y = public(hidden, weight, labels)
        assert (y.shape, y.dtype, y.device.type) == ((3,), torch.float32, "cuda")
        with pytest.raises(ValueError, match="dtype of hidden on CUDA must be one of torch.float"):
            public(hidden.double(), weight.double(), labels)


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        assert public(*make(dtype=dtype)).dtype == wide
        assert public(*make(t=0, dtype=dtype)).shape == (0,)


def test_bad_input():
    hidden, weight, labels, bias = make()
    with pytest.raises(TypeError, match="labels must be int32 or int64: got torch.float32"):
        public(hidden, weight, labels.float())
    with pytest.raises(ValueError, match=r"hidden must have 2 dimension\(s\): got 3"):
        public(hidden[None], weight, labels)
    with pytest.raises(ValueError, match=r"weight must have a last dimension of 8: got .*\(5, 7\)"):
        public(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"labels must have the shape \(t,\) = \(4,\): got \(3,\)"):
        public(hidden, weight, labels[:3])
    with pytest.raises(ValueError, match=r"bias must have the shape \(v,\) = \(5,\): got \(4,\)"):
        public(hidden, weight, labels, bias[:4])
    with pytest.raises(ValueError, match="weight must have the dtype of hidden: got torch.bfloat"):
        public(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match="labels must have the device of hidden: got meta and cpu"):
        public(hidden, weight, labels.to("meta"))
