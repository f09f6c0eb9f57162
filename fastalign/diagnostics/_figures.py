"""How every figure here looks: colours, resolution, axes and the file it is written to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
DPI = 150


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure at 150 dpi; the suffix of `path` is its format, folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """An empty figure, tied to no window and to no global state of matplotlib.

    Args:
        width, height: In inches.
        layout: matplotlib's layout engine; None leaves axes where they are put.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "fastalign[viz]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)  # drawn without a window and without pyplot's global state
    return figure


def line_style(i: int) -> dict[str, Any]:
    """Colour, marker and width of curve `i`, as options of `plot`."""
    color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
    return {"color": color, "marker": marker, "linewidth": 1.6}


def finish_axes(axes: Any, *, integers: bool) -> None:
    """Grid, frame and legend; `integers` keeps the x ticks whole."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=integers))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def check_curves(curves: Mapping[str, object]) -> None:
    """Raise ValueError unless there is a curve to draw."""
    if not curves:
        raise ValueError("curves must name at least one curve: got none")
