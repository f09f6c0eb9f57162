"""The modality integration rate, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure
from fastalign.models import VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastalign.metrics import ModalityIntegrationRate


def mir_per_layer(metric: ModalityIntegrationRate) -> dict[str, Any]:
    """The state of a metric as data: {"mir": float, "layer": [1, ..., K], "fid": [K floats]}."""
    fid = metric.per_layer().tolist()
    return {"mir": float(metric.compute()), "layer": list(range(1, len(fid) + 1)), "fid": fid}


def measure_mir(
    vlm: VLM,
    batches: Iterable[Batch],
    *,
    method: Literal["newton_schulz", "eigh", "official_fast"] = "newton_schulz",
    outliers: Literal["remove", "median", "keep"] = "remove",
    text: Literal["all", "after"] = "all",
) -> dict[str, Any]:
    """Modality integration rate of a model over batches, which are taken in one by one.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batches: Of images and text; tensors are moved to the model's device.
        method, outliers: See `ModalityIntegrationRate`.
        text: "all" text tokens that are no padding; "after" only those after the last image, as
            the released code has it.

    Returns:
        `mir_per_layer` of the metric, with "vision_tokens" and "text_tokens", the tokens seen.

    Raises:
        ValueError: `text` is neither; or the batches held no image tokens, or no text.
    """
    from fastalign.metrics import ModalityIntegrationRate

    if text not in ("all", "after"):
        raise ValueError(f'text must be "all" or "after": got {text!r}')
    metric = ModalityIntegrationRate(
        vlm.num_layers, vlm.hidden_size, method=method, outliers=outliers
    )
    device = next(vlm.model.parameters()).device
    metric.to(device)
    counts = {"vision_tokens": 0, "text_tokens": 0}
    with evaluating(vlm.model):
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            vision, words = vlm.vision_mask(batch), vlm.text_mask(batch)
            if text == "after":
                seen = vision.cumsum(1)
                words = words & (seen > 0) & (seen == seen[:, -1:])
            states = vlm.hidden_states(batch)
            metric.update([h[vision] for h in states], [h[words] for h in states])
            counts["vision_tokens"] += int(vision.sum())
            counts["text_tokens"] += int(words.sum())
    if not all(counts.values()):
        raise ValueError(f"batches must hold image tokens and text tokens: got {counts}")
    return mir_per_layer(metric) | counts


def plot_mir_per_layer(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The Fréchet distance between the modalities at each layer, one curve for each name.

    Args:
        curves: Names to results of `mir_per_layer` or `measure_mir`.
    """
    check_curves(curves)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for i, (name, data) in enumerate(curves.items()):
        label = f"{name} (MIR {data['mir']:.3f})"
        axes.plot(data["layer"], data["fid"], label=label, markersize=4, **line_style(i))
    axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("Fréchet distance, vision to text\n(scaled by mean text norm)")
    axes.set_title("Modality gap by layer (lower: closer)")
    finish_axes(axes, integers=True)
    return figure
