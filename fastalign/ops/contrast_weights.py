"""CAL's token weights: checks and the choice of the path. They are constants: no gradient."""

import torch
from torch import Tensor

from fastalign.ops._check import check_cu_seqlens, check_dim, check_floating, check_one_of
from fastalign.ops._path import on_triton
from fastalign.reference.contrast_weights import contrast_weights as reference


def fused(
    delta: Tensor,
    cu_seqlens: Tensor | None = None,
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
) -> Tensor:
    """`contrast_weights` of checked arguments, by the kernel; without offsets it is one sample."""
    from fastalign_kernels.contrast_weights import contrast_weights_fwd

    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(delta.device, non_blocking=True)
    weights: Tensor = contrast_weights_fwd(delta.detach(), cu_seqlens, *clamp, window)
    return weights


def contrast_weights(
    delta: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
    compat: str = "paper",
) -> Tensor:
    r"""Token weights $w_j = avgpool_W(clamp(\Delta_j, \alpha, \beta))$ (CAL, eq. 3 and 4).

    The pool is centred on its token and averages over what exists: at a border it divides by the
    number of neighbours it has, not by the window.

    Args:
        delta: Label logit with the image less that without it, (t,), any floating dtype; on CUDA
            float16, bfloat16 or float32 by a kernel and float64 by the reference, no other. With
            "paper" only labels that are not ignored; with "official" the flattened (b * (L - 1),)
            row of all positions, where the released code takes token 0 for an ignored label.
        cu_seqlens: Offsets of the samples in `delta`, (b + 1,) int32 or int64, on the CPU or on the
            device of `delta`; None: one sample. Their values are checked on CPU only, where no
            device has to be waited for; on CUDA a token that is in no sample gets NaN.
        clamp: (alpha, beta).
        window: W, odd.
        compat: "paper", no window reaches into another sample; "official", the released code, whose
            windows run over the flattened batch, across samples and ignored positions.

    Returns:
        Weights in [alpha, beta], (t,), float32 (float64 for float64), without gradient. NaN stays
        NaN in every window that holds one.

    Raises:
        TypeError: `delta` is not floating point, or `cu_seqlens` not integer.
        ValueError: Shapes or options are wrong, "official" came with `cu_seqlens`, or the dtype is
            not supported on CUDA.
    """
    check_one_of("compat", compat, ("paper", "official"))
    check_floating(delta=delta)
    check_dim("delta", delta, 1)
    if not clamp[0] <= clamp[1]:
        raise ValueError(f"clamp must be (alpha, beta) with alpha <= beta: got {clamp}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd and at least 1, to have a centre: got {window}")
    if cu_seqlens is not None:
        if compat == "official":
            raise ValueError(
                'cu_seqlens must be None with compat="official", which pools across samples: '
                'leave it out, or use compat="paper"'
            )
        check_cu_seqlens(cu_seqlens, delta.shape[0], "delta")
    if not on_triton(delta) or delta.dtype == torch.float64:
        return reference(delta, cu_seqlens, clamp, window, compat)

    from fastalign_kernels.contrast_weights import DTYPES

    check_one_of("the dtype of delta on CUDA", delta.dtype, DTYPES)
    return fused(delta, cu_seqlens, clamp, window)
