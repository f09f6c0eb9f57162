"""The learning curves of runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def learning_curve(path: str | os.PathLike[str]) -> dict[str, list[float]]:
    """The lines of a run's `metrics.jsonl` as columns, one of them "step".

    Args:
        path: The file, or the folder that holds it. A value missing from a line is NaN.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty or a line is no JSON object with a step.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"path must be a metrics.jsonl or its folder: {path} is no file")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f'{path}, line {number}: must be an object with "step"')
        lines.append(line)
    if not lines:
        raise ValueError(f"path must hold at least one line: {path} holds none")
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name, math.nan) for line in lines] for name in names}


def plot_learning_curve(
    curves: Mapping[str, Mapping[str, Sequence[float]]], *, terms: Sequence[str] = ("loss",)
) -> Figure:
    """Terms against optimizer steps: a panel for each term, a curve for each run that has it.

    Args:
        curves: Names to results of `learning_curve`.
        terms: Columns to draw.

    Raises:
        ValueError: No run has one of the terms.
    """
    check_curves(curves)
    figure = new_figure(5.2 * len(terms), 3.6)
    for place, term in enumerate(terms, start=1):
        if not any(term in data for data in curves.values()):
            known = sorted({name for data in curves.values() for name in data})
            raise ValueError(f"terms must be columns of a run: got {term!r}, known are {known}")
        axes = figure.add_subplot(1, len(terms), place)
        for i, (name, data) in enumerate(curves.items()):
            if term in data:
                # Lines without the term, as most have no MIR, would leave its points unjoined.
                pairs = zip(data["step"], data[term], strict=True)
                points = [pair for pair in pairs if not math.isnan(pair[1])]
                style = line_style(i) | {"marker": "o" if len(points) < 3 else ""}
                axes.plot([p[0] for p in points], [p[1] for p in points], label=name, **style)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(_UNITS.get(term, term))
        finish_axes(axes, integers=True)
    return figure


_UNITS = {
    "loss": "loss (nats for a language loss)",
    "ce": "cross-entropy (nats / token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens / s",
    "images_per_s": "images / s",
    "peak_mib": "peak memory (MiB)",
}
