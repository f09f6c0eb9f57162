"""Products in place of decompositions: the accuracy that linalg states, in the arithmetic of CUDA.

Without a GPU its float16 is emulated: stored matrices are rounded to it, products sum in float32.
"""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign import linalg
from fastalign.linalg import _common, _lapack, _trace
from fastalign.reference import newton_schulz as ns

F64 = torch.float64
ROOTS = [linalg.sqrtm, linalg.sqrtm_inverse, linalg.polar, linalg.nuclear_norm]
NS = {"method": "newton_schulz"}


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Storage of float32 input as on CUDA."""
    monkeypatch.setattr(_trace, "graded_storage", lambda x: ns.STORAGE[torch.float16])


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64))[0]


def with_spectrum(values: Tensor, basis: Tensor | None = None) -> Tensor:
    q = orthogonal(len(values)) if basis is None else basis
    a = (q * values) @ q.T
    return (a + a.T) / 2


def power_law(d: int, condition: float) -> Tensor:
    return torch.arange(1, d + 1, dtype=F64) ** (-math.log(condition) / math.log(d))


def wishart(d: int, rows: int) -> Tensor:
    x = torch.randn(rows, d, dtype=F64)
    return x.T @ x / rows


def massive(a: Tensor) -> Tensor:
    """Four dimensions of up to a thousand times the variance of the others."""
    std = torch.ones(len(a), dtype=F64)
    std[[3, 17, 50, 90]] = torch.tensor([32.0, 18.0, 10.0, 7.0], dtype=F64)
    return std[:, None] * a * std


def pair(name: str, d: int) -> tuple[Tensor, Tensor]:
    kind, _, number = name.partition("-")
    values = power_law(d, float(number or 1))
    if kind == "wishart":
        return wishart(d, 2 * d), wishart(d, 3 * d)
    if kind == "exponential":
        values = torch.logspace(0, -math.log10(float(number)), d, dtype=F64)
    if kind == "anisotropic":
        return with_spectrum(values), with_spectrum(values.sqrt())
    if kind == "shared":  # text's directions are nearly vision's
        q = orthogonal(d)
        near = torch.linalg.qr(q + 0.02 * torch.randn(d, d, dtype=F64))[0]
        return with_spectrum(values, q), with_spectrum(values, near)
    if kind == "rank":
        values = power_law(d, 1e4) * (torch.arange(d) < d // 3)
    a, b = with_spectrum(values), with_spectrum(values)
    return (massive(a), massive(b)) if kind == "massive" else (a, b)


def exact_trace(a: Tensor, b: Tensor) -> float:
    found = (torch.linalg.eigh(m) for m in (a, b))
    f, g = (q * w.clamp_min(0).sqrt() for w, q in found)
    return torch.linalg.svdvals(f.T @ g).sum().item()


def relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y).norm() / y.norm()).item()


# Traces


@pytest.mark.parametrize(
    "name, d, bound",
    [
        *((name, 128, 2e-5) for name in ("wishart", "power-1e4", "power-1e6", "massive-1e4")),
        *((name, 128, 2e-5) for name in ("exponential-1e4", "shared-1e4", "shared-1e6")),
        *((f"{kind}-1e8", 128, 5e-5) for kind in ("power", "exponential", "anisotropic", "shared")),
        *((f"{kind}-1e10", 128, 5e-5) for kind in ("power", "exponential")),
        *(("power-1e6", 512, 2e-5), ("massive-1e4", 512, 2e-5), ("power-1e10", 512, 5e-5)),
    ],
)
@pytest.mark.filterwarnings("ignore:trace_sqrtm_product")
def test_trace_in_float16(name, d, bound, as_on_cuda):
    a, b = pair(name, d)
    exact = exact_trace(a, b)
    found = linalg.trace_sqrtm_product(a.float(), b.float(), **NS, certificate=True)
    assert found.value.dtype == torch.float32
    assert abs(found.value.item() / exact - 1) <= bound
    # What the iteration left out, and besides only rounding, to second order.
    assert 0 <= found.bound.item() <= 1e-5 * exact
    assert found.value.item() + found.bound.item() >= exact * (1 - 2e-5)


@pytest.mark.parametrize("name", ["wishart", "power-1e6", "massive-1e4", "anisotropic-1e8"])
def test_trace_in_wider_dtypes(name):
    a, b = pair(name, 128)
    exact = exact_trace(a, b)
    assert linalg.trace_sqrtm_product(a, b, **NS).item() == pytest.approx(exact, rel=1e-8)
    single = linalg.trace_sqrtm_product(a.float(), b.float(), **NS).item()
    assert single == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("d", [128, 512])
def test_singular_covariances_warn(d, as_on_cuda):
    a, b = pair("rank", d)
    with pytest.warns(UserWarning, match="singular to the rounding of its dtype") as record:
        trace = linalg.trace_sqrtm_product(a.float(), b.float(), **NS)
    assert record[0].filename == __file__
    # What is added to the diagonal is extrapolated away: alone it raises the trace by 1e-4.
    assert abs(trace.item() / exact_trace(a, b) - 1) <= 5e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regular = [m.float() for m in pair("power-1e6", d)]
        alone = linalg.trace_sqrtm_product(*regular, **NS)
    batch = [torch.stack([x, y.float()]) for x, y in zip(regular, (a, b), strict=True)]
    with pytest.warns(UserWarning, match="singular"):
        both = linalg.trace_sqrtm_product(*batch, **NS)
    torch.testing.assert_close(both, torch.stack([alone, trace]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [(100, 140), (140, 100), (300, 120)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_rows_as_factors(rows, scale):
    # Fewer rows than the 200 dimensions on one side at least; three dimensions may be massive.
    factors = []
    for n in rows:
        x = torch.randn(n, 200, dtype=F64) * power_law(200, 1e6).sqrt() @ orthogonal(200)
        x[:, :3] *= scale
        factors.append((x - x.mean(0)).T / (n - 1) ** 0.5)
    f, g = factors
    exact = exact_trace(f @ f.T, g @ g.T)
    assert linalg.trace_of_factors(f, g).item() == pytest.approx(exact, rel=1e-6)
    found = linalg.trace_of_factors(f.float(), g.float(), **NS, certificate=True)
    assert abs(found.value.item() / exact - 1) <= 5e-5
    assert found.bound.item() <= 1e-5 * exact
    assert linalg.trace_of_factors(f, g, method="eigh", certificate=True).bound.item() == 0


def test_trace_of_factors_by_hand():
    # f^T g = [[3, 0], [0, 8], [0, 0]] whatever the third dimension of the rows holds apart.
    f = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    g = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    for method in ("eigh", "newton_schulz"):
        assert linalg.trace_of_factors(f, g, method=method).item() == pytest.approx(11.0)
        assert linalg.trace_of_factors(f[:, :0], g, method=method).item() == 0


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-5), (torch.bfloat16, 1e-3)])
def test_storage_of_sixteen_bits(dtype, bound):
    a, b = pair("power-1e4", 128)
    m = torch.linalg.cholesky(a).T @ torch.linalg.cholesky(b)
    exact = torch.linalg.svdvals(m).sum().item()
    error = abs(linalg.newton_schulz_nuclear_norm(m, dtype=dtype).item() / exact - 1)
    assert error <= bound
    assert dtype == torch.float16 or error > 2e-5  # why CUDA takes float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_input_of_sixteen_bits(dtype):
    a, b = wishart(64, 256).to(dtype), wishart(64, 256).to(dtype)
    exact = exact_trace(a.double(), b.double())
    assert linalg.trace_sqrtm_product(a, b, **NS).item() == pytest.approx(exact, rel=2e-5)
    for function in (linalg.sqrtm, linalg.sqrtm_inverse, linalg.nuclear_norm):
        expected = function(a.double())
        assert relative(function(a, **NS), expected) <= 1e-4


def test_iteration_of_kernels_in_torch(monkeypatch):
    # The products that CUDA takes, where torch has them without a GPU: in float32 and float64.
    x, p = torch.randn(2, 3, 6, 4, dtype=F64), torch.randn(2, 3, 4, 5, dtype=F64)
    torch.testing.assert_close(_common._baddbmm(x, p, alpha=3.0), 3 * x @ p)
    square = p @ p.mT
    expected = 0.5 * x @ square + 2 * x
    torch.testing.assert_close(_common._baddbmm(x, square, alpha=0.5, beta=2.0), expected)
    kernels = ns.Products(_common.syrk, _common._baddbmm)
    monkeypatch.setattr(_trace, "products", lambda x: kernels)
    a, b = pair("power-1e4", 96)
    trace = linalg.trace_sqrtm_product(a, b, **NS)
    assert trace.item() == pytest.approx(exact_trace(a, b), rel=1e-10)


# Gradients


@pytest.mark.parametrize("function", ROOTS)
def test_gradcheck(function):
    a = (torch.stack([wishart(4, 9), wishart(4, 9)]) + 0.1 * torch.eye(4)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, **NS), (a,))
    assert torch.autograd.gradcheck(function, (a,))


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_gradcheck_of_traces(method):
    a, b = ((wishart(4, 9) + 0.1 * torch.eye(4)).requires_grad_() for _ in "ab")
    assert torch.autograd.gradcheck(
        lambda x, y: linalg.trace_sqrtm_product(x, y, method=method), (a, b)
    )
    f, g = (torch.randn(2, 6, r, dtype=F64, requires_grad=True) for r in (3, 4))
    assert torch.autograd.gradcheck(
        lambda x, y: linalg.trace_of_factors(x, y, method=method), (f, g)
    )


@pytest.mark.parametrize(
    "name, bound", [("wishart", 2e-3), ("power-1e4", 1e-2), ("power-1e6", 3e-2)]
)
def test_trace_gradient_in_float16(name, bound, as_on_cuda):
    a, b = (m.requires_grad_() for m in pair(name, 128))
    expected = torch.autograd.grad(linalg.trace_sqrtm_product(a, b), (a, b))
    a, b = (m.detach().float().requires_grad_() for m in (a, b))
    found = torch.autograd.grad(linalg.trace_sqrtm_product(a, b, **NS), (a, b))
    for got, true in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, true) <= bound


@pytest.mark.parametrize(
    "condition, forward, backward", [(1e2, 2e-6, 2e-6), (1e4, 1e-5, 5e-5), (1e6, 1e-4, 3e-3)]
)
def test_roots_in_float32(condition, forward, backward):
    values, q = power_law(128, condition), orthogonal(128)
    s = values.sqrt()
    g = torch.randn(128, 128, dtype=F64)
    inner = q.T @ (g + g.T) @ q / 2
    a = with_spectrum(values, q).float().requires_grad_()
    root = linalg.sqrtm(a, **NS)
    assert relative(root.detach(), (q * s) @ q.T) <= forward
    sums = s[:, None] + s
    (da,) = torch.autograd.grad(root, a, g.float())
    assert relative(da, q @ (inner / sums) @ q.T) <= backward
    for method in ("newton_schulz", "eigh"):
        inverse = linalg.sqrtm_inverse(a, method=method)
        assert relative(inverse.detach(), (q / s) @ q.T) <= backward
        (da,) = torch.autograd.grad(inverse, a, g.float())
        assert relative(da, q @ (-inner / (sums * s * s[:, None])) @ q.T) <= 3 * backward


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
@pytest.mark.parametrize("function", ROOTS)
def test_transforms(function, method):
    def loss(x: Tensor) -> Tensor:
        return function(x, method=method).square().sum()

    a = torch.stack([wishart(4, 9), wishart(4, 9)])
    mapped = torch.func.vmap(lambda x: function(x, method=method), in_dims=1)(a.movedim(0, 1))
    torch.testing.assert_close(mapped, function(a, method=method))
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(a), expected)


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_traces_under_vmap(method):
    def trace(x: Tensor, y: Tensor) -> Tensor:
        return linalg.trace_sqrtm_product(x, y, method=method)

    a, b = torch.stack([wishart(4, 9), wishart(4, 9)]), wishart(4, 9)
    found = torch.func.vmap(torch.func.grad(trace, argnums=(0, 1)), in_dims=(0, None))(a, b)
    x, y = a.clone().requires_grad_(), b.expand(2, 4, 4).clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(trace(x, y).sum(), (x, y)))


def second_derivatives() -> list[Callable[[Tensor], Tensor]]:
    pairs = (linalg.trace_sqrtm_product, linalg.trace_of_factors)
    return [*ROOTS, *(lambda x, f=f, **options: f(x, x.mT.clone(), **options) for f in pairs)]


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
@pytest.mark.parametrize("function", second_derivatives())
def test_second_derivatives_are_refused(function, method):
    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: function(y, method=method).sum())(x).sum()

    a = wishart(4, 9)
    with pytest.raises(RuntimeError, match="can be taken once: .* fastalign.reference.psd"):
        torch.func.grad(gradient)(a)
    a.requires_grad_()
    value = function(a, method=method).sum()
    (da,) = torch.autograd.grad(value, a, create_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        da.sum().backward()


# Hard input


def test_sqrtm_inverse_by_hand():
    # Eigenvalues 4 and 16 with eigenvectors (1, -1) and (1, 1): (1/4 +- 1/2) / 2.
    a = torch.tensor([[10.0, 6.0], [6.0, 10.0]], dtype=F64)
    expected = torch.tensor([[0.375, -0.125], [-0.125, 0.375]], dtype=F64)
    for method in ("eigh", "newton_schulz"):
        torch.testing.assert_close(linalg.sqrtm_inverse(a, method=method), expected)


@pytest.mark.parametrize("method", ["eigh", "newton_schulz"])
def test_singular_input(method):
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    batch = torch.stack([torch.eye(2), singular, torch.tensor([1.0, -0.5]).diag()])
    inverse = linalg.sqrtm_inverse(batch, method=method)
    assert inverse.isnan().flatten(1).any(1).tolist() == [False, True, True]
    torch.testing.assert_close(inverse[0], torch.eye(2))
    # Half of it is the projection on (1, 1), whose root is itself.
    root = linalg.sqrtm(batch, method=method)
    torch.testing.assert_close(root[1], singular / 2**0.5, rtol=1e-4, atol=1e-4)
    assert root.isnan().flatten(1).any(1).tolist() == [False, False, True]


def test_rank_deficient_covariance_has_no_inverse():
    rows = torch.randn(40, 64)
    cov = rows.T @ rows / 40
    for method in ("eigh", "newton_schulz"):
        assert linalg.sqrtm_inverse(cov, method=method).isnan().any()
        assert linalg.sqrtm_inverse(cov + 1e-3 * torch.eye(64), method=method).isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("function", ROOTS)
def test_no_finite_value_comes_of_nan(function, value):
    m = torch.eye(3)
    m[0, 0] = value
    try:
        result = function(m, **NS)
    except torch.linalg.LinAlgError:
        return
    assert not result.isfinite().all()


def test_traces_of_zero_nan_and_indefinite_matrices():
    batch = torch.stack([torch.eye(2), torch.eye(2), torch.zeros(2, 2), torch.eye(2)])
    batch[0, 0, 0], batch[1, 1, 1] = torch.nan, -0.5
    trace = linalg.trace_sqrtm_product(batch, torch.eye(2).expand(4, 2, 2), **NS)
    assert trace[:2].isnan().all()
    assert trace[2:].tolist() == pytest.approx([0.0, 2.0])
    dead = torch.tensor([4.0, 0.0]).diag()  # a dimension that never varies
    assert linalg.trace_sqrtm_product(dead, torch.eye(2), **NS).item() == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 5), (0, 4), (1, 1)])
def test_polar_of_any_shape(shape):
    m = torch.randn(shape)
    factor = linalg.newton_schulz_polar(m)
    assert factor.shape == m.shape
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    torch.testing.assert_close(factor, u @ vh, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
def test_polar_in_sixteen_bits(dtype, atol):
    m = torch.randn(40, 24)
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    factor = linalg.newton_schulz_polar(m, dtype=dtype)
    assert factor.dtype == torch.float32
    assert (factor - u @ vh).abs().max() <= atol
    singular = torch.linalg.svdvals(factor)
    assert (singular - 1).abs().max() <= atol
    # bfloat16 input is kept in float16, where it errs by its own rounding and no more.
    narrow = m.bfloat16()
    u, _, vh = torch.linalg.svd(narrow.float(), full_matrices=False)
    assert (linalg.newton_schulz_polar(narrow) - u @ vh).abs().max() <= 5e-3


def test_few_steps_need_a_higher_end():
    m = torch.randn(2, 24, 96)
    for lower, near in ((1e-2, True), (1e-6, False)):
        factor = linalg.newton_schulz_polar(m, steps=5, lower=lower)
        assert ((torch.linalg.svdvals(factor) - 1).abs().max() < 1e-3) == near
    with pytest.raises(ValueError, match="lower must be above 0 and below 1: got 1"):
        linalg.newton_schulz_polar(m, lower=1)


def test_autocast_changes_nothing():
    a, b = wishart(32, 99).float(), wishart(32, 99).float()
    expected = linalg.trace_sqrtm_product(a, b, **NS), linalg.sqrtm(a, **NS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linalg.trace_sqrtm_product(a, b, **NS), linalg.sqrtm(a, **NS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bad_options():
    with pytest.raises(ValueError, match="method must be one of 'auto', 'newton_schulz', 'eigh'"):
        linalg.sqrtm(torch.eye(2), method="svd")
    with pytest.raises(ValueError, match=r"dtype must be one of None, .*: got torch.int32"):
        linalg.newton_schulz_polar(torch.eye(2), dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got shapes \(3, 2\) and \(4, 2\)"):
        linalg.trace_of_factors(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="g must have the dtype of f"):
        linalg.trace_of_factors(torch.ones(3, 2), torch.ones(3, 2).double())


# LAPACK through scipy


@pytest.mark.parametrize("name", ["wishart", "power-1e4", "power-1e6", "massive-1e4", "rank"])
def test_lapack(name, monkeypatch):
    a, b = pair(name, 128)
    batch = [torch.stack([m, m / 4]).float() for m in (a, b)]
    exact = torch.tensor([1.0, 0.25], dtype=F64) * exact_trace(a, b)
    bound = 1e-5 if name == "rank" else 5e-7
    found = linalg.trace_sqrtm_product(*batch)
    assert (found / exact - 1).abs().max() <= bound
    used = _lapack.trace_root(*batch)
    assert (used is None) == (name == "rank")
    monkeypatch.setattr(_lapack, "_installed", lambda: False)
    torch.testing.assert_close(linalg.trace_sqrtm_product(*batch), found, rtol=bound, atol=0)


def test_lapack_leaves_its_input_and_takes_the_symmetric_part():
    a, b = (wishart(80, 200).float() for _ in "ab")
    skew = torch.randn(80, 80).triu(1)
    crooked, before = a + skew - skew.T, a.clone()
    expected = linalg.trace_sqrtm_product(a, b)
    torch.testing.assert_close(linalg.trace_sqrtm_product(crooked, b), expected)
    assert torch.equal(a, before)


def test_lapack_leaves_indefinite_and_broken_matrices_to_torch():
    a, b = wishart(80, 200).float(), wishart(80, 200).float()
    assert linalg.trace_sqrtm_product(a, b - 2 * torch.eye(80)).isnan()
    a[0, 0] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        linalg.trace_sqrtm_product(a, b)


def test_gradients_at_full_rank_are_those_of_eigenvectors():
    # Triangular solves against the gradient along the range, of the same matrix.
    a, b = (m.requires_grad_() for m in pair("power-1e4", 80))
    da, db = torch.autograd.grad(linalg.trace_sqrtm_product(a, b), (a, b))
    w, q = torch.linalg.eigh(a.detach())
    root, inverse = (q * w.sqrt()) @ q.T, (q / w.sqrt()) @ q.T
    inner = linalg.sqrtm(root @ b.detach() @ root)
    torch.testing.assert_close(da, inverse @ inner @ inverse / 2, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((a * da).sum(), (b * db).sum())


# Commands


def test_benchmarks_run(harness, capsys, tmp_path):
    from benchmarks import linalg as timed
    from benchmarks import quintics

    file = tmp_path / "rows.json"
    assert timed.main(["--quick", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "scipy sqrtm" in shown and file.is_file()
    assert quintics.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13
    assert lines[1].split()[1:4] == ["7.537600343", "-21.293639348", "15.488842501"]
    assert float(lines[-1].split()[4]) >= 1 - 1e-8
