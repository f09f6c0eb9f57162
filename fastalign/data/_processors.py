"""What differs between the processors of transformers, as far as a batch depends on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

ALIGNED = frozenset({"mm_token_type_ids", "token_type_ids"})  # one value a token, 0 for text
# Of each image's own size, zeros beyond it.
_RAGGED = frozenset({"pixel_attention_mask", "qformer_input_ids", "qformer_attention_mask"})


def plain_template(processor: Any) -> str:
    """A chat template for a processor that has none: each image's token, then the text, no roles.

    PaliGemma and the Q-Former models (BLIP-2, InstructBLIP) were trained so: an image, a text that
    may be empty, and what follows it. The processors of the latter put the image's tokens in
    front themselves, and the template leaves them out.
    """
    image = "" if puts_images_first(processor) else str(processor.image_token)
    return (
        "{%- for message in messages -%}{%- for part in message['content'] -%}"
        "{{- " + json.dumps(image) + " if part['type'] == 'image' else part['text'] -}}"
        "{%- endfor -%}{%- endfor -%}"
    )


def puts_images_first(processor: Any) -> bool:
    """Whether it writes an image's tokens itself, before all text and the tokenizer's own bos."""
    return hasattr(processor, "num_query_tokens")


def marks_answers(processor: Any) -> bool:
    """Whether its token types are 1 on answers (PaliGemma: attention is causal there only)."""
    return "labels" in getattr(processor, "model_input_names", ())


def image_ids(processor: Any) -> frozenset[int]:
    """Ids of the tokens that stand for images, before and after their expansion."""
    tokenizer = processor.tokenizer
    ids = {
        tokenizer.convert_tokens_to_ids(str(processor.image_token)),
        getattr(processor, "image_token_id", None),
        getattr(tokenizer, "image_token_id", None),  # Gemma 3's soft token
        *(getattr(processor, "image_token_ids", ())),
    }
    return frozenset(i for i in ids if isinstance(i, int))


def encode(
    processor: Any, text: str, images: Sequence[Image.Image]
) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids of `text` with its images, and what else the model takes.

    Raises:
        ValueError: The model reads images by cross-attention masks over the tokens.
    """
    front = puts_images_first(processor)
    options: dict[str, Any] = {"add_special_tokens": front}
    if "mm_token_type_ids" in getattr(processor, "model_input_names", ()):
        options["return_mm_token_type_ids"] = True
    nested = list(images) if front else [list(images)]
    out = dict(processor(text=[text], images=nested, return_tensors="pt", **options))
    if "cross_attention_mask" in out:
        raise ValueError(
            f"processor must put images among the tokens: {type(processor).__name__} gives a "
            "cross_attention_mask, which cannot be joined from prompts and answers; make the "
            "batch with the processor itself"
        )
    for name in ("attention_mask", "labels"):
        out.pop(name, None)
    return out.pop("input_ids")[0].tolist(), out


def join(tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """The tensors of all images, one after the other.

    Images cut into fewer tiles get empty ones, and where the batch says which part of each is
    real, smaller ones get zeros to the right and below.

    Raises:
        ValueError: Shapes differ where the model has no way to tell padding from pixels.
    """
    sized = bool({"pixel_attention_mask", "image_sizes"} & tensors.keys())
    joined = {}
    for key in sorted(tensors):
        values = tensors[key]
        tiles = values[0].ndim == 5  # (images, tiles, channels, height, width)
        if key in _RAGGED or (key == "pixel_values" and (sized or tiles)):
            values = _padded(values, (1,) if tiles and not sized else range(1, values[0].ndim))
        if any(value.shape[1:] != values[0].shape[1:] for value in values):
            raise ValueError(
                f"{key} must have one shape for all images of a batch: got "
                f"{sorted({tuple(value.shape[1:]) for value in values})}; "
                "let the image processor resize to one size, or pass one record at a time"
            )
        joined[key] = torch.cat(list(values))
    return joined


def _padded(values: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """`values` with zeros at the end of each of `dims`, up to the largest."""
    largest = {dim: max(value.shape[dim] for value in values) for dim in dims}
    padded = []
    for value in values:
        shape = [largest.get(dim, size) for dim, size in enumerate(value.shape)]
        if shape != list(value.shape):
            wider = value.new_zeros(shape)
            wider[tuple(map(slice, value.shape))] = value
            value = wider
        padded.append(value)
    return padded
