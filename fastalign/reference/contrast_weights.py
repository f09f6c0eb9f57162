"""w_j = mean of clamp(delta_i, alpha, beta) over |i - j| <= W // 2, i in the sample of j

The weights of CAL (NeurIPS 2024, eq. 3 and 4).
"""

import torch
from torch import Tensor

from fastalign.reference._rows import wide


def contrast_weights(
    delta: Tensor,
    cu_seqlens: Tensor | None = None,
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
    compat: str = "paper",
) -> Tensor:
    """(t,) -> (t,). "official" pools one flat row of positions, so it is "paper" of one sample."""
    (delta,) = wide(delta.detach())
    t = delta.shape[0]
    position = torch.arange(t, device=delta.device)
    start, end = torch.zeros_like(position), torch.full_like(position, t)
    if cu_seqlens is not None and compat == "paper":
        offsets = cu_seqlens.to(delta.device, torch.int64)
        sample = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
        start, end = offsets[sample], offsets[sample + 1]
    # A gather of W neighbours, not a running sum: one NaN then stays inside its own windows.
    index = position[:, None] + torch.arange(window, device=delta.device) - window // 2
    inside = (index >= start[:, None]) & (index < end[:, None])
    values = delta.clamp(*clamp)[index.clamp(0, max(t - 1, 0))]
    return values.masked_fill(~inside, 0.0).sum(1) / inside.sum(1)
