"""The image-free forward of CAL: the text tokens alone, through the same decoder.

It starts from what the model handed to its decoder in the forward with the image, so that it needs
no code of its own for a family: embeddings, positions and masks are those of the kept tokens.
"""

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models._masks import cut_mask, without_columns
from fastalign.models._module import evaluating, split_hidden
from fastalign.models._packed import LAYER_TYPES, Segments, packed
from fastalign.models._rows import only_rows, take_rows

# What a decoder may be handed and the branch replaces; flags are left out, other tensors refused.
_REPLACED = {"inputs_embeds", "input_ids", "position_ids", "attention_mask", "past_key_values"}
# How images enter a decoder beside its embeddings: without an image, not at all.
_IMAGE_INPUTS = {
    "visual_pos_masks",
    "deepstack_visual_embeds",
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
}


# A prefix shorter than this share of the kept tokens costs as much to copy as to compute.
_WORTH = 0.1


@dataclass(frozen=True)
class Plan:
    """The labels of a batch, which of them an image-free forward predicts, and what it reads.

    Attributes:
        labels: Tokens to predict, (m,).
        rows: Place in the flattened batch of the row that predicts each, (m,).
        after_image: Labels after the first image of their sample, (m,) bool.
        active: Labels after the first image of their sample and with text before them, (m,) bool;
            the contrast of the others is 0.
        keep: Text tokens of the samples that have an active label, up to the predictor of the last
            one, (b, L) bool: no later token, and no sample without an image, changes an active
            label's logit.
        predictors: Place of each active label's predictor in the flattened batch, (active,): the
            last kept token at or before the column that predicts it with the image.
        prefix: Kept tokens before the first image that predict no active label, (b, L) bool. No
            image changes their states, so that the forward with the image has them already.
    """

    labels: Tensor
    rows: Tensor
    after_image: Tensor
    active: Tensor
    keep: Tensor
    predictors: Tensor
    prefix: Tensor

    @cached_property
    def prefix_rows(self) -> Tensor | None:
        """Places of the prefix in the flattened batch; None where it is not worth the copies."""
        rows = self.prefix.flatten().nonzero()[:, 0]
        return rows if len(rows) > _WORTH * int(self.keep.sum()) else None


def make_plan(image: Tensor, text: Tensor, rows: Tensor, cols: Tensor, labels: Tensor) -> Plan:
    """The tokens and labels of the image-free forward.

    Args:
        image: Image tokens, (b, L) bool.
        text: Attended tokens that are no image, (b, L) bool.
        rows: Sample of each label, (m,).
        cols: Column that predicts it, (m,).
        labels: The labels, (m,).
    """
    b, length = image.shape
    column = torch.arange(length, device=image.device)
    last_text = torch.where(text, column, -1).cummax(1).values
    after_image, before = (image.cumsum(1) > 0)[rows, cols], last_text[rows, cols]
    active = after_image & (before >= 0)
    samples, at = rows[active], before[active]
    end = torch.full((b,), -1, device=image.device).scatter_reduce(0, samples, at, "amax")
    keep = text & (column <= end[:, None])
    places, predictors = rows * length + cols, samples * length + at
    before_image = keep & (image.cumsum(1) == 0)
    prefix = before_image.flatten().index_fill(0, predictors, False).view_as(keep)
    return Plan(labels, places, after_image, active, keep, predictors, prefix)


@dataclass(frozen=True)
class Layout:
    """The kept tokens as a decoder takes them.

    Attributes:
        inputs: Keyword arguments of the decoder.
        predictors: Places of the predictors in the flattened input, (active,).
        shape: Of the tokens, (1, T) packed, else (samples, longest).
        segments: Of a packed row; None of padded ones.
        backend: Of its attention.
        prefix: Places of the tokens whose states come from the forward with the image; None: none.
        computed: Places of the others.
    """

    inputs: dict[str, Any]
    predictors: Tensor
    shape: tuple[int, int]
    segments: Segments | None = None
    backend: str = "auto"
    prefix: Tensor | None = None
    computed: Tensor | None = None

    def attention(self, module: nn.Module) -> AbstractContextManager[Any]:
        """The context in which a decoder or a layer attends within the segments only."""
        if self.segments is None:
            return nullcontext()
        return packed(module, self.segments, self.backend)

    def rows_of(self, layer: nn.Module, last: bool) -> AbstractContextManager[None]:
        """The context in which a layer computes only the rows that are needed of it."""
        rows = self.predictors if last else self.computed
        return nullcontext() if rows is None else only_rows(layer, rows, self.shape)

    def with_prefix(self, hidden: Tensor, states: Tensor | None) -> Tensor:
        """A layer's input with the prefix's states from the forward with the image in place."""
        if self.prefix is None or states is None:
            return hidden
        flat = hidden.flatten(0, 1).index_copy(0, self.prefix, states.to(hidden.dtype))
        return flat.view_as(hidden)


class Branch:
    """Builds and runs the image-free forward of one decoder.

    Args:
        decoder: The language model that a vision-language model calls.
        layers: Its layers.
        config: Its configuration.
        name: Of the model, for messages.
    """

    def __init__(self, decoder: nn.Module, layers: nn.ModuleList, config: Any, name: str) -> None:
        self.decoder, self.layers, self.name = decoder, layers, name
        kinds = set(getattr(config, "layer_types", None) or ())
        self.kinds = kinds - LAYER_TYPES
        self.window: int | None = getattr(config, "sliding_window", None)
        if kinds and "sliding_attention" not in kinds:
            self.window = None

    def check(self, packed: bool) -> None:
        """Raise ValueError where dropping tokens does not mean hiding them."""
        if "chunked_attention" in self.kinds:
            raise ValueError(
                f"contrast does not support chunked attention ({self.name}): which tokens share "
                'a chunk depends on the places of the dropped ones; use mode="blur" or "patch-mask"'
            )
        if self.kinds and packed:
            raise ValueError(
                f"contrast cannot pack samples for {self.name}, whose decoder has recurrent or "
                f"convolutional layers ({', '.join(sorted(self.kinds))}): their state would run "
                "from one sample into the next, and dropping a token differs from masking it; "
                "packed=False drops the image tokens in padded rows"
            )

    def layout(
        self, captured: dict[str, Any], plan: Plan, packed: bool, backend: str, reuse: bool = False
    ) -> Layout:
        """The kept tokens as arguments of the decoder.

        Args:
            captured: Keyword arguments that the model handed to its decoder, (b, L) tokens.
            plan: What to keep; at least one token.
            packed: One row of all samples, where the model hands its decoder no masks of its own;
                else right-padded rows.
            backend: Attention of the packed row.
            reuse: Whether the states of the prefix are at hand.
        """
        self.check(packed)
        mask = captured.get("attention_mask")
        own_masks = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() == 4)
        known = mask is None or own_masks or (isinstance(mask, Tensor) and mask.dim() == 2)
        tensors = {k for k, v in captured.items() if _holds_tensors(v)}
        unknown = tensors - _REPLACED - _IMAGE_INPUTS
        if unknown or not known:
            what = sorted(unknown) or f"an attention mask of type {type(mask).__name__}"
            raise ValueError(
                f"contrast cannot cut what {self.name} hands its decoder ({what}): "
                'use the sdpa or eager attention, or mode="blur" or "patch-mask"'
            )
        embeds, positions = self.tokens(captured)
        if packed and not own_masks:
            # Cross-attention reaches tokens before the image, too.
            reuse = reuse and captured.get("cross_attention_states") is None
            return _packed_layout(embeds, positions, plan, backend, reuse)
        if self.window is not None and not own_masks and plan.keep.shape[1] > self.window:
            raise ValueError(
                f"packed must be True for {self.name} and sequences longer than its sliding "
                f"window of {self.window}: got {plan.keep.shape[1]} tokens"
            )
        return _padded_layout(embeds, positions, mask if own_masks else None, plan)

    def tokens(self, captured: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Embeddings (b, L, d) and positions (..., b, L): those handed over, else 0, 1, 2, ..."""
        embeds = captured.get("inputs_embeds")
        if embeds is None:
            embeds = self.decoder.get_input_embeddings().forward(captured["input_ids"])  # type: ignore
        embeds = embeds.detach()
        positions = captured.get("position_ids")
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
            mask = captured.get("attention_mask")
            if mask is not None and hasattr(self.decoder, "embed_positions"):  # OPT counts tokens
                positions = (mask.cumsum(1) - 1).clamp_min(0)
        return embeds, positions.expand(*positions.shape[:-2], *embeds.shape[:2])

    def run(self, layout: Layout, prefix: dict[nn.Module, Tensor]) -> Tensor:
        """Hidden states of the predictors, (active, d), in a forward of its own.

        Args:
            layout: The kept tokens.
            prefix: Input of each layer at the prefix, (k, d), where the layout has one.
        """

        def insert(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden, args, kwargs = split_hidden(args, kwargs)
            return (layout.with_prefix(hidden, prefix.get(layer)), *args), kwargs

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.decoder))
            stack.enter_context(layout.attention(self.decoder))
            for layer in self.layers:
                stack.enter_context(layout.rows_of(layer, last=layer is self.layers[-1]))
                if layout.prefix is not None:
                    handle = layer.register_forward_pre_hook(insert, with_kwargs=True)
                    stack.callback(handle.remove)
            out = self.decoder(**layout.inputs)
        return take_rows(out[0], layout.predictors)

    def masked(self, captured: dict[str, Any], image: Tensor, text: Tensor) -> Tensor:
        """Hidden states (b, L, d) with the image tokens in place and hidden as keys."""
        embeds, positions = self.tokens(captured)
        mask: Any = captured.get("attention_mask")
        if isinstance(mask, dict):
            mask = {k: without_columns(m, image) for k, m in mask.items()}
        elif isinstance(mask, Tensor) and mask.dim() == 4:
            mask = without_columns(mask, image)
        elif mask is None or isinstance(mask, Tensor):
            mask = text.to(torch.long)
        else:
            raise ValueError(
                f'mode "mask" cannot change the mask of {self.name}, a {type(mask).__name__}: '
                'use the sdpa or eager attention, or mode="drop"'
            )
        with evaluating(self.decoder):
            out = self.decoder(
                inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
            )
        hidden: Tensor = out[0]
        return hidden


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


def _packed_layout(
    embeds: Tensor, positions: Tensor, plan: Plan, backend: str, reuse: bool
) -> Layout:
    """All kept tokens in one row, sample after sample."""
    segments = Segments.from_mask(plan.keep)
    chosen = segments.rows * plan.keep.shape[1] + segments.positions
    inputs = {
        "inputs_embeds": take_rows(embeds, chosen)[None],
        "position_ids": positions.flatten(-2).index_select(-1, chosen).unsqueeze(-2),
        "attention_mask": None,
        "use_cache": False,
    }
    place = plan.keep.flatten().cumsum(0) - 1
    layout = Layout(inputs, place[plan.predictors], (1, len(chosen)), segments, backend)
    if not reuse:
        return layout
    prefix = plan.prefix.flatten()[chosen]
    return replace(layout, prefix=prefix.nonzero()[:, 0], computed=(~prefix).nonzero()[:, 0])


def _padded_layout(embeds: Tensor, positions: Tensor, mask: Any, plan: Plan) -> Layout:
    """The kept tokens of each sample in a row of its own, right-padded."""
    length = plan.keep.shape[1]
    samples = plan.keep.any(1).nonzero()[:, 0]
    keep = plan.keep[samples]
    longest = int(keep.sum(1).max())
    # A stable sort brings the kept tokens of each sample to the front, in their order.
    order = torch.sort((~keep).to(torch.uint8), dim=1, stable=True).indices[:, :longest]
    valid = keep.gather(1, order)
    inputs = {
        "inputs_embeds": embeds[samples[:, None], order],
        "position_ids": positions[..., samples[:, None], order],
        # A 2-D mask keeps transformers from reading gaps in the positions as packing.
        "attention_mask": valid.to(torch.long),
        "use_cache": False,
    }
    if mask is not None:
        cut = partial(cut_mask, samples=samples, order=order, valid=valid)
        masks = {k: cut(m) for k, m in mask.items()} if isinstance(mask, dict) else cut(mask)
        inputs["attention_mask"] = masks
    row, column = plan.predictors // length, plan.predictors % length
    place = keep.cumsum(1) - 1
    index = torch.searchsorted(samples, row)
    at = index * longest + place[index, column]
    return Layout(inputs, at, (len(samples), longest))
