"""Tells text from vision, and by which channels (DeepAlign, sections 1.1 and 1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.ops._check import (
    check_floating,
    check_integer,
    check_last_dim,
    check_one_of,
    check_shape,
)


class ModalityClassifier(nn.Module):
    """MLP that tells text (0) from vision (1) by a pooled representation (DeepAlign, section 1.1).

    Linear layers with GELU between them. Its gradient marks the channels that are specific to a
    modality: see `channel_weights`, and `fastalign.ops.hadamard_reweight` for what they weight.

    Args:
        dim: Width d of the representations.
        hidden_dims: Widths of the hidden layers; empty for a linear classifier.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (512,)) -> None:
        super().__init__()
        self.dim = dim
        widths = [dim, *hidden_dims, 2]
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Logits of (text, vision).

        Args:
            h: Representations, (..., d), any floating dtype.

        Returns:
            (..., 2) in the dtype of the parameters.

        Raises:
            TypeError: `h` is not floating point.
            ValueError: The last dimension of `h` is not d.
        """
        return self._forward(h)[0]

    @torch.no_grad()
    def channel_weights(self, h: Tensor, label: int | Tensor) -> Tensor:
        """Gradient of the label's logit with respect to `h`, Grad-CAM's weights (section 1.2).

        The chain rule written out, in the dtype of the parameters and never in autocast's: no
        autograd graph is built, none is needed, and the result is detached.

        Args:
            h: Representations, (..., d), any floating dtype.
            label: Modality whose logit is differentiated: 0 (text) or 1 (vision), or a tensor of
                them, (...) int64 or int32.

        Returns:
            (..., d) in the dtype of `h`.

        Raises:
            TypeError: `h` is not floating point, or a tensor `label` not integer.
            ValueError: The last dimension of `h` is not d, or `label` is neither 0 nor 1, or has
                another shape.
        """
        if not isinstance(label, Tensor):
            check_one_of("label", label, (0, 1))
            label = int(label)
        else:
            check_integer(label=label)
            check_shape("label", label, tuple(h.shape[:-1]), "(...)")
        with torch.autocast(h.device.type, enabled=False):
            _, hidden = self._forward(h)
            weights = [layer.weight for layer in self._linears()]
            gradient = weights[-1][label]
            for z, weight in zip(reversed(hidden), reversed(weights[:-1]), strict=True):
                gradient = (gradient * _gelu_slope(z)) @ weight
        return gradient.expand(h.shape).to(h.dtype, copy=True)

    def _forward(self, h: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and what went into each GELU."""
        check_floating(h=h)
        check_last_dim("h", h, self.dim)
        *first, last = self._linears()
        z = h.to(last.weight.dtype)
        hidden: list[Tensor] = []
        for layer in first:
            hidden.append(layer(z))
            z = F.gelu(hidden[-1])
        return last(z), hidden

    def _linears(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]


def _gelu_slope(z: Tensor) -> Tensor:
    """d/dz [z Phi(z)] = Phi(z) + z phi(z), with the standard normal's Phi and phi."""
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
