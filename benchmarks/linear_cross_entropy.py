"""linear_cross_entropy against the logits in plain torch and the three products it must do.

Liger's loss has no token weights: its row is the unweighted mean, and its error means nothing.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign as fa
from benchmarks import Benchmark, Function, Inputs, Peer, Run


def fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None
) -> Tensor:
    return fa.losses.linear_cross_entropy(hidden, weight, labels, token_weights=weights, bias=bias)


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Weighted mean over all logits at once, in `dtype`; None is float32, or that of wider inputs.

    The cross-entropy of logits in a narrow type is computed in float32, as trainers do it.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    inner = dtype or wide
    logits = F.linear(hidden.to(inner), weight.to(inner), None if bias is None else bias.to(inner))
    return _weighted(F.cross_entropy(logits.to(wide), labels, reduction="none"), weights)


def _weighted(ce: Tensor, weights: Tensor) -> Tensor:
    return (weights * ce).sum() / weights.sum()


def torch_rows(chunked: bool) -> Function:
    """torch's own, in the dtype of the inputs; `chunked` computes the logits again backward."""
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None
    ) -> Tensor:
        ce = F.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction="none", options=options
        )
        return _weighted(ce, weights)

    return loss


def liger() -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels, weights, bias: fused(weight, hidden, labels, bias)


def cut_cross_entropy() -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels, weights, bias: _weighted(
        linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none"), weights
    )


def bound(inputs: Inputs) -> Run:
    """Logits, dh and dW, each 2 t v d FLOPs, in the dtype of the inputs; 1024 rows at a time."""
    hidden, weight, *_ = inputs
    chunks = [(h, torch.empty(len(h), len(weight)).to(hidden)) for h in torch.split(hidden, 1024)]
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for (h, logits), dh in zip(chunks, torch.split(dhidden, 1024), strict=True):
            torch.mm(h, weight.T, out=logits)
            torch.mm(logits, weight, out=dh)
            torch.mm(logits.T, h, out=dweight)

    return run


_TORCH = "torch.nn.modules.linear_cross_entropy"  # from torch 2.13 on
PEERS = {
    "torch": Peer(_TORCH, partial(torch_rows, False)),
    "torch-chunked": Peer(_TORCH, partial(torch_rows, True)),
}
if torch.cuda.is_available():  # they run on nothing else
    PEERS |= {
        "liger-unweighted": Peer("liger_kernel", liger),
        "cut-cross-entropy": Peer("cut_cross_entropy", cut_cross_entropy),
    }

BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    fastalign=fused,
    eager=cross_entropy,
    bound=bound,
    bfloat16=partial(cross_entropy, dtype=torch.bfloat16),
    peers=PEERS,
    differentiate=(0, 1),
)
