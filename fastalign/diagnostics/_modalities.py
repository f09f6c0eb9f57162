"""Where a batch's tokens of each modality are, and the states of every layer at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastalign.models import VLM, Batch
from fastalign.models._mir import check_image_tokens as check_image_tokens


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
