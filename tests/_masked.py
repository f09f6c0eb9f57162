"""Contrasts computed another way: transformers' own logits, with a hook that hides the images.

Both oracles run the whole model and change only what it hands its decoder, so that the head, its
softcap and its scale are those of the model. Nothing here is imported from fastalign.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
# What carries an image past the input embeddings.
_SIDE_CHANNELS = (
    "visual_pos_masks",
    "deepstack_visual_embeds",
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
)
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Contrast:
    """One entry a label that is not -100 and not in column 0, row-major, (m,) each.

    Attributes:
        delta: Label logit with the image less that without it, in the dtype of the logits.
        after_image: The label directly follows an image token.
        active: An image token stands before the label.
        defined: The predictor sees a token once the images are hidden. Where it sees none, which
            only an image at the very front can, the released code's value depends on the attention.
    """

    delta: Tensor
    after_image: Tensor
    active: Tensor
    defined: Tensor


def masked_contrast(model: nn.Module, batch: Kwargs) -> Contrast:
    """As CAL's released code: image tokens stay in place, hidden as keys from every query.

    A query without any key left sees itself.
    """
    image = _image(model, batch)

    def hide(kwargs: Kwargs) -> Kwargs:
        kwargs = _without_side_channels(kwargs)
        kwargs["position_ids"] = _positions(kwargs, batch)
        kwargs["attention_mask"] = _each(
            kwargs.get("attention_mask"),
            lambda mask: _as_given(mask, _kept(_visible(mask, batch) & ~image[:, None, None])),
        )
        return kwargs

    rows, cols, labels = _labels(batch)
    without = _logits(model, batch, hide)
    return _contrast(model, batch, without[rows, cols, labels])


def dropped_contrast(model: nn.Module, batch: Kwargs) -> Contrast:
    """As the paper: each sample by itself, its text tokens only, at their own positions.

    A label without text before it has contrast 0.
    """
    image = _image(model, batch)
    text = batch["attention_mask"].bool() & ~image
    rows, cols, labels = _labels(batch)
    without = []
    for sample in rows.unique().tolist():
        keep = text[sample].nonzero()[:, 0]

        def cut(kwargs: Kwargs, sample: int = sample, keep: Tensor = keep) -> Kwargs:
            kwargs = _without_side_channels(kwargs)
            positions = _positions(kwargs, batch)
            kwargs["position_ids"] = positions[..., sample : sample + 1, keep]
            for name in ("inputs_embeds", "input_ids"):
                if kwargs.get(name) is not None:
                    kwargs[name] = kwargs[name][sample : sample + 1, keep]
            kwargs["attention_mask"] = _each(
                kwargs.get("attention_mask"),
                lambda mask: _cut_mask(mask, sample, keep),
            )
            return kwargs

        logits = _logits(model, batch, cut)[0]
        mine = rows == sample
        # The last text token at or before the predictor.
        place = torch.searchsorted(keep, cols[mine], right=True) - 1
        picked = logits[place.clamp_min(0), labels[mine]]
        without.append(torch.where(place >= 0, picked, torch.nan))
    contrast = _contrast(model, batch, torch.cat(without))
    return replace(contrast, delta=contrast.delta.nan_to_num(nan=0.0))


def _contrast(model: nn.Module, batch: Kwargs, without: Tensor) -> Contrast:
    image = _image(model, batch)
    rows, cols, labels = _labels(batch)
    delta = _logits(model, batch)[rows, cols, labels] - without
    text_before = ((batch["attention_mask"].bool() & ~image).cumsum(1) > 0)[rows, cols]
    return Contrast(delta, image[rows, cols], (image.cumsum(1) > 0)[rows, cols], text_before)


def _image(model: nn.Module, batch: Kwargs) -> Tensor:
    return torch.eq(batch["input_ids"], model.config.image_token_id)


def _labels(batch: Kwargs) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, column of the predictor and label, (m,) each."""
    labels = batch["labels"][:, 1:]
    rows, cols = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows, cols, labels[rows, cols]


@torch.no_grad()
def _logits(
    model: nn.Module, batch: Kwargs, edit: Callable[[Kwargs], Kwargs] | None = None
) -> Tensor:
    """Logits of `model`, with `edit` applied to what it hands its decoder."""
    calls: list[Kwargs] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Kwargs) -> Any:
        assert not args
        calls.append(kwargs)
        return (args, edit(dict(kwargs))) if edit else None

    handle = model.get_decoder().register_forward_pre_hook(before, with_kwargs=True)
    try:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    assert len(calls) == 1
    return logits


def _without_side_channels(kwargs: Kwargs) -> Kwargs:
    return {k: None if k in _SIDE_CHANNELS else v for k, v in kwargs.items()}


def _positions(kwargs: Kwargs, batch: Kwargs) -> Tensor:
    """Positions (..., b, L): those handed to the decoder, else counted without the padding."""
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return positions.expand(*positions.shape[:-2], *batch["input_ids"].shape)


def _each(mask: Any, change: Callable[[Tensor | None], Tensor]) -> Any:
    """`change` of a mask, or of each mask of a dictionary by layer type."""
    if isinstance(mask, dict):
        return {k: change(v) for k, v in mask.items()}
    return change(mask)


def _visible(mask: Tensor | None, batch: Kwargs) -> Tensor:
    """Which keys each query sees, bool (b, 1, L, L), from any mask that a decoder takes."""
    b, length = batch["input_ids"].shape
    if mask is not None and mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask == 0
        return seen.expand(b, 1, length, length)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & batch["attention_mask"].bool()[:, None, None]


def _kept(visible: Tensor) -> Tensor:
    empty = ~visible.any(-1, keepdim=True)
    return visible | (empty & torch.eye(visible.shape[-1], dtype=torch.bool))


def _as_given(mask: Tensor | None, visible: Tensor) -> Tensor:
    """`visible` as bool, or added to scores where the decoder was handed such a mask."""
    if mask is None or mask.dim() != 4 or mask.dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(
        ~visible, torch.finfo(mask.dtype).min
    )


def _cut_mask(mask: Tensor | None, sample: int, keep: Tensor) -> Tensor:
    """Rows and columns of the kept tokens; a 2-D mask also keeps gaps from reading as packing."""
    if mask is None or mask.dim() == 2:
        return torch.ones(1, len(keep), dtype=torch.long)
    return mask[sample : sample + 1][:, :, keep][..., keep]
