"""The logit of each token's own label, which CAL's contrast compares (NeurIPS 2024)."""

import torch
from torch import Tensor
from torch.nn.functional import embedding


def label_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y_i = <hidden_i, weight[labels_i]> + bias[labels_i], 0 where labels_i < 0; float32 or wider.

    Only the labels' rows of `weight` are widened, unless `weight` requires a gradient: what the
    rows of one label add up to has the dtype of what is indexed, so then all of it is.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kept = labels >= 0
    index = torch.where(kept, labels, 0)
    rows = embedding(index, weight.to(dtype) if weight.requires_grad else weight).to(dtype)
    # Masked before the product: what an ignored row holds must not reach the gradient of `weight`.
    y = (torch.where(kept[:, None], hidden, 0.0).to(dtype) * rows).sum(-1)
    if bias is not None:
        y = y + bias.to(dtype).index_select(0, index)
    return torch.where(kept, y, 0.0)
