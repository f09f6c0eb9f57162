"""Where a batch's tokens of each modality are, and the states of every layer at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastalign.models import VLM, Batch


def check_image_tokens(vlm: VLM) -> None:
    """Refuse a model in which images are no rows of the decoder's hidden states.

    Raises:
        ValueError: Images enter by cross-attention (Mllama).
    """
    if getattr(vlm.config.get_text_config(), "cross_attention_layers", None):
        raise ValueError(
            f"model must hold images as tokens among the text: {type(vlm.model).__name__} reads "
            "them by cross-attention, so its layers have no image rows to compare (the token that "
            "marks an image is embedded as text)"
        )


def to_model(vlm: VLM, batch: Batch) -> dict[str, Any]:
    """The batch with its tensors on the model's device."""
    device = next(vlm.model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def places_of(mask: Tensor) -> Tensor:
    """Places of the true entries of (b, L) in the flattened batch, (n,)."""
    return mask.flatten().nonzero()[:, 0]


def check_layers(vlm: VLM, layers: Sequence[int] | None, *, first: int) -> tuple[int, ...]:
    """The layers in order, each once; all from `first` on where None.

    Raises:
        ValueError: A layer does not exist.
    """
    chosen = range(first, vlm.num_layers + 1) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < first or chosen[-1] > vlm.num_layers:
        raise ValueError(f"layers must lie in {first}..{vlm.num_layers}: got {list(chosen)}")
    return tuple(chosen)


def each_state(vlm: VLM, batch: Batch, visit: Callable[[int, Tensor], None]) -> None:
    """`VLM.each_layer`, and before it, as layer 0, what the decoder is handed: (b, L, d)."""

    def enter(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None:
            visit(0, embeds)

    handle = vlm.decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        vlm.each_layer(batch, visit)
    finally:
        handle.remove()
