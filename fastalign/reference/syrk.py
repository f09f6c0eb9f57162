"""C = alpha X^T X + beta Y with Y symmetric: BLAS's syrk, as Newton-Schulz iterations need it."""

import torch
from torch import Tensor

from fastalign.reference._rows import wide


def syrk(
    x: Tensor,
    y: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(..., n, d), symmetric (..., d, d) or None -> (..., d, d) in `out_dtype`, that of x if None.

    C is made symmetric to the last bit, which the product need not be.
    """
    (rows,) = wide(x)
    c = alpha * (rows.mT @ rows)
    if y is not None:
        c = c + beta * y.to(c.dtype)
    return ((c + c.mT) / 2).to(out_dtype or x.dtype)
