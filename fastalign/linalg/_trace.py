"""The trace of the root of a product of covariances."""

from __future__ import annotations

import sys
import warnings
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.linalg import _lapack
from fastalign.linalg._common import (
    Batched,
    Certified,
    Method,
    check_square,
    graded_storage,
    gradient,
    iterates,
    products,
)
from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_same
from fastalign.reference import newton_schulz as ns
from fastalign.reference import psd

# From this share of dimensions on that only the jitter keeps apart, its bias can be seen.
_OPEN = 0.01
_SINGULAR = (
    "trace_sqrtm_product: a covariance is singular to the rounding of its dtype, and the trace is "
    "extrapolated from what is added to its diagonal, with an error of up to 1e-3 of it: give rows "
    'to trace_of_factors, or method="eigh"'
)


class _Decomposed(Batched):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        trace = None
        if _lapack.usable(a):
            trace = _lapack.trace_root(a, b)
        elif not torch.compiler.is_compiling() and (factors := psd.cholesky_pair(a, b)):
            trace = psd.singular_value_sum(factors[0].mT @ factors[1])
        if trace is None:  # a singular matrix has factors of eigenvectors only
            return psd.trace_sqrtm_product(a, b)
        return trace.to(psd.result_dtype(a))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return gradient(_decomposed_grad, *ctx.saved_tensors, grad)


def _decomposed_grad(a: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    da, db = psd.trace_sqrtm_product_grad(a, b)
    grad = grad[..., None, None]
    return (grad * da).to(a.dtype), (grad * db).to(b.dtype)


def _trace_from_factors(
    factors: psd.Factors, storage: ns.Storage, products: ns.Products = ns.PRODUCTS
) -> ns.NuclearNorm:
    """The trace of the root by the iteration, less what the jitter adds to all variances."""
    m = ns.split_product(factors.a, factors.b, storage, products)
    norm = ns.nuclear_norm(m, storage, products)
    shrink = (1 + factors.jitter).prod(-1).rsqrt()
    return ns.NuclearNorm(norm.value * shrink, norm.bound * shrink, norm.x)


class _Iterated(Batched):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        factors, storage = psd.ordered_cholesky(a, b), graded_storage(a)
        value, bound, x = _trace_from_factors(factors, storage, products(a))
        singular = (factors.open > _OPEN).any(-1)
        if bool(singular.any()):
            # Above the public function, and above apply, a frame of its own in torch before 2.15.
            within = sys._getframe(1).f_globals["__name__"].startswith("torch.")
            warnings.warn(_SINGULAR, UserWarning, stacklevel=4 if within else 3)
            # The bias is proportional to the jitter: twice of it tells how much there is of it.
            twice = psd.ordered_cholesky(a[singular], b[singular], 2 * factors.jitter[singular])
            biased = _trace_from_factors(twice, storage, products(a)).value
            value[singular] = 2 * value[singular] - biased
        value, bound = (t.to(psd.result_dtype(a)) for t in (value, bound))
        return value, bound, factors.a, factors.b, factors.order, x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(*inputs, *others[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        return gradient(_iterated_grad, *ctx.saved_tensors, grad)


def _iterated_grad(
    a: Tensor, b: Tensor, fa: Tensor, fb: Tensor, order: Tensor, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    u = ns.refined_factor(x, ns.STORAGE[x.dtype], products(x))
    found = psd.triangular_trace_grad(fa, fb, u.to(fa.dtype))
    inverse = order.argsort(dim=-1)
    scale = grad[..., None, None]
    da, db = (scale * psd.permute(g, inverse) for g in found)
    return da.to(a.dtype), db.to(b.dtype)


@overload
def trace_sqrtm_product(
    a: Tensor, b: Tensor, *, method: Method = ..., certificate: Literal[False] = ...
) -> Tensor: ...
@overload
def trace_sqrtm_product(
    a: Tensor, b: Tensor, *, method: Method = ..., certificate: Literal[True]
) -> Certified: ...
def trace_sqrtm_product(
    a: Tensor, b: Tensor, *, method: Method = "auto", certificate: bool = False
) -> Tensor | Certified:
    r"""$\mathrm{Tr}((a b)^{1/2})$ of positive semi-definite matrices: the Frechet distance's root.

    Computed as $\|F_a^\top F_b\|_*$ with $F F^\top$ the argument. The gradient is $P_a / 2$ with
    $P_a = F_a^{-\top} U F_b^\top$, U the polar factor of $F_a^\top F_b$.

    "eigh" has a relative error of at most 5e-7 for float32 matrices of a condition number up to
    1e8, and 1e-5 beyond, which is their rounding. At a singular argument its gradient is the one
    along the argument's range; out of the range the slope is infinite, and the gradient 0.
    Eigenvalues below d eps (of float64) of the largest count as 0 for this.

    "newton_schulz" factors after adding 1e-8 of each variance (1e-14 in float64), and up to 1e-4
    (1e-10, 0.1 in 16 bits) where that is needed. Its relative error is at most 2e-5 up to condition
    numbers of 1e6 and 5e-5 up to 1e10. For a singular argument the trace is extrapolated from two
    such additions, with an error of at most 1e-3, and a warning says so. It waits for the device a
    few times. Gradients from float16 products err by 1e-3 (well-conditioned) to 2e-2 (condition
    1e6).

    Args:
        a: (..., d, d), any floating dtype; only the symmetric part counts. Negative eigenvalues
            of the size of rounding, d eps |a|, count as 0.
        b: The shape, dtype and device of `a`.
        method: "auto", "newton_schulz" or "eigh": see the module.
        certificate: Also return a bound of what the iteration left out.

    Returns:
        (...), float32 or float64; NaN where a matrix is not semi-definite. Differentiable once.
        With `certificate`, a named tuple `(value, bound)`.

    Raises:
        TypeError: An argument is not of a floating-point dtype.
        ValueError: They are not square, differ in shape, dtype or device, or `method` is unknown.
    """
    check_square(a=a, b=b)
    check_same(a=a, b=b)
    with no_autocast(a):
        if iterates(method, a):
            value, bound, *_ = _Iterated.apply(a, b)  # type: ignore[no-untyped-call]
        else:
            value = _Decomposed.apply(a, b)  # type: ignore[no-untyped-call]
            bound = torch.zeros_like(value, requires_grad=False)
    return Certified(value, bound) if certificate else value
