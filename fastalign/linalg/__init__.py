r"""Linear algebra of covariance matrices: roots, polar factors and nuclear norms, with gradients.

All are batched over leading dimensions, run on CPU and CUDA and depend on nothing else in this
package: they serve whitening, Frechet distances and orthogonalised updates as well.

Two methods. "eigh" decomposes in float64 whatever comes in, so a result is as accurate as its
input: rounding a matrix to float32 leaves traces a relative error of about 1e-7, `sqrtm` one of
about condition^(1/2) * 1e-7 and its gradient condition * 1e-7. "newton_schulz" iterates matrix
products: in float64 for float64, else in float32; on CUDA `trace_sqrtm_product`, and `polar` of
16-bit input, in float16 with float32 sums. "auto" takes products on CUDA for float32 and narrower,
and decompositions everywhere else. Beyond a condition number of 1e6, roots and factors need
float64.

Results are float32, or float64 for float64 input; a gradient has the dtype of its input and can be
taken once. A matrix that holds NaN or inf gives NaN, or raises torch.linalg.LinAlgError where the
decomposition finds it.
"""

from fastalign.linalg._common import Certified
from fastalign.linalg._norms import (
    newton_schulz_nuclear_norm,
    newton_schulz_polar,
    nuclear_norm,
    polar,
    trace_of_factors,
)
from fastalign.linalg._roots import sqrtm, sqrtm_inverse
from fastalign.linalg._trace import trace_sqrtm_product

__all__ = [
    "Certified",
    "newton_schulz_nuclear_norm",
    "newton_schulz_polar",
    "nuclear_norm",
    "polar",
    "sqrtm",
    "sqrtm_inverse",
    "trace_of_factors",
    "trace_sqrtm_product",
]
