"""The contrast of label tokens, as data, as a page and as a figure."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastalign import losses
from fastalign.diagnostics._figures import new_figure
from fastalign.models import VLM, Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RAISED, _LOWERED = (0, 114, 178), (213, 94, 0)


class TokenContrast(NamedTuple):
    """A label token: its text, how much the image raises its logit, and its CAL weight."""

    text: str
    delta: float
    weight: float


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
    figure = new_figure(width, height, layout=None)
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
