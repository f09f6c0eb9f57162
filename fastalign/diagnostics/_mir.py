"""The modality integration rate, layer by layer, as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
