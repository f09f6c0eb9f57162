"""Mutual information: known values, the bound, invariances, contracts. Ranks: test_two_ranks.py."""

import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import mutual_information


def correlated(m: int, d: int, rho: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal x and y, entry by entry correlated by rho: I = -d/2 log(1 - rho^2)."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, m, d, dtype=torch.float64, generator=generator)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def test_infonce_by_hand():
    # S = I: each row's cross-entropy is log(e + 1) - 1, so the bound is log 2 - log(1 + 1/e).
    identity = torch.eye(2)
    bound = mutual_information(identity, identity, temperature=1.0)
    assert bound.item() == pytest.approx(math.log(2) - math.log(1 + math.exp(-1)), rel=1e-6)
    # Every row is like every other: nothing is known of the pairing.
    same = torch.ones(5, 3)
    assert mutual_information(same, same).item() == pytest.approx(0.0, abs=1e-6)
    # Pairs opposite and the others alike: the bound is log 2 - log(1 + e^2).
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    bound = mutual_information(x, -x, temperature=1.0)
    assert bound.item() == pytest.approx(math.log(2) - math.log(1 + math.exp(2)), rel=1e-6)


def test_infonce_averages_both_directions():
    x, y = correlated(6, 4, 0.5)
    torch.testing.assert_close(mutual_information(x, y), mutual_information(y, x))


@pytest.mark.parametrize("m", [1, 2, 7, 129])
def test_infonce_is_at_most_log_m(m):
    x, _ = correlated(m, 32, 0.0)
    bound = mutual_information(x, x).item()
    assert bound <= math.log(m) + 1e-9
    # Distinct rows paired with themselves: the bound is all but reached.
    assert bound == pytest.approx(math.log(m), abs=0.05)


@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
def test_grows_with_the_correlation_and_stays_below_the_truth(estimator):
    d, values = 4, []
    for rho in (0.0, 0.5, 0.9, 0.99):
        x, y = correlated(2000, d, rho)
        truth = -d / 2 * math.log(1 - rho**2)
        values.append(mutual_information(x, y, estimator=estimator, temperature=0.2).item())
        assert values[-1] <= truth + 0.02
    assert values == sorted(values) and values[-1] > values[0] + 1


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8])
def test_gaussian_is_the_closed_form(rho):
    x, y = correlated(40_000, 3, rho)
    value = mutual_information(x, y, estimator="gaussian").item()
    assert value == pytest.approx(-1.5 * math.log(1 - rho**2), abs=0.015)


def test_gaussian_by_hand():
    # Centred sums: xy = 3 + 1 + 1 + 3 = 8, xx = 4, yy = 20; the shrinkage scales the correlation.
    x = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    y = torch.tensor([[3.0], [1.0], [-1.0], [-3.0]])
    for shrinkage in (1e-3, 0.5):
        r = (1 - shrinkage) * 8 / math.sqrt(80)
        value = mutual_information(x, y, estimator="gaussian", shrinkage=shrinkage)
        assert value.item() == pytest.approx(-0.5 * math.log(1 - r**2), rel=1e-5)


def test_gaussian_ignores_scale_shift_and_constants():
    x, y = correlated(50, 3, 0.7)
    value = mutual_information(x, y, estimator="gaussian")
    moved = mutual_information(x * torch.tensor([1e3, 1.0, 1e-3]) - 5, y + 9, estimator="gaussian")
    torch.testing.assert_close(moved, value)
    constant = torch.full((50, 2), 1 / 3, dtype=torch.float64)  # its mean rounds
    wider = mutual_information(
        torch.cat([x, constant], 1), torch.cat([constant, y], 1), estimator="gaussian"
    )
    torch.testing.assert_close(wider, value)
    narrow = mutual_information(x, y[:, :2], estimator="gaussian")
    assert 0 < narrow < value


@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
def test_one_row_tells_nothing(estimator):
    x, y = correlated(1, 4, 0.9)
    x.requires_grad_()
    value = mutual_information(x, y, estimator=estimator)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12) and x.grad.isfinite().all()


def test_zero_rows_are_finite():
    x = torch.zeros(3, 4, requires_grad=True)
    for estimator in ("infonce", "gaussian"):
        value = mutual_information(x, torch.zeros(3, 4), estimator=estimator)
        (grad,) = torch.autograd.grad(value, x)
        assert value.item() == pytest.approx(0.0, abs=1e-5)
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
@pytest.mark.parametrize("m", [2, 3, 7])
@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_gradcheck(estimator, m, d):
    x, y = (z.requires_grad_() for z in correlated(m, d, 0.5))
    assert torch.autograd.gradcheck(
        lambda x, y: mutual_information(x, y, estimator=estimator, temperature=0.5, shrinkage=0.1),
        (x, y),
    )


@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
def test_types(estimator):
    x, y = (z.bfloat16() for z in correlated(64, 8, 0.9))
    value = mutual_information(x, y, estimator=estimator)
    assert value.dtype == torch.float32
    exact = mutual_information(x.double(), y.double(), estimator=estimator)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_gather_without_ranks_changes_nothing():
    x, y = correlated(5, 3, 0.5)
    assert torch.equal(mutual_information(x, y, gather=True), mutual_information(x, y))


def test_bad_input():
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="x and y must have at least one row: got none"):
        mutual_information(x[:0], x[:0])
    with pytest.raises(
        ValueError, match=r"y must have the shape \(m, d\) = \(4, 3\): got \(2, 3\)"
    ):
        mutual_information(x, x[:2])
    with pytest.raises(ValueError, match="y must have a last dimension of 3"):
        mutual_information(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="estimator must be one of 'infonce', 'gaussian'"):
        mutual_information(x, x, estimator="mine")
    with pytest.raises(ValueError, match="temperature must be above 0: got 0"):
        mutual_information(x, x, temperature=0.0)
    with pytest.raises(ValueError, match=r"shrinkage must lie in \(0, 1\): got 1.0"):
        mutual_information(x, x, estimator="gaussian", shrinkage=1.0)
    with pytest.raises(TypeError, match="y must have a floating-point dtype"):
        mutual_information(x, x.long())
