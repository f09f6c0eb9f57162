"""syrk against the whole product in plain torch and half of it."""

import torch
from torch import Tensor

import fastalign as fa
from benchmarks import Benchmark, Inputs, Peer, Run

ALPHA, BETA = 0.5, -0.25


def syrk(x: Tensor, y: Tensor | None) -> Tensor:
    return fa.ops.syrk(x, y, alpha=ALPHA, beta=0.0 if y is None else BETA)


def whole(x: Tensor, y: Tensor | None) -> Tensor:
    """The product by torch.matmul in float32, or wider as `x` is; the result in its dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    c = ALPHA * torch.matmul(wide.mT, wide)
    if y is not None:
        c += BETA * y.to(dtype)
    return c.to(x.dtype)


def blas(x: Tensor, y: Tensor | None) -> Tensor:
    """The product, added to y in the same call, in the dtype of `x`: cuBLAS's on CUDA."""
    *batch, n, d = x.shape
    rows = x.view(-1, n, d)
    if y is None:
        return torch.bmm(rows.mT, rows).mul_(ALPHA).view(*batch, d, d)
    return torch.baddbmm(y.view(-1, d, d), rows.mT, rows, beta=BETA, alpha=ALPHA).view(*batch, d, d)


def bound(inputs: Inputs) -> Run:
    """n d^2 FLOPs a matrix, half of the whole product, in the dtype of `x`: of half the rows.

    Odd numbers of rows are halved downwards; the triangle's diagonal and `y` count nothing.
    """
    x = inputs[0]
    *batch, n, d = x.shape
    rows = torch.randn(torch.Size(batch).numel(), n // 2, d).to(x)
    out = rows.new_empty(len(rows), d, d)
    return lambda: torch.bmm(rows.mT, rows, out=out)


BENCHMARK = Benchmark(
    op="syrk",
    fastalign=syrk,
    eager=whole,
    bound=bound,
    peers={"blas": Peer("torch", lambda: blas)},
    differentiate=(),
)
