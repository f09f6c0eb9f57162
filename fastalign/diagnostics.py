"""What alignment does to a model, as data and as figures.

Every diagnostic is a function that returns plain data and one, named `plot_*`, that draws it and
returns a `matplotlib.figure.Figure`; nothing is shown and no global setting of matplotlib changes.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastalign import losses
from fastalign.models import VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fastalign.metrics import ModalityIntegrationRate

# Okabe and Ito's colours, which readers with any colour vision tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
_RAISED, _LOWERED = (0, 114, 178), (213, 94, 0)
DPI = 150


class TokenContrast(NamedTuple):
    """A label token: its text, how much the image raises its logit, and its CAL weight."""

    text: str
    delta: float
    weight: float


class PatchSimilarity(NamedTuple):
    """Cosines of all pairs of patches, (n, n) float32, and how far the two sets of them agree."""

    student: Tensor
    teacher: Tensor
    correlation: float


# -- modality integration rate -------------------------------------------------------------------


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
    _check_curves(curves)
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    for i, (name, data) in enumerate(curves.items()):
        label = f"{name} (MIR {data['mir']:.3f})"
        axes.plot(data["layer"], data["fid"], label=label, markersize=4, **_line(i))
    axes.set_yscale("log")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("Fréchet distance, vision to text\n(scaled by mean text norm)")
    axes.set_title("Modality gap by layer (lower: closer)")
    _finish(axes, integers=True)
    return figure


# -- contrast of label tokens --------------------------------------------------------------------


def token_contrast(
    vlm: VLM,
    processor: Any,
    batch: Batch,
    *,
    mode: str = "drop",
    clamp: tuple[float, float] = (1.0, 5.0),
    window: int = 3,
) -> list[list[TokenContrast]]:
    """How much the image raises the logit of each label token, and the weight CAL gives it.

    Args:
        vlm: The model.
        processor: Its processor or tokenizer, which turns ids back into text.
        batch: With labels, on the model's device.
        mode: See `VLM.contrast`.
        clamp, window: See `losses.contrast_weights`.

    Returns:
        For each sample, its label tokens in order; "\\ufffd" stands for a token that holds part of
        a character.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    delta = vlm.contrast(batch, mode=mode)
    rows, _, labels = vlm.label_rows(batch)
    counts = torch.bincount(rows, minlength=len(batch["input_ids"]))
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    weights = losses.contrast_weights(delta, ends, clamp=clamp, window=window).tolist()
    values, ids, offsets = delta.tolist(), labels.tolist(), ends.tolist()
    samples = []
    for start, end in zip(offsets, offsets[1:], strict=False):
        texts = _pieces(tokenizer, ids[start:end])
        columns = zip(texts, values[start:end], weights[start:end], strict=True)
        samples.append([TokenContrast(*column) for column in columns])
    return samples


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds, which keeps spaces that decoding it alone would lose."""
    done, pieces = "", []
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("\ufffd") or not text.startswith(done):
            pieces.append("\ufffd" if text.endswith("\ufffd") else tokenizer.decode(ids[end - 1]))
            continue
        pieces.append(text[len(done) :])
        done = text
    return pieces


def contrast_html(samples: Sequence[Sequence[TokenContrast]], *, title: str = "Contrast") -> str:
    """The heat map as one HTML page that needs nothing else; all text in it is escaped."""
    scale = _scale(samples)
    blocks = []
    for tokens in samples:
        spans = []
        for token in tokens:
            r, g, b = _shade(token.delta, scale)
            hover = f"delta {token.delta:+.3f}, weight {token.weight:.3f}"
            spans.append(
                f'<span style="background:rgb({r},{g},{b})" title="{hover}">'
                f"{html.escape(token.text)}<sub>{token.delta:+.1f}</sub></span>"
            )
        blocks.append(f"<p>{''.join(spans)}</p>")
    low, high = (f"rgb{_shade(sign * scale, scale)}" for sign in (-1, 1))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 17px/2.2 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em;
  color: #111; background: #fff }}
p span {{ padding: .2em 0; white-space: pre-wrap; border-radius: .2em }}
sub {{ font-size: .6em; color: #333; padding: 0 .3em }}
.key {{ display: inline-block; width: 10em; height: .8em; margin: 0 .5em;
  background: linear-gradient(90deg, {low}, #fff, {high}) }}
</style></head><body><h1>{html.escape(title)}</h1>
<p>delta, logit with the image less logit without it:
&minus;{scale:.1f}<span class="key"></span>+{scale:.1f}</p>
{chr(10).join(blocks)}
</body></html>
"""


def plot_token_contrast(
    samples: Sequence[Sequence[TokenContrast]], *, title: str = "", columns: int = 72
) -> Figure:
    """The heat map as a figure: tokens as coloured boxes over their deltas.

    Args:
        samples: From `token_contrast`.
        title: Over the figure.
        columns: Characters in a line.

    Raises:
        ValueError: There is no token to show.
    """
    if not any(samples):
        raise ValueError("samples must hold at least one token: got none")
    from matplotlib.patches import Rectangle

    # Inches; 0.602 em is the advance of DejaVu Sans Mono, which matplotlib brings along.
    char, row, top = 0.602 * 10 / 72, 0.36, 0.75
    placed, y = [], 0.0
    for tokens in samples:
        for line in _wrapped(tokens, columns):
            placed += [(x, y, width, token) for x, width, token in line]
            y += row
        y += 0.12
    width, height = char * columns + 0.5, y + top
    figure = _figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.25, width - 0.25), ylim=(height - top, -top))
    axes.set_axis_off()
    style: dict[str, Any] = {"va": "center", "color": "#111111", "parse_math": False}
    mono: dict[str, Any] = {"ha": "center", "family": "DejaVu Sans Mono"}
    scale = _scale(samples)
    for x, y, size, token in placed:
        left, wide = x * char, size * char
        color = tuple(c / 255 for c in _shade(token.delta, scale))
        axes.add_patch(Rectangle((left, y), wide, 0.22, facecolor=color, edgecolor="white"))
        axes.text(left + wide / 2, y + 0.11, _visible(token.text), size=10, **mono, **style)
        axes.text(left + wide / 2, y + 0.285, f"{token.delta:+.1f}", size=6.5, **mono, **style)
    key = "delta: logit with the image less logit without it; blue raised, orange lowered"
    axes.text(0, -0.55, title, size=12, **style)
    axes.text(0, -0.25, key, size=8.5, **style)
    return figure


def _wrapped(
    tokens: Sequence[TokenContrast], columns: int
) -> list[list[tuple[float, float, TokenContrast]]]:
    """Lines of (x, width, token) in characters; a delta below a token needs five at its size."""
    lines: list[list[tuple[float, float, TokenContrast]]] = [[]]
    x = 0.0
    for token in tokens:
        width = max(len(_visible(token.text)) + 0.8, 4.0)
        if lines[-1] and x + width > columns:
            lines.append([])
            x = 0.0
        lines[-1].append((x, width, token))
        x += width
    return [line for line in lines if line]


def _visible(text: str) -> str:
    stripped = text.strip(" ")
    shown = stripped.replace("\n", "\\n").replace("\t", "\\t") or "\u2423"
    return shown if len(shown) <= 40 else shown[:39] + "…"


def _scale(samples: Iterable[Iterable[TokenContrast]]) -> float:
    """The delta of full colour: the largest there is, so that signs and sizes compare."""
    sizes = [abs(t.delta) for tokens in samples for t in tokens if math.isfinite(t.delta)]
    return max(sizes, default=0.0) or 1.0


def _shade(delta: float, scale: float) -> tuple[int, int, int]:
    """White at 0; at most 70 % colour, on which dark text keeps a contrast above 4.5."""
    if not math.isfinite(delta):
        return (190, 190, 190)
    share = 0.7 * min(abs(delta) / scale, 1.0)
    end = _RAISED if delta > 0 else _LOWERED
    return tuple(round(255 + share * (c - 255)) for c in end)  # type: ignore[return-value]


# -- similarity of patches -----------------------------------------------------------------------


def patch_similarity(student: Tensor, teacher: Tensor) -> PatchSimilarity:
    """Cosines between all patches of one image, in the student and in the teacher.

    Args:
        student: Patch features, (n, d), any floating dtype.
        teacher: Patch features of the same patches, (n, dt).

    Returns:
        Both matrices, and the Pearson correlation between their entries off the diagonal; it is
        NaN where one of them is constant. A zero row has similarity 0 with everything.

    Raises:
        ValueError: They are no matrices with the same number of rows, at least 3.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 3:
        raise ValueError(
            "student and teacher must be (n, d) and (n, dt) with the same n >= 3: got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    rows = [torch.nn.functional.normalize(x.detach().double(), dim=1) for x in (student, teacher)]
    first, second = (x @ x.T for x in rows)
    above = torch.ones_like(first, dtype=torch.bool).triu(1)
    pairs = torch.stack([first[above], second.to(first.device)[above]])
    pairs = pairs - pairs.mean(1, keepdim=True)
    norms = pairs.norm(dim=1)
    # Rounding leaves a constant matrix with a spread near 1e-16, which correlates with anything.
    flat = bool((norms <= 1e-12 * pairs.shape[1] ** 0.5).any())
    correlation = math.nan if flat else float(pairs[0] @ pairs[1] / norms.prod())
    return PatchSimilarity(first.float().cpu(), second.float().cpu(), correlation)


def plot_patch_similarity(
    before: PatchSimilarity,
    after: PatchSimilarity | None = None,
    *,
    grid: tuple[int, int],
    query: tuple[int, int] | None = None,
) -> Figure:
    """Teacher and student side by side: one patch against all (above), and all pairs (below).

    Each panel has its own colour range, from the 1st to the 99th percentile off the diagonal, as
    the correlation in the titles does not depend on it either.

    Args:
        before: The student before alignment, with its teacher.
        after: The student after it, shown beside it.
        grid: Rows and columns of patches.
        query: Row and column of the patch above; the middle one by default.

    Raises:
        ValueError: `grid` has another number of patches, or `query` lies outside it.
    """
    height, width = grid
    if height * width != len(before.student):
        raise ValueError(
            f"grid must have one place for each of {len(before.student)} patches: got {grid}"
        )
    row, column = (height // 2, width // 2) if query is None else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query must lie in the {height} x {width} grid: got {query}")
    panels = [("teacher", before.teacher), _panel("student before", before)]
    if after is None:
        panels[1] = _panel("student", before)
    else:
        panels.append(_panel("student after", after))
    figure = _figure(3.3 * len(panels), 6.2)
    for i, (name, cosines) in enumerate(panels):
        off = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
        low, high = (float(torch.quantile(off[: 2**24], q)) for q in (0.01, 0.99))
        whole = (("patch", cosines), ("map", cosines[row * width + column].view(height, width)))
        for kind, values in whole:
            axes = figure.add_subplot(
                2, len(panels), i + 1 + (len(panels) if kind == "patch" else 0)
            )
            image = axes.imshow(values.numpy(), cmap="cividis", vmin=low, vmax=high)
            figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
            if kind == "map":
                axes.plot(
                    column, row, marker="s", color="white", markerfacecolor="none", ms=9, mew=2
                )
                axes.set_title(name)
                axes.set_xlabel("patch column")
                axes.set_ylabel("patch row")
            else:
                axes.set_xlabel("patch")
                axes.set_ylabel("patch")
    figure.suptitle(f"Cosine to patch ({row}, {column}), marked, and of all pairs of patches")
    return figure


def _panel(name: str, similarity: PatchSimilarity) -> tuple[str, Tensor]:
    return f"{name}\n(correlation {similarity.correlation:.3f})", similarity.student


# -- learning curves -----------------------------------------------------------------------------


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
    _check_curves(curves)
    figure = _figure(5.2 * len(terms), 3.6)
    for place, term in enumerate(terms, start=1):
        if not any(term in data for data in curves.values()):
            known = sorted({name for data in curves.values() for name in data})
            raise ValueError(f"terms must be columns of a run: got {term!r}, known are {known}")
        axes = figure.add_subplot(1, len(terms), place)
        for i, (name, data) in enumerate(curves.items()):
            if term in data:
                style = _line(i) | {"marker": "o" if len(data["step"]) < 3 else ""}
                axes.plot(data["step"], data[term], label=name, **style)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(_UNITS.get(term, term))
        _finish(axes, integers=True)
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


# -- figures -------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure at 150 dpi; the suffix of `path` is its format, folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)


def _figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "fastalign[viz]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)  # type: ignore[arg-type]
    FigureCanvasAgg(figure)  # drawn without a window and without pyplot's global state
    return figure


def _line(i: int) -> dict[str, Any]:
    color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
    return {"color": color, "marker": marker, "linewidth": 1.6}


def _finish(axes: Any, *, integers: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=integers))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _check_curves(curves: Mapping[str, object]) -> None:
    if not curves:
        raise ValueError("curves must name at least one curve: got none")
