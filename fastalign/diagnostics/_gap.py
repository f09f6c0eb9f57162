"""The gap between the modalities by first moments: centroids, norms and cosines of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure
from fastalign.diagnostics._modalities import check_image_tokens, each_state, places_of, to_model
from fastalign.models import VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Sums:
    """Of the tokens of one modality at one layer: all that the gap needs of them."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(width, dtype=torch.float64, device=device)
        self.units = torch.zeros_like(self.rows)
        self.norms = torch.zeros((), dtype=torch.float64, device=device)
        self.count, self.nonzero = 0, torch.zeros_like(self.norms)

    def add(self, rows: Tensor) -> None:
        x = rows.detach().double()
        norms = x.norm(dim=1, keepdim=True)
        self.rows += x.sum(0)
        self.units += (x / norms.masked_fill(norms == 0, 1.0)).sum(0)
        self.norms += norms.sum()
        self.nonzero += (norms > 0).sum()
        self.count += len(x)

    def within(self) -> float:
        """Mean cosine of all pairs of different tokens: |sum u|^2 less the n cosines of itself."""
        pairs = self.count * (self.count - 1)
        if not pairs:
            return math.nan
        return float((self.units.square().sum() - self.nonzero) / pairs)


def modality_gap(vlm: VLM, batches: Iterable[Batch]) -> dict[str, Any]:
    r"""How far the clouds of vision and text tokens lie apart at each layer, by first moments.

    One pass; each layer's output is summed as it comes and no states are stored. A zero row has
    cosine 0 with everything.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batches: Of images and text; tensors are moved to the model's device.

    Returns:
        Columns, with an entry for each of "layer" (0, what the decoder is handed, to K, after the
        final norm): "distance" $|c_v - c_t|$ of the centroids; "relative_distance", the same over
        the mean norm of text tokens; "cosine" of the centroids; "vision_norm" and "text_norm", mean
        norms; "within_vision" and "within_text", mean cosine of two different tokens; "between", of
        a vision and a text token. Also "vision_tokens" and "text_tokens", the tokens seen.

    Raises:
        ValueError: The batches held no image tokens, or no text; images enter the model by
            cross-attention (Mllama) and are no tokens.
    """
    check_image_tokens(vlm)
    sums: dict[int, tuple[_Sums, _Sums]] = {}
    counts = {"vision_tokens": 0, "text_tokens": 0}
    with evaluating(vlm.model):
        for batch in batches:
            inputs = to_model(vlm, batch)
            places = [places_of(vlm.vision_mask(inputs)), places_of(vlm.text_mask(inputs))]
            for name, found in zip(counts, places, strict=True):
                counts[name] += len(found)

            def visit(k: int, hidden: Tensor, places: list[Tensor] = places) -> None:
                rows = hidden.flatten(0, 1)
                if k not in sums:
                    width = rows.shape[1]
                    sums[k] = _Sums(width, rows.device), _Sums(width, rows.device)
                for total, found in zip(sums[k], places, strict=True):
                    total.add(rows[found.to(rows.device)])

            each_state(vlm, inputs, visit)
    if not all(counts.values()):
        raise ValueError(f"batches must hold image tokens and text tokens: got {counts}")
    rows = [{"layer": k} | _moments(*sums[k]) for k in sorted(sums)]
    return {name: [row[name] for row in rows] for name in rows[0]} | counts


def _moments(vision: _Sums, text: _Sums) -> dict[str, float]:
    first, second = vision.rows / vision.count, text.rows / text.count
    distance = float((first - second).norm())
    text_norm = float(text.norms) / text.count
    lengths = float(first.norm() * second.norm())
    return {
        "distance": distance,
        "relative_distance": distance / text_norm if text_norm else math.nan,
        "cosine": float(first @ second) / lengths if lengths else math.nan,
        "vision_norm": float(vision.norms) / vision.count,
        "text_norm": text_norm,
        "within_vision": vision.within(),
        "within_text": text.within(),
        "between": float(vision.units @ text.units) / (vision.count * text.count),
    }


_COSINES = {
    "within_vision": "two vision tokens",
    "within_text": "two text tokens",
    "between": "a vision and a text token",
}


def plot_modality_gap(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Three panels by layer: distance of the centroids, mean norms, mean cosines.

    Args:
        curves: Names to results of `modality_gap`.
    """
    check_curves(curves)
    figure = new_figure(13.2, 4.0)
    distance, norms, cosines = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
    for i, (name, data) in enumerate(curves.items()):
        before = f"{name}, " if len(curves) > 1 else ""
        layer = data["layer"]
        distance.plot(layer, data["relative_distance"], label=name, **line_style(i))
        for j, kind in enumerate(("vision", "text")):
            style = line_style(i) | {"linestyle": ("-", "--")[j]}
            norms.plot(layer, data[f"{kind}_norm"], label=before + kind, **style)
        for j, (key, label) in enumerate(_COSINES.items()):
            style = line_style(j if len(curves) == 1 else i) | {"linestyle": ("-", "--", ":")[j]}
            cosines.plot(layer, data[key], label=before + label, **style)
    distance.set_ylabel("distance of the centroids\n(over the mean text norm)")
    norms.set_ylabel("mean norm of a token")
    for axes in (distance, norms):
        axes.set_yscale("log")
    cosines.set_ylabel("mean cosine")
    for axes in (distance, norms, cosines):
        axes.set_xlabel("decoder layer (0: its input)")
        finish_axes(axes, integers=True)
    figure.suptitle("Vision and text tokens by layer")
    return figure
