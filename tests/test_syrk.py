"""The symmetric product: kernel and panels against the reference, numbers by hand, contracts."""

import importlib

import pytest
import torch
from fastalign_kernels import syrk as kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastalign.ops import syrk
from fastalign.ops.syrk import Syrk, SyrkPortable
from fastalign.reference import syrk as reference
from fastalign.testing import assert_as_accurate, cases, value_and_grads
from fastalign.testing.cases import DTYPES

op = importlib.import_module("fastalign.ops.syrk")
both_paths = pytest.mark.parametrize("function", [Syrk, SyrkPortable], ids=["kernel", "portable"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def symmetric(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    y = normal(*shape, seed=seed)
    return (y + y.mT).to(dtype)


def check(function, x: Tensor, y: Tensor | None, alpha=0.75, beta=-1.5, out_dtype=None):
    """Value and gradients as accurate as the reference's, and symmetric to the last bit."""
    out_dtype = out_dtype or x.dtype

    def plain(x, y, dtype=None):
        return reference(x, y, alpha, beta, dtype)

    found = value_and_grads(lambda x, y: function.apply(x, y, alpha, beta, out_dtype), (x, y))
    eager = value_and_grads(lambda x, y: plain(x, y, out_dtype), (x, y))
    exact = value_and_grads(plain, (x, y), torch.float64)
    for result in zip(found, eager, exact, strict=True):
        assert_as_accurate(*result)
    for c in (found[0], *found[2:]):
        assert torch.equal(c, c.mT)
    return found[0]


@both_paths
@pytest.mark.parametrize("case", cases("syrk"), ids=str)
def test_cases(case, function, device):
    check(function, *case.inputs(device))


@both_paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_into_float32(function, dtype, device):
    x = normal(130, 70, dtype=dtype).to(device)
    for y_dtype in (dtype, torch.float32):
        y = symmetric(70, 70, dtype=y_dtype).to(device)
        assert check(function, x, y, out_dtype=torch.float32).dtype == torch.float32
    # Half of a unit of float32, not of the products' type, an addition.
    c = function.apply(x, None, 1.0, 0.0, torch.float32).double()
    exact = x.double().mT @ x.double()
    bound = 130 * torch.finfo(torch.float32).eps * (x.double().abs().mT @ x.double().abs())
    assert ((c - exact).abs() <= bound).all()


# -- by hand ---------------------------------------------------------------------------------------


@both_paths
def test_by_hand(function, device):
    # 1 + 9 + 25 = 35, 2 + 12 + 30 = 44, 4 + 16 + 36 = 56; halved, and twice y added.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    y = torch.tensor([[1.0, -1.0], [-1.0, 3.0]], device=device)
    c = function.apply(x, None, 1.0, 0.0, torch.float32)
    assert c.tolist() == [[35.0, 44.0], [44.0, 56.0]]
    c = function.apply(x, y, 0.5, 2.0, torch.float32)
    assert c.tolist() == [[19.5, 20.0], [20.0, 34.0]]


def test_gradient_by_hand():
    # With G = [[1, 1], [0, 0]]: dX = 3 X (G + G^T) = 3 (1, 2) [[2, 1], [1, 0]] = (12, 3), and dY
    # is 5 times the symmetric part of G.
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    y = torch.zeros(2, 2, requires_grad=True)
    syrk(x, y, alpha=3.0, beta=5.0)[0].sum().backward()
    assert x.grad.tolist() == [[12.0, 3.0]]
    assert y.grad.tolist() == [[5.0, 2.5], [2.5, 0.0]]


def test_public_function_by_hand():
    # A = [[0, 1], [1, 2]] squared is [[1, 2], [2, 5]]; -2 A + 3 A^2.
    a = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
    assert syrk(a, a, alpha=3.0, beta=-2.0).tolist() == [[3.0, 4.0], [4.0, 11.0]]
    assert syrk(a).tolist() == [[1.0, 2.0], [2.0, 5.0]]
    assert syrk(a.double()).dtype == torch.float64
    assert syrk(a.half(), out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy, interpreting
@both_paths
def test_scaled_float16_leaves_its_range_only_inside(function, device):
    """65 * 100^2 is beyond float16, which ends at 65504; a power of two brings it back exactly."""
    x = torch.full((65, 3), 100.0, dtype=torch.float16, device=device)
    assert function.apply(x, None, 1.0, 0.0, torch.float16).isinf().all()
    assert (function.apply(x, None, 1.0, 0.0, torch.float32) == 650_000).all()
    assert (function.apply(x, None, 2.0**-6, 0.0, torch.float16) == 650_000 / 64).all()


def test_no_rows(device):
    y = symmetric(3, 3)
    assert torch.equal(syrk(torch.zeros(0, 3), y, beta=2.0), 2 * y)
    assert torch.equal(syrk(torch.zeros(2, 0, 3)), torch.zeros(2, 3, 3))
    assert syrk(torch.zeros(4, 0)).shape == (0, 0)
    assert Syrk.apply(torch.zeros(4, 0, device=device), None, 1.0, 0.0, torch.float32).numel() == 0


# -- how the work is cut ---------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("width", [640, 700])
def test_every_tile_is_written_once(group, width, monkeypatch, device):
    """10 or 11 tiles a side; memory that no program writes holds NaN."""
    monkeypatch.setattr(kernels, "_GROUP", group)
    x = normal(2, 1, width).to(device)
    c = kernels.syrk_fwd(x, None, 1.0, 0.0, torch.float32)
    assert torch.equal(c, x.mT * x)  # one product an entry: exact, and the same in every order


def test_squares_are_found_up_to_a_million_columns():
    """The kernel's formula in torch's float32, which rounds its square root the same way."""
    square = torch.arange(2**21 - 1)
    column = ((torch.sqrt(8.0 * square.float() + 1.0) - 1.0) / 2.0).long()
    row = square - column * (column + 1) // 2
    assert (row >= 0).all() and (row <= column).all()


@every_dtype
@pytest.mark.parametrize("width", [144, 150])
def test_tiles_of_128(dtype, width, monkeypatch, device):
    monkeypatch.setattr(kernels, "_block", lambda *_: 128)
    x, y = normal(2, 70, width, dtype=dtype), symmetric(2, width, width, dtype=dtype)
    check(Syrk, x.to(device), y.to(device))


def test_large_work_gets_large_tiles():
    # 19 tiles of 128 a side are 190 on and above the diagonal, 20 are 210.
    assert (
        kernels._block(1, 19 * 128, 2, True) == 64 and kernels._block(1, 20 * 128, 2, True) == 128
    )
    # 576 has 5 a side, 15 in all: 13 matrices have 195, 14 have 210.
    assert kernels._block(13, 576, 2, True) == 64 and kernels._block(14, 576, 2, True) == 128
    assert kernels._block(1, 4096, 4, True) == 64 and kernels._block(1, 4095, 2, False) == 64
    assert kernels._config(64, 2, True)["BLOCK_K"] == 64
    assert kernels._config(64, 2, False)["BLOCK_K"] == 32


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides")
@every_dtype
@pytest.mark.parametrize("block", [64, 128])
def test_descriptors(dtype, block, monkeypatch):
    """The path of sm_90: rows beyond a matrix are zeros, not those of the next matrix."""
    monkeypatch.setattr(kernels, "_use_descriptor", lambda *_: True)
    monkeypatch.setattr(kernels, "_block", lambda *_: block)
    for rows, width in ((70, 136), (64, 64), (3, 8)):
        x, y = normal(3, rows, width, dtype=dtype), symmetric(3, width, width, dtype=dtype)
        check(Syrk, x, y)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides")
def test_descriptors_are_for_aligned_rows_of_a_gpu():
    class OnGpu:
        """What the choice looks at, of a tensor that is not there."""

        device = torch.device("cuda")
        is_cuda = True

        def __init__(self, width: int, pointer: int, rows: int = 4) -> None:
            self.shape, self.data_ptr = (rows, width), lambda: pointer

        def numel(self) -> int:
            return self.shape[0] * self.shape[1]

        def element_size(self) -> int:
            return 2

    def chosen(capability: int, *arguments: int) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
            return kernels._use_descriptor(OnGpu(*arguments))

    assert chosen(9, 64, 256) and chosen(10, 8, 256)
    assert not chosen(8, 64, 256) and not chosen(12, 64, 256)
    assert not chosen(9, 65, 256) and not chosen(9, 64, 258) and not chosen(9, 64, 256, 0)
    assert not kernels._use_descriptor(torch.ones(4, 64))


@every_dtype
def test_panels(dtype, monkeypatch):
    monkeypatch.setattr(op, "PANEL", 16)
    for width in (15, 16, 33, 50):
        x, y = normal(2, 9, width, dtype=dtype), symmetric(2, width, width, dtype=dtype)
        check(SyrkPortable, x, y)


def test_half_the_products_on_the_cpu():
    """Panels of 128 columns down to the diagonal: n d (d + 128) FLOPs, of 2 n d^2."""
    with FlopCounterMode(display=False) as counter:
        syrk(torch.ones(10, 1024))
    assert counter.get_total_flops() == 10 * 1024 * (1024 + 128)


def test_the_bound_is_half_the_product(harness):
    benchmark = importlib.import_module("benchmarks.syrk").BENCHMARK
    inputs = (normal(3, 10, 16), symmetric(3, 16, 16))
    flops = []
    for run in (benchmark.bound(inputs), lambda: benchmark.eager(*inputs)):
        with FlopCounterMode(display=False) as counter:
            run()
        flops.append(counter.get_total_flops())
    assert flops == [3 * 10 * 16**2, 2 * 3 * 10 * 16**2]
    for peer in benchmark.peers.values():
        for y in (None, inputs[1]):
            found = peer.load()(inputs[0], y)
            torch.testing.assert_close(found, benchmark.eager(inputs[0], y))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler counts the CPU's memory")
def test_only_the_result_is_allocated(harness):
    torch.use_deterministic_algorithms(False)
    x, y = normal(64, 128), symmetric(128, 128)
    run = lambda: kernels.syrk_fwd(x, y, 1.0, 1.0, torch.float32)
    run()
    assert harness._peak_mib(run, "cpu") == 4 * 128**2 / 2**20


# -- properties ------------------------------------------------------------------------------------


@both_paths
def test_the_lower_triangle_of_y_does_not_count(function, device):
    x, y = normal(70, 130).to(device), symmetric(130, 130).to(device)
    below = torch.ones_like(y, dtype=torch.bool).tril(-1)
    found = function.apply(x, y.masked_fill(below, torch.nan), 1.0, 2.0, torch.float32)
    assert torch.equal(found, function.apply(x, y, 1.0, 2.0, torch.float32))


@both_paths
@every_dtype
def test_a_batch_is_each_matrix_by_itself(function, dtype, device):
    x = normal(2, 3, 70, 66, dtype=dtype).to(device)
    y = symmetric(2, 3, 66, 66, dtype=dtype).to(device)
    x[1, 0, 3, 5] = torch.nan
    found = function.apply(x, y, 1.0, 2.0, dtype)
    for i in range(2):
        for j in range(3):
            alone = function.apply(x[i, j], y[i, j], 1.0, 2.0, dtype)
            torch.testing.assert_close(found[i, j], alone, equal_nan=True)
            assert alone.isnan().any() == (i == 1 and j == 0)


@both_paths
def test_strided_inputs(function, device):
    x = normal(66, 2, 70).to(device).permute(1, 2, 0)
    y = symmetric(66, 66).to(device).mT.expand(2, 66, 66)
    found = function.apply(x, y, 1.0, 2.0, torch.float32)
    expected = function.apply(x.contiguous(), y.contiguous(), 1.0, 2.0, torch.float32)
    torch.testing.assert_close(found, expected)


def test_pieces_add_up(device):
    """Sums of many rows: pieces of them into one float32 matrix."""
    x = normal(300, 24, dtype=torch.bfloat16).to(device)
    total = None
    for rows in x.split(128):
        total = syrk(rows, total, beta=0.0 if total is None else 1.0, out_dtype=torch.float32)
    torch.testing.assert_close(total, syrk(x, out_dtype=torch.float32))


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 3), (1, 1), (0, 2)])
def test_gradcheck(shape):
    x, m = normal(*shape).double(), normal(*shape[:-2], shape[-1], shape[-1], seed=2).double()

    def product(x: Tensor, m: Tensor) -> Tensor:
        return syrk(x, (m + m.mT) / 2, alpha=0.7, beta=-1.3)

    assert torch.autograd.gradcheck(product, (x.requires_grad_(), m.requires_grad_()))
    assert torch.autograd.gradcheck(lambda x: syrk(x, alpha=0.7), x)


def test_only_what_is_asked_has_a_gradient():
    x, y = normal(3, 4), symmetric(4, 4).requires_grad_()
    syrk(x, y, beta=1.0).sum().backward()
    assert x.grad is None and torch.equal(y.grad, torch.ones(4, 4))
    assert not syrk(x, y, beta=0.0).requires_grad


@pytest.mark.filterwarnings("error")  # no slow fall-back
def test_vmap():
    x, y = normal(3, 5, 4), symmetric(3, 4, 4)
    for in_dims in ((0, 0), (0, None), (None, 0)):
        arguments = [a if dim == 0 else a[0] for a, dim in zip((x, y), in_dims, strict=True)]
        found = torch.func.vmap(lambda x, y: syrk(x, y, beta=2.0), in_dims)(*arguments)
        wide = [
            a if dim == 0 else a.expand(3, -1, -1)
            for a, dim in zip(arguments, in_dims, strict=True)
        ]
        torch.testing.assert_close(found, syrk(*wide, beta=2.0))


def test_y_is_ignored_where_beta_is_zero():
    x, y = normal(3, 4), torch.full((4, 4), torch.nan)
    assert torch.equal(syrk(x, y), syrk(x))


# -- contracts -------------------------------------------------------------------------------------


def test_cuda_takes_the_kernel_and_float64_torch(monkeypatch):
    taken = []

    def panels(x: Tensor, *_) -> Tensor:
        taken.append(x.dtype)
        return x.new_empty(2, 4, 4)

    monkeypatch.setattr(op, "_panels", panels)
    with FakeTensorMode():
        for dtype in (*DTYPES, torch.float64):
            c = syrk(torch.empty(2, 5, 4, dtype=dtype, device="cuda"))
            assert (c.shape, c.dtype, c.device.type) == ((2, 4, 4), dtype, "cuda")
        assert taken == [torch.float64]
        with pytest.raises(ValueError, match="the dtype of x on CUDA must be one of torch.float16"):
            syrk(torch.empty(5, 4, dtype=torch.float8_e4m3fn, device="cuda"))


def test_bad_input():
    x, y = torch.zeros(2, 5, 4), torch.zeros(2, 4, 4)
    with pytest.raises(TypeError, match="x must have a floating-point dtype: got torch.int64"):
        syrk(x.long())
    with pytest.raises(TypeError, match="y must have a floating-point dtype: got torch.int64"):
        syrk(x, y.long(), beta=1.0)
    with pytest.raises(ValueError, match=r"x must be \(..., n, d\): got shape \(4,\)"):
        syrk(x[0, 0])
    with pytest.raises(ValueError, match=r"y must have the shape .* = \(2, 4, 4\): got \(4, 4\)"):
        syrk(x, y[0], beta=1.0)
    with pytest.raises(ValueError, match="y must have the device of x: got meta and cpu"):
        syrk(x, y.to("meta"), beta=1.0)
    with pytest.raises(ValueError, match="dtype of y, that of x or of the result, must be one of"):
        syrk(x, y.double(), beta=1.0)
    with pytest.raises(ValueError, match="beta must be 0 without y: got 2.0; pass y"):
        syrk(x, beta=2.0)
    with pytest.raises(ValueError, match="out_dtype for x in torch.float32 must be one of"):
        syrk(x, out_dtype=torch.float16)
