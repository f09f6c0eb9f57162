"""CAL's contrast: the forward with the image, one without it, and the difference of logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.models._branch import Plan, make_plan
from fastalign.models._corrupt import corrupt
from fastalign.models._module import evaluating
from fastalign.models._rows import take_rows
from fastalign.models._side_stream import SideStream, is_sharded
from fastalign.ops._check import check_one_of

if TYPE_CHECKING:
    from fastalign.models._vlm import VLM

Batch = Mapping[str, Any]

CONTRAST_MODES = ("drop", "mask", "patch-mask", "blur")
# Models whose processor lays out the patches of an image as `corrupt` takes them apart.
_PATCH_ORDER_OF_QWEN2_VL = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"}


class Prefix(NamedTuple):
    """What the tokens before the images are in the forward with them.

    Attributes:
        rows: Their places in the flattened batch, (k,).
        inputs: Of each decoder layer, (k, d).
    """

    rows: Tensor
    inputs: dict[nn.Module, Tensor]


@dataclass(frozen=True)
class Forward:
    """What one pass through a model left behind.

    Attributes:
        hidden: Output of the decoder after its final norm, (b, L, d).
        layers: Outputs of the decoder layers that were asked for, {k: (b, L, d)}, k from 1.
        decoder_inputs: The keyword arguments that the model handed to its decoder.
        prefix: Some rows' states, where the contrast asked for them.
        looks: Of a Q-Former with images: where each query looks, (images, queries, n) float32 over
            the n tokens of the vision tower; see `query_attention`.
    """

    hidden: Tensor
    layers: dict[int, Tensor]
    decoder_inputs: dict[str, Any]
    prefix: Prefix | None = None
    looks: Tensor | None = None


@dataclass(frozen=True)
class Contrast:
    """How the image is taken away; the options of `VLM.contrast`."""

    mode: str = "drop"
    packed: bool = True
    backend: str = "auto"
    interleave: bool | None = None
    ratio: float = 0.7
    sigma: float = 10.0

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, CONTRAST_MODES)

    def take(self, vlm: VLM, batch: Batch) -> tuple[Forward, Tensor]:
        """The forward with the image, with its gradient, and delta, without one."""
        plan = _plan(vlm, batch)
        interleave = is_sharded(vlm.layers) if self.interleave is None else self.interleave
        if self.mode == "drop" and interleave:
            return self._interleaved(vlm, batch, plan)
        prefix = plan.prefix_rows if self.mode == "drop" and self.packed else None
        out = vlm._run(batch, (), plan.rows, prefix_rows=prefix)
        return out, self._given(vlm, batch, out, plan)

    def given(self, vlm: VLM, batch: Batch, out: Forward) -> Tensor:
        """Delta, given the forward with the image."""
        return self._given(vlm, batch, out, _plan(vlm, batch))

    @torch.no_grad()
    def _given(self, vlm: VLM, batch: Batch, out: Forward, plan: Plan) -> Tensor:
        if self.mode == "drop":
            hidden = []
            if len(plan.predictors):
                prefix = out.prefix if self.packed and _fits(out.prefix, vlm, plan) else None
                layout = vlm._branch.layout(
                    out.decoder_inputs, plan, self.packed, self.backend, prefix is not None
                )
                hidden = [vlm._branch.run(layout, {} if prefix is None else prefix.inputs)]
            return _dropped(vlm, out, plan, hidden)
        if self.mode == "mask":
            image, text = vlm.vision_mask(batch), vlm.text_mask(batch)
            states = vlm._branch.masked(out.decoder_inputs, image, text)
        else:
            with evaluating(vlm.model):
                states = vlm._run(self._corrupted(vlm, batch), (), plan.rows).hidden
        with_image = vlm.label_logits(take_rows(out.hidden, plan.rows), plan.labels)
        without = vlm.label_logits(take_rows(states, plan.rows), plan.labels)
        return torch.where(plan.after_image, with_image - without, 0.0)

    def _interleaved(self, vlm: VLM, batch: Batch, plan: Plan) -> tuple[Forward, Tensor]:
        streams: list[SideStream] = []
        prefix = plan.prefix_rows if self.packed else None

        def begin(captured: dict[str, Any]) -> None:
            with torch.no_grad():
                if len(plan.predictors):
                    layout = vlm._branch.layout(
                        captured, plan, self.packed, self.backend, prefix is not None
                    )
                    streams.append(SideStream(vlm._branch, layout, prefix))

        try:
            out = vlm._run(batch, (), plan.rows, begin)
        finally:
            for stream in streams:
                stream.close()
        with torch.no_grad():
            return out, _dropped(vlm, out, plan, [stream.finish() for stream in streams])

    def _corrupted(self, vlm: VLM, batch: Batch) -> Batch:
        """The batch with its images masked or blurred; itself where it has none."""
        if batch.get("pixel_values") is None:
            return batch
        kind = vlm.config.model_type
        if "image_grid_thw" in batch and kind not in _PATCH_ORDER_OF_QWEN2_VL:
            raise ValueError(
                f"mode {self.mode!r} does not know in which order {kind} lays out the patches of "
                'an image: use mode="drop" or "mask"'
            )
        merge = getattr(vlm.config.vision_config, "spatial_merge_size", 2)
        pixels = corrupt(batch, self.mode, ratio=self.ratio, sigma=self.sigma, merge_size=merge)
        return {**batch, "pixel_values": pixels}


def _plan(vlm: VLM, batch: Batch) -> Plan:
    return make_plan(vlm.vision_mask(batch), vlm.text_mask(batch), *vlm.label_rows(batch))


def _fits(prefix: Prefix | None, vlm: VLM, plan: Plan) -> bool:
    """Whether it is of these labels, and of every layer: a model may drop some while it trains."""
    rows = plan.prefix_rows
    if prefix is None or rows is None or len(prefix.inputs) != vlm.num_layers:
        return False
    return rows is prefix.rows or torch.equal(rows, prefix.rows)


def _dropped(vlm: VLM, out: Forward, plan: Plan, hidden: list[Tensor]) -> Tensor:
    """Delta of all labels, given the active predictors' states in the image-free forward.

    `hidden` holds them, (active, d), or nothing where no label is active.
    """
    active, labels = plan.active, plan.labels[plan.active]
    with_image = vlm.label_logits(take_rows(out.hidden, plan.rows[active]), labels)
    delta = with_image.new_zeros(len(active))
    for states in hidden:
        delta[active] = with_image - vlm.label_logits(states, labels)
    return delta
