"""The pairs of a whole step as negatives of one another, however the step is divided.

Mutual information is no sum over pairs: estimated within each micro-batch it is another term. So a
step of several micro-batches begins with a pass without gradient, as in GradCache (Gao et al. 2021,
arXiv:2101.06983), and the term's gradient reaches the parameters in parts:

    1. pooled vectors of micro-batch k: of the base model, and s_k = h'_v of the adapted one
    2. L = L_MI(s_1, ..., s_K) over all micro-batches and ranks,  and g_k = dL/ds_k
    3. the share of micro-batch k:  L n_k / n,  with the gradient  g_k . ds_k/dtheta

The shares add up to L and, by the chain rule, their gradients to dL/dtheta: nothing is
approximated. Of micro-batch k only its own graph is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from fastalign.models import VLM, Batch
from fastalign.objectives._intervention import Vectors, mutual_term, pair_vectors
from fastalign.objectives._terms import Totals, share

if TYPE_CHECKING:
    from fastalign.objectives._deepalign import DeepAlignState

Run: TypeAlias = Callable[[Batch, Callable[[Batch], Vectors]], Vectors]


@dataclass(frozen=True)
class MutualShare:
    """What a micro-batch knows of the mutual information of its whole step.

    Attributes:
        h_v, h_t: Its vectors of the base model, (b, d), which need not be computed again.
        value: The term of the whole step, scalar.
        gradient: Of that term in the micro-batch's shifted vision vectors, (b, d).
        seed: Of torch's generators before its adapted forward, so that dropout is that of the
            first pass.
    """

    h_v: Tensor
    h_t: Tensor
    value: Tensor
    gradient: Tensor
    seed: int

    def share(self, shifted: Tensor, pairs: Tensor, totals: Totals | None) -> Tensor:
        """The micro-batch's share of the term, with its part of the gradient.

        Args:
            shifted: Its shifted vision vectors, (b, d), with their graph.
            pairs: How many of its samples are pairs.
            totals: Of the step.
        """
        still = shifted - shifted.detach()  # 0, with the graph of the vectors
        return share(self.value * pairs, "pairs", pairs, totals) + (self.gradient * still).sum()


def mutual_shares(
    vlm: VLM,
    batches: Sequence[Batch],
    *,
    state: DeepAlignState | None,
    run: Run | None = None,
) -> Sequence[MutualShare | None]:
    """What each micro-batch of a step needs to take all pairs of the step as negatives.

    A pass without gradient over all micro-batches, which ends after the deepest of `state.layers`.
    Torch's generators are seeded before each forward, here and in `deepalign`, from seeds that
    they give: dropout is the same in both passes.

    Args:
        vlm: The model, with an adapter, in the mode in which the step will run it.
        batches: The micro-batches of one optimizer step; with torch.distributed as many on every
            rank, all of which have to call.
        state: Of DeepAlign; None for another objective.
        run: (batch, function) -> function(batch), through the outermost module of an engine that
            shards the model.

    Returns:
        For each micro-batch what `deepalign` takes as `mutual`. None for each where it is not
        needed: with one micro-batch, or without the mutual term.
    """
    if state is None or len(batches) < 2 or not state.config.weight("mutual"):
        return [None] * len(batches)

    def vectors(batch: Batch) -> Vectors:
        return pair_vectors(vlm, batch, state)

    seeds = torch.randint(2**62, (len(batches),), device="cpu").tolist()
    found = []
    for batch, seed in zip(batches, seeds, strict=True):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(vectors(batch) if run is None else run(batch, vectors))
    value, gradient = _whole_term([torch.cat(parts) for parts in zip(*found, strict=True)], state)
    parts = torch.split(gradient, [len(pair) for *_, pair in found])
    return [
        MutualShare(h_v, h_t, value, part, seed)
        for (h_v, h_t, _, _), part, seed in zip(found, parts, seeds, strict=True)
    ]


def _whole_term(vectors: Sequence[Tensor], state: DeepAlignState) -> tuple[Tensor, Tensor]:
    """The term of a step, and its gradient in this rank's shifted vectors, (sum of b, d)."""
    h_v, h_t, shifted, pair = vectors
    with torch.enable_grad():
        shifted = shifted.detach().requires_grad_()
        value = mutual_term(h_v, h_t, shifted, pair, state.config)
        (gradient,) = torch.autograd.grad(value, shifted)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # The exchange adds up the gradients of the same term on every rank.
    ranks = torch.distributed.get_world_size() if distributed else 1
    return value.detach(), gradient / ranks
