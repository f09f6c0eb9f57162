"""Where the queries of a Q-Former look: what stands in for a patch grid that they do not have."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def cross_attentions(model: nn.Module) -> list[Any]:
    """The Q-Former's attentions from queries to patches, first to last; none in other models."""
    found: list[Any] = [getattr(module, "crossattention", None) for module in model.modules()]
    return [module.attention for module in found if module is not None]


@contextmanager
def query_attention(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect where each query looks in the Q-Former's last attention to the image, per pass.

    Gives a list, filled as the model runs: (images, queries, n) float32 without gradient, mean over
    the heads, each row adding up to one; n tokens of the vision tower, those before the patches
    (CLS) first. It stays empty for models without a Q-Former.
    """
    looks: list[Tensor] = []
    attentions = cross_attentions(model)
    if not attentions:
        yield looks
        return
    last = attentions[-1]
    queries: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        queries.append(output.detach())

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        q, k = (
            x.detach().float().view(*x.shape[:2], last.num_attention_heads, -1).transpose(1, 2)
            for x in (queries.pop(), output)
        )
        looks.append(torch.softmax(q @ k.mT * last.scaling, -1).mean(1))

    handles = [last.query.register_forward_hook(keep), last.key.register_forward_hook(look)]
    try:
        yield looks
    finally:
        for handle in handles:
            handle.remove()
