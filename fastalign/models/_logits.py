"""How a model makes its logits from the output of its head."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class LogitTransform(NamedTuple):
    """Logits are `scale` times the head's output, then bounded by `softcap` unless it is None."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw * self.scale
        return z if self.softcap is None else self.softcap * (z / self.softcap).tanh()


@torch.no_grad()
def find_transform(model: nn.Module, raw: Tensor, logits: Tensor) -> LogitTransform | None:
    """Which transform leads from the head's output to the model's logits.

    The text configuration names them, but not every class that holds such a text model applies
    them: Gemma 3 with images leaves the softcap out, PaliGemma does not.

    Args:
        model: Its configuration names the candidates.
        raw: Output of the head, any shape.
        logits: What the model returned, the same shape.

    Returns:
        The candidate that fits best; None where the logits are not finite, and say nothing.

    Raises:
        ValueError: None of them fits.
    """
    raw, logits = raw.double(), logits.double()
    if not logits.isfinite().all():
        return None
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = getattr(text, "logit_scale", None) or 1.0  # Cohere
    scale = scale / (getattr(text, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(text, "final_logit_softcapping", None)
    candidates = (LogitTransform(), LogitTransform(scale), LogitTransform(scale, cap))
    errors = [float((candidate(raw) - logits).abs().max()) for candidate in candidates]
    if min(errors) > 0.02 * float(logits.abs().max()):
        raise ValueError(
            f"{type(model).__name__} makes its logits from its head in a way that is not known "
            "(neither logit_scale, logits_scaling nor final_logit_softcapping)"
        )
    return candidates[errors.index(min(errors))]
