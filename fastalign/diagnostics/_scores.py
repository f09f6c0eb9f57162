"""Cross-entropy and hits of the labels of each sample, without the logits of a batch."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign import losses
from fastalign.models import VLM, Batch


class Scores(NamedTuple):
    """Sums over the labels of each sample, (b,) float64 on the CPU."""

    ce: Tensor
    hits: Tensor
    tokens: Tensor

    @classmethod
    def join(cls, parts: list[Scores]) -> Scores:
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def label_scores(vlm: VLM, inputs: Batch) -> Scores:
    """One pass in the caller's mode; `inputs` are on the model's device and hold labels."""
    samples, cols, labels = vlm.label_rows(inputs)
    hidden = vlm.forward(inputs, labels_only=True).hidden
    samples, cols, labels = (x.to(hidden.device) for x in (samples, cols, labels))
    out = losses.linear_cross_entropy(
        hidden[samples, cols],
        vlm.head.weight,
        labels,
        bias=vlm.head.bias,
        logit_scale=vlm.logit_scale,
        softcap=vlm.softcap,
        reduction="none",
        details=True,
    )
    zeros = torch.zeros(len(inputs["input_ids"]), dtype=torch.float64)
    at = samples.cpu()
    columns = (out.per_token, out.correct, torch.ones_like(out.per_token))
    return Scores(*(zeros.index_add(0, at, column.double().cpu()) for column in columns))


def check_text_alone(vlm: VLM) -> None:
    """Refuse a model that cannot run without an image.

    Raises:
        ValueError: Its forward demands pixels (BLIP-2, InstructBLIP).
    """
    pixels = inspect.signature(vlm.model.forward).parameters.get("pixel_values")
    if pixels is not None and pixels.default is inspect.Parameter.empty:
        raise ValueError(
            f"model must run on text alone: {type(vlm.model).__name__} demands an image in every "
            "sample"
        )
