import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastalign import linalg
from fastalign.reference.newton_schulz import quintic_schedule

FUNCTIONS = [linalg.sqrtm, linalg.nuclear_norm, linalg.polar]


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def with_spectrum(values: Tensor) -> Tensor:
    q = orthogonal(len(values))
    a = (q * values) @ q.T
    return (a + a.T) / 2


def power_law(d: int, condition: float) -> Tensor:
    i = torch.arange(1, d + 1, dtype=torch.float64)
    return i ** (-math.log(condition) / math.log(d))


def covariance(d: int, *batch: int) -> Tensor:
    x = torch.randn(*batch, d, 2 * d, dtype=torch.float64)
    return x @ x.mT / x.shape[-1]


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


# Values by hand


def test_sqrtm_by_hand():
    # Eigenvalues 1 and 3 with eigenvectors (1, -1) and (1, 1): (sqrt 3 +- 1) / 2.
    root = linalg.sqrtm(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    expected = torch.tensor([[1.3660254037844386, 0.3660254037844386]] * 2, dtype=torch.float64)
    expected[1] = expected[0].flip(0)
    torch.testing.assert_close(root, expected, rtol=1e-14, atol=0)


def test_nuclear_norm_by_hand():
    m = torch.tensor([[[3.0, 0.0], [0.0, -4.0]], [[0.0, 2.0], [0.0, 0.0]]])
    assert linalg.nuclear_norm(m).tolist() == pytest.approx([7.0, 2.0])


def test_polar_by_hand():
    # [[0, -2], [3, 0]] = rotation by 90 degrees times diag(3, 2).
    factor = linalg.polar(torch.tensor([[0.0, -2.0], [3.0, 0.0]]))
    torch.testing.assert_close(factor, torch.tensor([[0.0, -1.0], [1.0, 0.0]]))


def test_trace_sqrtm_product_by_hand():
    # sqrt(1 * 9) + sqrt(4 * 16) = 11
    a, b = torch.tensor([1.0, 4.0]).diag(), torch.tensor([9.0, 16.0]).diag()
    assert linalg.trace_sqrtm_product(a, b).item() == pytest.approx(11.0)


@pytest.mark.parametrize("d", [1, 2, 7, 33])
def test_agrees_with_scipy(d):
    a, b = covariance(d), covariance(d)
    root = torch.from_numpy(np.asarray(scipy.linalg.sqrtm(a.numpy())))
    torch.testing.assert_close(linalg.sqrtm(a), root, rtol=1e-9, atol=1e-11)
    trace = np.trace(scipy.linalg.sqrtm((a @ b).numpy())).real
    assert linalg.trace_sqrtm_product(a, b).item() == pytest.approx(trace, rel=1e-8)
    u, _ = scipy.linalg.polar((a @ b).numpy())
    torch.testing.assert_close(linalg.polar(a @ b), torch.from_numpy(u), rtol=1e-8, atol=1e-8)


# Gradients


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 5), (2, 4, 4), (2, 1, 3, 3), (0, 3, 3)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function, shape):
    m = torch.randn(shape, dtype=torch.float64)
    if function is linalg.sqrtm:
        m = m @ m.mT + 0.1 * torch.eye(shape[-1])
    assert torch.autograd.gradcheck(function, m.requires_grad_())


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 4, 4)])
def test_trace_sqrtm_product_gradcheck(shape):
    a, b = (covariance(shape[-1], *shape[:-2]) + 0.1 * torch.eye(shape[-1]) for _ in "ab")
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(linalg.trace_sqrtm_product, (a, b))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_with_repeated_values(function):
    m = with_spectrum(torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0], dtype=torch.float64))
    assert torch.autograd.gradcheck(function, m.requires_grad_())
    assert torch.autograd.gradcheck(function, torch.eye(3, dtype=torch.float64).requires_grad_())


def test_trace_sqrtm_product_gradcheck_with_repeated_values():
    a = with_spectrum(torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64))
    inputs = a.clone().requires_grad_(), a.clone().requires_grad_()
    assert torch.autograd.gradcheck(linalg.trace_sqrtm_product, inputs)


def test_sqrtm_gradient_solves_its_equation():
    a = covariance(6).requires_grad_()
    root = linalg.sqrtm(a)
    g = torch.randn(6, 6, dtype=torch.float64)
    (x,) = torch.autograd.grad(root, a, g)
    torch.testing.assert_close(root.detach() @ x + x @ root.detach(), (g + g.T) / 2)


def test_singular_input_has_the_gradient_of_its_range():
    # T = sqrt(a_1 b_1) + sqrt(a_2 b_2) at a = (4, 0), b = (9, 1): dT/da_1 = sqrt(9 / 4) / 2 and
    # dT/db_1 = sqrt(4 / 9) / 2; dT/da_2 is infinite and comes as 0, dT/db_2 = 0.
    a = torch.tensor([4.0, 0.0], dtype=torch.float64).diag().requires_grad_()
    b = torch.tensor([9.0, 1.0], dtype=torch.float64).diag().requires_grad_()
    trace = linalg.trace_sqrtm_product(a, b)
    assert trace.item() == pytest.approx(6.0)
    da, db = torch.autograd.grad(trace, (a, b))
    torch.testing.assert_close(da, torch.tensor([0.75, 0.0], dtype=torch.float64).diag())
    torch.testing.assert_close(db, torch.tensor([1 / 3, 0.0], dtype=torch.float64).diag())


def test_singular_roots_have_finite_gradients():
    # dS_11 / da_11 = 1 / (2 sqrt 4); the null direction with itself gets 0.
    a = torch.tensor([4.0, 0.0], dtype=torch.float64).diag().requires_grad_()
    (da,) = torch.autograd.grad(linalg.sqrtm(a).diagonal().sum(), a)
    torch.testing.assert_close(da, torch.tensor([0.25, 0.0], dtype=torch.float64).diag())
    zero = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    for function in FUNCTIONS:
        (dzero,) = torch.autograd.grad(function(zero).sum(), zero)
        assert dzero.eq(0).all()
    assert linalg.nuclear_norm(zero).item() == 0


def test_function_transforms():
    a, b = covariance(4, 3), covariance(4, 3)
    for function in FUNCTIONS:
        torch.testing.assert_close(torch.func.vmap(function)(a), function(a))
    grad = torch.func.vmap(torch.func.grad(linalg.trace_sqrtm_product))(a, b)
    a = a.requires_grad_()
    (expected,) = torch.autograd.grad(linalg.trace_sqrtm_product(a, b).sum(), a)
    torch.testing.assert_close(grad, expected)


# Accuracy in float32


@pytest.mark.parametrize(
    "condition, forward, backward", [(1e2, 2e-6, 2e-6), (1e4, 1e-5, 5e-5), (1e6, 1e-4, 3e-3)]
)
def test_sqrtm_accuracy_of_float32(condition, forward, backward):
    values = power_law(96, condition)
    q = orthogonal(96)
    a = ((q * values) @ q.T).float().requires_grad_()
    g = torch.randn(96, 96, dtype=torch.float64)
    g = (g + g.T) / 2
    root = linalg.sqrtm(a)
    assert relative(root.detach(), (q * values.sqrt()) @ q.T) <= forward
    sums = values.sqrt()[:, None] + values.sqrt()
    (da,) = torch.autograd.grad(root, a, g.float())
    assert da.dtype == torch.float32
    assert relative(da, q @ ((q.T @ g @ q) / sums) @ q.T) <= backward


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_trace_accuracy_of_float32(condition):
    a, b = (with_spectrum(power_law(96, condition)) for _ in "ab")
    exact = linalg.trace_sqrtm_product(a, b)
    assert relative(linalg.trace_sqrtm_product(a.float(), b.float()), exact) <= 5e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes(function, dtype):
    m = covariance(3).to(dtype).requires_grad_()
    y = function(m)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(y, function(m.detach().double()).to(y.dtype))
    y.sum().backward()
    assert m.grad is not None and m.grad.dtype == dtype


# Properties


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]))
def test_properties(d, seed, scale):
    torch.manual_seed(seed)
    a, b = scale * covariance(d), covariance(d)
    root = linalg.sqrtm(a)
    torch.testing.assert_close(root @ root, a, rtol=1e-10, atol=1e-12 * scale)
    torch.testing.assert_close(root, root.T, rtol=0, atol=0)
    trace = linalg.trace_sqrtm_product(a, b)
    assert trace >= 0
    torch.testing.assert_close(trace, linalg.trace_sqrtm_product(b, a), rtol=1e-10, atol=0)
    assert trace <= (a.trace() + b.trace()) / 2 * (1 + 1e-10)
    torch.testing.assert_close(linalg.trace_sqrtm_product(a, a), a.trace(), rtol=1e-9, atol=0)
    # Matrices that commute share eigenvectors: Tr((a a^2)^(1/2)) = sum of eigenvalues^(3/2).
    expected = torch.linalg.eigvalsh(a).clamp_min(0).pow(1.5).sum()
    torch.testing.assert_close(linalg.trace_sqrtm_product(a, a @ a), expected, rtol=1e-7, atol=0)
    m = torch.randn(d, d, dtype=torch.float64)
    u = linalg.polar(m)
    torch.testing.assert_close(u.T @ u, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close((u * m).sum(), linalg.nuclear_norm(m))


# Newton-Schulz


def test_minimax_coefficients():
    # Published to nine digits for a lower end of 1e-6 and float16; steps 2 to 8 are the same.
    table = (
        [(7.537600343, -21.293639348, 15.488842501)]
        + [(4.144563348, -3.539866797, 0.778479786)] * 7
        + [
            (3.214152554, -2.449034549, 0.519370913),
            (2.194874964, -1.564261519, 0.402993138),
            (1.879335722, -1.251147561, 0.371873589),
            (1.871262092, -1.242533534, 0.371271445),
        ]
    )
    schedule = torch.tensor(quintic_schedule(12), dtype=torch.float64)
    torch.testing.assert_close(
        schedule, torch.tensor(table, dtype=torch.float64), rtol=0, atol=1e-6
    )


def spectra(name: str, d: int) -> tuple[Tensor, Tensor]:
    if name == "wishart":
        return covariance(d), covariance(d)
    if name.startswith("power"):
        values = power_law(d, float(name[5:]))
        return with_spectrum(values), with_spectrum(values)
    if name == "rank":
        values = power_law(d, 1e4) * (torch.arange(d) < d // 3)
        return with_spectrum(values), with_spectrum(values)
    # A few dimensions with a thousand times the variance of the others.
    std = torch.ones(d, dtype=torch.float64)
    std[[3, 17, 50]] = torch.tensor([32.0, 10.0, 5.0], dtype=torch.float64)
    a, b = (with_spectrum(power_law(d, 1e4)) for _ in "ab")
    return std[:, None] * a * std, std[:, None] * b * std


@pytest.mark.parametrize(
    "name", ["wishart", "power1e4", "power1e6", "massive", "power1e10", "rank"]
)
def test_newton_schulz_trace(name):
    a, b = spectra(name, 128)
    m = linalg.sqrtm(a) @ linalg.sqrtm(b)
    exact = torch.linalg.svdvals(m).sum()
    bound = 1e-6 if name in ("wishart", "power1e4", "power1e6", "massive") else 1e-5
    assert abs(linalg.newton_schulz_nuclear_norm(m) / exact - 1) <= bound
    assert abs(linalg.newton_schulz_nuclear_norm(m.float()) / exact - 1) <= 5e-6 + bound


def test_newton_schulz_of_hard_matrices():
    assert linalg.newton_schulz_nuclear_norm(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]
    assert linalg.newton_schulz_nuclear_norm(torch.zeros(4, 0)).item() == 0.0
    row = torch.tensor([[3.0, 4.0, 12.0]])
    for m in (row, row.T, 1e-200 * row.double(), 1e200 * row.double()):
        scale = m.abs().max().item() / 12
        assert linalg.newton_schulz_nuclear_norm(m).item() == pytest.approx(13 * scale, rel=1e-6)
    batch = torch.stack([torch.randn(6, 6), torch.ones(6, 6), torch.zeros(6, 6)])
    expected = linalg.nuclear_norm(batch.double())
    torch.testing.assert_close(
        linalg.newton_schulz_nuclear_norm(batch), expected, rtol=1e-5, atol=1e-12
    )
    assert linalg.newton_schulz_nuclear_norm(batch * torch.nan).isnan().all()


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 5e-6), (torch.float64, 1e-7)])
def test_newton_schulz_polar(dtype, atol):
    m = orthogonal(32) @ with_spectrum(power_law(32, 1e3))
    expected = linalg.polar(m)
    factor = linalg.newton_schulz_polar(torch.stack([m, -m]).to(dtype))
    assert factor.dtype == dtype
    # float32 rounds m by 6e-8 |m|, which turns its least singular directions by 1e3 times that.
    tolerance = atol if dtype == torch.float64 else 1e-4
    assert (factor - torch.stack([expected, -expected])).abs().max() <= tolerance
    assert (factor.mT @ factor - torch.eye(32)).abs().max() <= atol


@pytest.mark.parametrize("repeats", [0, 5])
def test_certificate_covers_every_singular_value(repeats):
    # x (1 - z) <= 0.225 (1 - y^2) / prod(a) wherever the steps leave y below 1.
    x = torch.logspace(-14, 0, 200_001, dtype=torch.float64)
    y, slope = x, 1.0
    for a, b, c in quintic_schedule(repeats=repeats):
        y, slope = a * y + b * y**3 + c * y**5, slope * a
    z = (3 * y - y**3) / 2
    short = y < 1 - 1e-6
    assert ((x * (1 - z) * slope)[short] <= 0.225 * (1 - y * y)[short]).all()
    assert ((z[~short] - 1).abs() <= 1e-11).all()


# Bad input


@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_matrices(function):
    with pytest.raises(ValueError, match=r"\(\.\.\., d, d\) with d >= 1: got shape \(2, 3\)"):
        function(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        function(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got shape \(0, 0\)"):
        function(torch.zeros(0, 0))
    with pytest.raises(TypeError, match=r"floating-point dtype: got torch.int64"):
        function(torch.zeros(2, 2, dtype=torch.int64))


def test_bad_pairs():
    with pytest.raises(ValueError, match=r"b must have the shape of a: got \(3, 3\) and \(2, 2\)"):
        linalg.trace_sqrtm_product(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"dtype of a: got torch.float64 and torch.float32"):
        linalg.trace_sqrtm_product(torch.eye(2), torch.eye(2).double())
    with pytest.raises(ValueError, match="rtol must be above 0: got 0"):
        linalg.newton_schulz_nuclear_norm(torch.eye(2), rtol=0)
    with pytest.raises(ValueError, match="steps must be above 0: got 0"):
        linalg.newton_schulz_polar(torch.eye(2), steps=0)


@pytest.mark.parametrize("d", [1, 2, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_finite_value_comes_of_nan(function, value, d):
    m = torch.eye(d)
    m[0, 0] = value
    try:
        result = function(m)
    except torch.linalg.LinAlgError:
        return
    assert not result.isfinite().all()


def test_indefinite_matrices_give_nan_and_spare_the_others():
    batch = torch.stack([torch.eye(2), torch.tensor([1.0, -0.5]).diag()])
    assert linalg.sqrtm(batch).isnan().all((-2, -1)).tolist() == [False, True]
    trace = linalg.trace_sqrtm_product(batch, torch.eye(2).expand(2, 2, 2))
    assert trace.isnan().tolist() == [False, True]
    # What rounding leaves of a null eigenvalue is no such case.
    assert linalg.sqrtm(torch.tensor([1.0, -1e-8]).diag()).isfinite().all()


def test_inputs_are_not_written():
    a, b = covariance(4), covariance(4)
    copies = a.clone(), b.clone()
    for function in (*FUNCTIONS, linalg.newton_schulz_polar, linalg.newton_schulz_nuclear_norm):
        function(a)
    linalg.trace_sqrtm_product(a, b)
    assert torch.equal(a, copies[0]) and torch.equal(b, copies[1])
