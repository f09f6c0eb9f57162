"""The interpreter computes as the hardware does, so that what passes on it means something."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled, not interpreted"
)


@triton.jit
def _copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def _double(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x + x)


@triton.jit
def _matmul(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    offsets = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), input_precision=PRECISION)
    tl.store(c_ptr + offsets, c)


def copy_as(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _copy[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def test_float32_rounds_to_bfloat16_as_torch_does():
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7: to even, down; 1 + 3 * 2^-8 goes up.
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3e38, float("inf"), 0.0, -0.0])
    x = torch.cat([ties, torch.randn(1000), 1e-39 * torch.randn(20)])
    y = copy_as(x, torch.bfloat16)
    assert torch.equal(y.view(torch.int16), x.bfloat16().view(torch.int16))
    assert copy_as(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bfloat16_widens_exactly(dtype):
    x = torch.randn(100).bfloat16()
    assert torch.equal(copy_as(x, dtype), x.to(dtype))


def test_bfloat16_dot_multiplies_values():
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    _matmul[(1,)](a, b, c, 16, "tf32")
    torch.testing.assert_close(c, a.float() @ b.float())


def test_tf32_dot_rounds_its_operands():
    a, b, c = torch.full((16, 16), 1 + 2**-12), torch.eye(16), torch.empty(16, 16)
    _matmul[(1,)](a, b, c, 16, "tf32")
    assert torch.equal(c, torch.ones(16, 16))  # tf32 keeps 10 bits of the fraction
    _matmul[(1,)](a, b, c, 16, "ieee")
    assert torch.equal(c, a)


def test_bfloat16_arithmetic_is_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="widen bfloat16"):
        _double[(1,)](x, torch.empty_like(x), BLOCK=16)


def test_empty_holds_nan():
    assert torch.empty(7).isnan().all()
