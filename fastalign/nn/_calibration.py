"""Scale and shift of the vision tokens (MoCa)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastalign.ops.calibrate import calibrate


class ModalityCalibration(nn.Module):
    """Learnable calibration of the vision tokens, x <- u * x + v (MoCa, section 4).

    Args:
        dim: Width d of the hidden states.
        init_std: Standard deviation of u around 1 and of v around 0; with 0 the module starts as
            the identity. The released code draws them with a small one.
    """

    def __init__(self, dim: int, init_std: float = 0.0) -> None:
        super().__init__()
        if not init_std >= 0:
            raise ValueError(f"init_std must be at least 0: got {init_std!r}")
        self.dim, self.init_std = dim, init_std
        self.scale = nn.Parameter(torch.empty(dim))
        self.shift = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw u and v anew."""
        nn.init.normal_(self.scale, 1.0, self.init_std)
        nn.init.normal_(self.shift, 0.0, self.init_std)

    def forward(self, x: Tensor, vision_mask: Tensor) -> Tensor:
        """Calibrate vision tokens: `fastalign.ops.calibrate` with the module's parameters.

        Args:
            x: Hidden states, (..., d).
            vision_mask: (...) bool, true for vision tokens; the others pass bit for bit.

        Returns:
            The shape and dtype of `x`.
        """
        return calibrate(x, vision_mask, self.scale, self.shift)
