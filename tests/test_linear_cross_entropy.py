"""Weighted linear cross-entropy: numbers by hand, F.cross_entropy, borders, contracts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastalign.losses import linear_cross_entropy

LN3 = math.log(3)
SEEDS = st.integers(0, 2**31)


def problem(t: int, d: int, v: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden rows, head, labels (a third of them ignored) and weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(t, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, v, (t,), generator=generator)
    labels[torch.rand(t, generator=generator) < 1 / 3] = -100
    return hidden, weight, labels, torch.rand(t, dtype=torch.float64, generator=generator) + 0.1


def small() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (0, ln 3) and (0, ln 9): probabilities (1/4, 3/4) and (1/10, 9/10)."""
    hidden = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    weight = torch.tensor([[0.0], [LN3]], dtype=torch.float64)
    return hidden, weight, torch.tensor([1, 0]), torch.tensor([3.0, 1.0], dtype=torch.float64)


def test_values_by_hand():
    hidden, weight, labels, w = small()
    ce = [math.log(4 / 3), math.log(10)]
    assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(sum(ce) / 2)
    weighted = [3 * ce[0], ce[1]]
    for reduction, expected in (("mean", sum(weighted) / 4), ("sum", sum(weighted))):
        loss = linear_cross_entropy(hidden, weight, labels, token_weights=w, reduction=reduction)
        assert loss.item() == pytest.approx(expected)
    each = linear_cross_entropy(hidden, weight, labels, token_weights=w, reduction="none")
    assert each.tolist() == pytest.approx(weighted)


def test_gradients_by_hand():
    hidden, weight, labels, w = small()
    bias = torch.zeros(2, dtype=torch.float64)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    linear_cross_entropy(hidden, weight, labels, token_weights=w, bias=bias).backward()
    # dz = w / 4 (p - onehot): rows 3/4 (1/4, -1/4) and 1/4 (-9/10, 9/10).
    dz = torch.tensor([[3 / 16, -3 / 16], [-9 / 40, 9 / 40]], dtype=torch.float64)
    torch.testing.assert_close(hidden.grad, dz[:, 1:] * LN3)
    torch.testing.assert_close(weight.grad, (dz[0] + 2 * dz[1])[:, None])
    torch.testing.assert_close(bias.grad, dz.sum(0))


def test_bias_then_scale_then_softcap():
    # z = (0, 1) + (0, 1) = (0, 2); times 2 is (0, 4); capped at 2 it is (0, 2 tanh 2).
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [1.0]])
    options = {"bias": torch.tensor([0.0, 1.0]), "logit_scale": 2.0}
    labels = torch.tensor([0])
    scaled = linear_cross_entropy(hidden, weight, labels, **options)
    assert scaled.item() == pytest.approx(math.log1p(math.exp(4)), rel=1e-6)
    capped = linear_cross_entropy(hidden, weight, labels, softcap=2.0, **options)
    assert capped.item() == pytest.approx(math.log1p(math.exp(2 * math.tanh(2))), rel=1e-6)


def test_details():
    hidden, weight, labels, w = small()
    hidden, labels, w = (torch.cat([x, x[-1:]]) for x in (hidden, labels, w))
    labels[2] = -100
    hidden.requires_grad_()
    plain = linear_cross_entropy(hidden, weight, labels, token_weights=w)
    result = linear_cross_entropy(hidden, weight, labels, token_weights=w, details=True)
    loss, per_token, correct = result
    assert torch.equal(loss, plain) and loss.requires_grad
    assert per_token.tolist() == pytest.approx([math.log(4 / 3), math.log(10), 0.0])
    assert not per_token.requires_grad
    assert correct.dtype == torch.bool and correct.tolist() == [True, False, False]
    assert result._fields == ("loss", "per_token", "correct")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_take_no_part(reduction):
    hidden, weight, labels, w = problem(9, 4, 5)
    keep = labels != -100
    assert 0 < keep.sum() < 9
    expected = linear_cross_entropy(
        hidden[keep], weight, labels[keep], token_weights=w[keep], reduction=reduction
    )
    hidden, w = hidden.clone(), w.clone()
    hidden[~keep] = w[~keep] = float("nan")
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, token_weights=w, reduction=reduction)
    loss.sum().backward()
    if reduction == "none":
        assert torch.equal(loss[~keep], torch.zeros_like(loss[~keep]))
        loss = loss[keep]
    torch.testing.assert_close(loss, expected)
    assert weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[~keep], torch.zeros_like(hidden.grad[~keep]))


def test_ignore_index_may_be_a_token():
    hidden, weight, _, _ = problem(4, 3, 5)
    labels = torch.tensor([2, 0, 4, 0])
    expected = F.cross_entropy(hidden @ weight.T, labels, ignore_index=0)
    loss = linear_cross_entropy(hidden, weight, labels, ignore_index=0)
    torch.testing.assert_close(loss, expected)
    # With no logit above another the first token, 0, is the largest; ignored, it is never correct.
    result = linear_cross_entropy(hidden, 0 * weight, labels, ignore_index=0, details=True)
    assert not result.correct.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["all ignored", "no row", "weights of zero"])
def test_nothing_to_learn_gives_zero(case, reduction):
    hidden, weight, labels, w = problem(6, 3, 4)
    if case == "all ignored":
        labels = torch.full_like(labels, -100)
    elif case == "no row":
        hidden, labels, w = hidden[:0], labels[:0], w[:0]
    else:
        w = torch.zeros_like(w)
    hidden, weight = hidden.clone().requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, token_weights=w, reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_weights_are_constants():
    hidden, weight, labels, w = problem(5, 3, 4)
    w.requires_grad_()
    linear_cross_entropy(hidden.requires_grad_(), weight, labels, token_weights=w).backward()
    assert w.grad is None


@pytest.mark.parametrize("t", [1, 2, 5, 9])
@pytest.mark.parametrize(("d", "v"), [(1, 1), (1, 3), (3, 2), (4, 7), (7, 5)])
def test_gradcheck(t, d, v):
    hidden, weight, labels, w = problem(t, d, v)
    leaves = [x.requires_grad_() for x in (hidden, weight, torch.randn(v, dtype=torch.float64))]
    for options in ({}, {"reduction": "none"}, {"logit_scale": 0.5, "softcap": 1.5}):
        assert torch.autograd.gradcheck(
            lambda h, m, b, options=options: linear_cross_entropy(
                h, m, labels, bias=b, token_weights=w, **options
            ),
            leaves,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accumulates_in_float32(dtype):
    hidden, weight, labels, w = problem(33, 128, 97)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    loss = linear_cross_entropy(hidden, weight, labels.int(), token_weights=w)
    assert loss.dtype == torch.float32
    exact = linear_cross_entropy(hidden.double(), weight.double(), labels, token_weights=w)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    # A head in another type than the hidden states: the master weights of mixed precision.
    mixed = linear_cross_entropy(hidden, weight.float(), labels, token_weights=w)
    assert torch.equal(mixed, loss)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 12), st.integers(1, 6), st.integers(1, 9), SEEDS)
def test_is_cross_entropy(t, d, v, seed):
    hidden, weight, labels, w = problem(t, d, v, seed)
    bias = torch.randn(v, dtype=torch.float64)
    ce = F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none")
    each = linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none")
    torch.testing.assert_close(each, ce)
    if (labels != -100).any():
        mean = linear_cross_entropy(hidden, weight, labels, bias=bias)
        torch.testing.assert_close(mean, F.cross_entropy(hidden @ weight.T + bias, labels))
        weighted = linear_cross_entropy(hidden, weight, labels, bias=bias, token_weights=w)
        torch.testing.assert_close(weighted, (w * ce).sum() / w[labels != -100].sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(1e-3, 1e3), SEEDS)
def test_scale_of_the_weights_is_free(t, factor, seed):
    hidden, weight, labels, w = problem(t, 4, 6, seed)
    loss = linear_cross_entropy(hidden, weight, labels, token_weights=w)
    scaled = linear_cross_entropy(hidden, weight, labels, token_weights=w * factor)
    torch.testing.assert_close(scaled, loss, rtol=1e-9, atol=1e-12)


def test_bad_input():
    hidden, weight, labels, w = small()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\).*got 2 at row 1"):
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="ignore_index = -100: got -1 at row 0"):
        linear_cross_entropy(hidden, weight, torch.tensor([-1, 1]))
    with pytest.raises(TypeError, match="labels must be int32 or int64: got torch.float64"):
        linear_cross_entropy(hidden, weight, w)
    with pytest.raises(ValueError, match=r"labels must have the shape \(t,\) = \(2,\): got \(1,\)"):
        linear_cross_entropy(hidden, weight, labels[:1])
    with pytest.raises(ValueError, match="weight must have a last dimension of 1"):
        linear_cross_entropy(hidden, weight.expand(2, 3), labels)
    with pytest.raises(ValueError, match="hidden must have 2 dimension"):
        linear_cross_entropy(hidden[None], weight, labels)
    with pytest.raises(ValueError, match=r"token_weights must have the shape \(t,\) = \(2,\)"):
        linear_cross_entropy(hidden, weight, labels, token_weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"bias must have the shape \(v,\) = \(2,\)"):
        linear_cross_entropy(hidden, weight, labels, bias=torch.ones(3))
    with pytest.raises(ValueError, match="softcap must be above 0: got 0"):
        linear_cross_entropy(hidden, weight, labels, softcap=0.0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        linear_cross_entropy(hidden, weight, labels, reduction="max")
    with pytest.raises(ValueError, match="weight must have the device of hidden"):
        linear_cross_entropy(hidden, weight.to("meta"), labels)
