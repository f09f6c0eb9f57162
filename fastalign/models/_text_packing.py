"""Rows that hold several text-only samples: their positions, and which models keep them apart.

transformers reads packing from position ids that begin anew where there is no attention mask, and
hides every other sample from a token. A batch says it by `segments`, (b, L) int64: the number of a
token's sample within its row, from 0 and ascending, and -1 for padding at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalign.models._contrast import Batch
from fastalign.models._module import call, evaluating, last_row
from fastalign.models._packed import LAYER_TYPES

if TYPE_CHECKING:
    from fastalign.models._vlm import VLM

# Attention whose mask transformers makes from the positions, for any number of rows.
_MASKED = ("sdpa", "eager", "flex_attention")
# Of what the probe's logits may differ, relative to the largest; samples that see each other differ
# by tens of per cent.
_SAME = 0.03


def positions(segments: Tensor) -> Tensor:
    """Places of the tokens within their own samples, (b, L) -> (b, L)."""
    column = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return column - torch.where(begins, column, 0).cummax(1).values


def model_inputs(vlm: VLM, batch: Batch) -> dict[str, Any]:
    """What the model takes of a batch.

    Raises:
        ValueError: Rows hold several samples, and the model would not keep them apart.
    """
    inputs = {k: v for k, v in batch.items() if k in vlm._inputs}
    if batch.get("segments") is None:
        return inputs
    if not vlm._packable:
        check_packable(vlm)
        vlm._packable = True
    return packed_inputs(vlm, inputs, batch["segments"])


def sample_numbers(batch: Batch, rows: Tensor, cols: Tensor) -> Tensor:
    """The sample of each label, ascending, from its row and the column that predicts it, (m,)."""
    segments: Tensor | None = batch.get("segments")
    if segments is None:
        return rows
    keys = rows * segments.shape[1] + segments[rows, cols]
    numbers: Tensor = torch.unique_consecutive(keys, return_inverse=True)[1]
    return numbers


def labelled_samples(batch: Batch) -> Tensor:
    """How many samples have a label that counts, ()."""
    labelled: Tensor = batch["labels"][:, 1:] != -100
    segments: Tensor | None = batch.get("segments")
    if segments is None:
        return labelled.any(1).sum()
    found = torch.zeros_like(segments)
    return found.scatter_reduce(1, segments[:, 1:].clamp_min(0), labelled.long(), "amax").sum()


def packed_inputs(vlm: VLM, inputs: dict[str, Any], segments: Tensor) -> dict[str, Any]:
    """The model's inputs with positions in the place of the attention mask.

    Multimodal rotary positions are the model's own for rows with images; its decoder takes the
    places within the samples beside them.
    """
    mask = inputs.get("attention_mask")
    inputs = {k: v for k, v in inputs.items() if k != "attention_mask"}
    place = positions(segments)
    rotary: Any = getattr(vlm.model.base_model, "get_rope_index", None)
    if rotary is None:
        return {**inputs, "position_ids": place}
    ids = inputs["input_ids"]
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    given.setdefault("mm_token_type_ids", torch.zeros_like(ids))
    own = rotary(ids, attention_mask=mask, **given)[0]
    shown = vlm.vision_mask({"input_ids": ids}).any(1)
    rows = torch.where(shown[None, :, None], own.to(place.dtype), place[None])
    return {**inputs, "position_ids": torch.cat([place[None], rows])}


def check_packable(vlm: VLM) -> None:
    """Refuse models that would not keep samples of one row apart, as far as their parts tell.

    Raises:
        ValueError: Names the model and the reason.
    """
    name, text = type(vlm.model).__name__, vlm.config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES)
    attention = text._attn_implementation
    reasons = {
        f"its layers ({', '.join(kinds)}) carry state from token to token": bool(kinds),
        "its convolutions reach over the border of samples": any(
            isinstance(module, nn.Conv1d) for module in vlm.decoder.modules()
        ),
        "it has cross-attention to images": "cross_attention_mask" in vlm._inputs,
        "it takes no position_ids": "position_ids" not in vlm._inputs,
        "its attention before an answer goes both ways": "paligemma" in vlm.config.model_type,
        f"its attention is {attention}, whose packing knows one row only (set "
        f"attn_implementation to {', '.join(_MASKED)})": attention not in _MASKED,
    }
    found = [reason for reason, met in reasons.items() if met]
    if found:
        raise ValueError(f"text cannot be packed for {name}: {'; '.join(found)}")


@torch.no_grad()
def check_packing(vlm: VLM) -> None:
    """`check_packable`, then a text of two samples in one row and in two, which must agree.

    Raises:
        ValueError: Names the model, and the reason or the difference.
    """
    check_packable(vlm)
    lengths, device = [9, 7], vlm.head.weight.device
    special = {*vlm.image_token_ids, getattr(vlm.config.get_text_config(), "pad_token_id", None)}
    usable = [i for i in range(4, 4 + 64) if i not in special]
    tokens = torch.tensor(usable, device=device)
    samples = [tokens[torch.arange(n, device=device) * (7 + n) % len(tokens)] for n in lengths]
    row = torch.cat(samples)[None]
    numbers = torch.arange(2, device=device).repeat_interleave(torch.tensor(lengths, device=device))
    inputs = packed_inputs(vlm, {"input_ids": row}, numbers[None])
    with evaluating(vlm.model):
        packed = torch.split(_states(vlm, inputs)[0], lengths)
        alone = [_states(vlm, {"input_ids": sample[None]})[0] for sample in samples]
    largest = max(float(states.abs().max()) for states in alone)
    worst = max(float((a - b).abs().max()) for a, b in zip(packed, alone, strict=True))
    if not worst <= _SAME * largest:
        raise ValueError(
            f"text cannot be packed for {type(vlm.model).__name__}: samples in one row see each "
            f"other; the states of a text differ by {worst:.2g}, of up to {largest:.2g}"
        )


def _states(vlm: VLM, inputs: dict[str, Any]) -> Tensor:
    """Output of the decoder, (b, L, d) float32."""
    found: list[Tensor] = []
    handle = vlm.decoder.register_forward_hook(lambda module, args, out: found.append(out[0]))
    try:
        with last_row(vlm.head):
            call(vlm.model, **inputs, use_cache=False)
    finally:
        handle.remove()
    return found[0].float()
