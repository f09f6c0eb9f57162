"""Shift alignment: numbers worked out by hand, the gradient at rest, contracts."""

import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import shift_align

ORIGINAL = torch.tensor([[3.0, 4.0]], dtype=torch.float64)  # length 5: rests below 5e-3


def rows(m: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, dtype=torch.float64, generator=generator)


def moved(*displacement: float) -> Tensor:
    return ORIGINAL + torch.tensor([displacement], dtype=torch.float64)


def test_cosine_by_hand():
    direction = torch.tensor([1.0, 1.0])
    for displacement, cosine in (((1, 0), math.sqrt(0.5)), ((-2, -2), -1.0), ((1, -1), 0.0)):
        loss = shift_align(ORIGINAL, moved(*displacement), direction)
        assert loss.item() == pytest.approx(1 - cosine)


def test_mse_by_hand():
    # ((1 - 1)^2 + (0 - 3)^2) / 2
    loss = shift_align(ORIGINAL, moved(1, 0), torch.tensor([1.0, 3.0]), kind="mse")
    assert loss.item() == pytest.approx(4.5)


def test_reductions_and_directions():
    original, shifted, direction = rows(4, 3), rows(4, 3, 1), rows(4, 3, 2)
    for kind in ("cosine", "mse"):
        each = shift_align(original, shifted, direction, kind=kind, reduction="none")
        assert each.shape == (4,)
        for reduction, expected in (("mean", each.mean()), ("sum", each.sum())):
            loss = shift_align(original, shifted, direction, kind=kind, reduction=reduction)
            torch.testing.assert_close(loss, expected)
        common = shift_align(original, shifted, direction[0], kind=kind)
        spread = direction[:1].expand(4, 3)
        torch.testing.assert_close(common, shift_align(original, shifted, spread, kind=kind))
    expected = 1 - torch.nn.functional.cosine_similarity(shifted - original, direction)
    torch.testing.assert_close(
        shift_align(original, shifted, direction, reduction="none"), expected
    )


def test_at_rest_the_gradient_points_along_the_direction():
    # Loss 1, and gradient -d^ / (1e-3 * 5) = -(0.6, 0.8) * 200.
    shifted = ORIGINAL.clone().requires_grad_()
    loss = shift_align(ORIGINAL, shifted, torch.tensor([6.0, 8.0]))
    loss.backward()
    assert loss.item() == 1.0
    torch.testing.assert_close(shifted.grad, torch.tensor([[-120.0, -160.0]], dtype=torch.float64))


def test_a_small_displacement_counts_for_less():
    # |u| = 2.5e-3 is half of the 5e-3 below which the row rests; beyond it the cosine is exact.
    direction = torch.tensor([1.0, 0.0])
    assert shift_align(ORIGINAL, moved(2.5e-3, 0), direction).item() == pytest.approx(0.5)
    assert shift_align(ORIGINAL, moved(5e-3, 0), direction).item() == pytest.approx(0.0, abs=1e-9)
    assert shift_align(ORIGINAL, moved(0.1, 0), direction).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("zero", ["shift", "direction", "all"])
def test_zeros_are_finite(zero):
    original, direction = rows(3, 4), rows(3, 4, 2)
    if zero == "all":
        original = torch.zeros_like(original)
    if zero != "shift":
        direction = torch.zeros_like(direction)
    shifted = (original.clone() if zero != "direction" else rows(3, 4, 1)).requires_grad_()
    original.requires_grad_()
    loss = shift_align(original, shifted, direction, reduction="none")
    loss.sum().backward()
    assert torch.equal(loss, torch.ones_like(loss))
    assert shifted.grad.isfinite().all() and original.grad.isfinite().all()
    assert bool(shifted.grad.any()) == (zero == "shift")


def test_training_leaves_the_start():
    original = rows(8, 6).float()
    direction = rows(1, 6, 1)[0].float()
    shift = torch.zeros(8, 6, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        loss = shift_align(original, original + shift, direction)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_gradcheck(kind, m, d):
    original, shifted, direction = rows(m, d), rows(m, d, 1), rows(m, d, 2)
    resting = original + 1e-4 * rows(m, d, 3)
    for end in (shifted, resting):
        assert torch.autograd.gradcheck(
            lambda h, s: shift_align(h, s, direction, kind=kind, reduction="none"),
            (original.requires_grad_(), end.detach().requires_grad_()),
            eps=1e-8,
            atol=1e-4,
        )


def test_no_row_gives_zero():
    shifted = torch.zeros(0, 3, requires_grad=True)
    loss = shift_align(torch.zeros(0, 3), shifted, torch.ones(3))
    loss.backward()
    assert loss.item() == 0.0 and shifted.grad.shape == (0, 3)


def test_no_gradient_to_the_direction():
    direction = torch.ones(3, requires_grad=True)
    shift_align(rows(2, 3), rows(2, 3, 1).requires_grad_(), direction).backward()
    assert direction.grad is None


def test_types_may_differ():
    original, shifted = rows(5, 16).bfloat16(), rows(5, 16, 1).bfloat16()
    direction = rows(1, 16, 2)[0].float()
    loss = shift_align(original, shifted, direction)
    assert loss.dtype == torch.float32
    exact = shift_align(original.double(), shifted.double(), direction)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_bad_input():
    h = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"shifted must have the shape of original: got \(1, 3\)"):
        shift_align(h, h[:1], h[0])
    with pytest.raises(ValueError, match=r"direction must have a last dimension of 3"):
        shift_align(h, h, torch.zeros(4))
    with pytest.raises(ValueError, match=r"direction must have the shape \(d,\) or \(m, d\)"):
        shift_align(h, h, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="kind must be one of 'cosine', 'mse': got 'l1'"):
        shift_align(h, h, h, kind="l1")
    with pytest.raises(ValueError, match="reduction must be one of"):
        shift_align(h, h, h, reduction="max")
    with pytest.raises(ValueError, match="original must have 2 dimension"):
        shift_align(h[0], h[0], h[0])
    with pytest.raises(TypeError, match="direction must be a torch.Tensor: got list"):
        shift_align(h, h, [1.0, 0.0, 0.0])
