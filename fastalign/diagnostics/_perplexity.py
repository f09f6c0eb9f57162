"""Perplexity of running text, of a model and of the same model without its adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.adapters import NAME, disabled
from fastalign.diagnostics._figures import COLORS, check_curves, finish_axes, new_figure
from fastalign.diagnostics._intervals import ratio_interval
from fastalign.diagnostics._modalities import to_model
from fastalign.diagnostics._scores import Scores, check_text_alone, label_scores
from fastalign.models import IGNORE_INDEX, VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WINDOW = 1024

# Inputs with a value for each token, beside those that every model takes.
_ALIGNED = ("token_type_ids", "mm_token_type_ids")

Window = tuple[list[int], int]


def perplexity(
    vlm: VLM,
    tokenizer: Any,
    texts: Iterable[str | Iterable[str]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    prefix: Batch | None = None,
) -> dict[str, Any]:
    r"""Perplexity of the language model on running text, $\exp(\frac1t \sum_i CE_i)$.

    A text longer than a window is read in windows that overlap: each goes `stride` tokens on, and
    counts only tokens that no window before it has counted, so that every token counts once, with
    the tokens before it as far as its window reaches. A tokenizer that begins texts with a token of
    its own has it at the front of every window, not counted; without one the first token of a text
    has no predictor and does not count.

    With an adapter attached, the model is measured without it too, on the same windows. An adapter
    that acts on images only (all of this package) changes nothing on text alone; what changes it is
    training of the language model. Behind an image in `prefix`, an adapter has its say.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        tokenizer: Its processor or tokenizer.
        texts: Each a string, or its pieces in order, which are tokenised one by one: so a file too
            long for memory is read, see `documents`.
        window: Tokens of a window; 1024 by default, or what the model can take if that is less.
        stride: Tokens from one window to the next; half a window by default.
        batch_size: Windows in a forward pass.
        max_tokens: End after the window in which so many tokens have been counted.
        prefix: One sample, without labels and padding, that stands before every window in place of
            the tokenizer's first token: an image in its prompt, say. Its tokens are not counted,
            and come on top of `window`.

    Returns:
        "nats" per token with its 95 % "interval" over windows, "perplexity", "tokens", "windows",
        "window", "stride"; "per_window" and "tokens_per_window", of each window. With an adapter
        also "without_adapter" ("nats", "interval", "perplexity", "per_window") and
        "difference" ("nats" with less without the adapter, and its paired "interval"). Windows of
        one text are not independent, so that intervals are too narrow where few texts are long.

    Raises:
        ValueError: An option is out of range, there is no token to count, the model demands an
            image and `prefix` has none, or it lets a token see those after it.
    """
    if prefix is None:
        check_text_alone(vlm)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    begin = tokenizer("a")["input_ids"][:1]
    begin = [i for i in begin if i == tokenizer.bos_token_id]
    if prefix is not None:
        if len(prefix["input_ids"]) != 1:
            raise ValueError(f"prefix must be one sample: got {len(prefix['input_ids'])}")
        begin = prefix["input_ids"][0].tolist()
    extra = 0 if prefix is None else len(begin)
    most = getattr(vlm.config.get_text_config(), "max_position_embeddings", None) or _WINDOW
    window = min(most - extra, _WINDOW) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 2 <= window <= most - extra or not 1 <= stride < window or batch_size < 1:
        raise ValueError(
            f"window must lie in 2..{most - extra}, stride in 1..window - 1 and batch_size be at "
            f"least 1: got {window}, {stride} and {batch_size}"
        )
    windows = (
        found
        for text in texts
        for found in _windows(_tokens(tokenizer, text), window + extra, stride, begin)
    )
    scores, base = _measure(vlm, windows, batch_size, max_tokens, prefix)
    tokens = [int(n) for n in scores.tokens.tolist()]
    about = {"tokens": sum(tokens), "windows": len(tokens), "window": window, "stride": stride}
    result = _summary(scores) | about | {"tokens_per_window": tokens}
    if base is not None:
        nats, interval = ratio_interval(scores.ce - base.ce, scores.tokens)
        result |= {"without_adapter": _summary(base)}
        result |= {"difference": {"nats": nats, "interval": interval}}
    return result


def _measure(
    vlm: VLM,
    windows: Iterator[Window],
    batch_size: int,
    max_tokens: int | None,
    prefix: Batch | None,
) -> tuple[Scores, Scores | None]:
    """Of each window: with what is attached to the model, and without its adapter if it has one."""
    found: list[Scores] = []
    base: list[Scores] = []
    counted = 0.0
    with evaluating(vlm.model):
        while group := list(islice(windows, batch_size)):
            inputs = to_model(vlm, _batch(vlm, group, prefix))
            if not found and prefix is None:
                _check_causal(vlm, inputs)
            found.append(label_scores(vlm, inputs))
            if getattr(vlm.model, NAME, None) is not None:
                with disabled(vlm.model):
                    base.append(label_scores(vlm, inputs))
            counted += float(found[-1].tokens.sum())
            if max_tokens is not None and counted >= max_tokens:
                break
    if not counted:
        raise ValueError("texts must hold at least one token with a token before it: got none")
    return Scores.join(found), Scores.join(base) if base else None


def _summary(scores: Scores) -> dict[str, Any]:
    nats, interval = ratio_interval(scores.ce, scores.tokens)
    try:
        found = math.exp(nats)
    except OverflowError:
        found = math.inf
    per_window = (scores.ce / scores.tokens).tolist()
    return {"nats": nats, "interval": interval, "perplexity": found, "per_window": per_window}


def _tokens(tokenizer: Any, text: str | Iterable[str]) -> Iterator[int]:
    for piece in [text] if isinstance(text, str) else text:
        # Not verbose: it would warn of lengths that the windows are there for.
        yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]


def _windows(tokens: Iterable[int], window: int, stride: int, begin: list[int]) -> Iterator[Window]:
    """The ids of each window, and the place of the first that counts."""
    size = window - len(begin)
    held: list[int] = []
    counted = 0
    for token in tokens:
        if len(held) == size:
            del held[: min(stride, size)]
            counted = len(held)
        held.append(token)
        if len(held) == size:
            yield [*begin, *held], max(len(begin) + counted, 1)
    if counted < len(held) < size and len(begin) + len(held) > 1:
        yield [*begin, *held], max(len(begin) + counted, 1)


def _batch(vlm: VLM, windows: list[Window], prefix: Batch | None) -> dict[str, Any]:
    longest = max(len(ids) for ids, _ in windows)

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    batch: dict[str, Any] = {
        "input_ids": padded((ids for ids, _ in windows), 0),
        "attention_mask": padded(([1] * len(ids) for ids, _ in windows), 0),
        "labels": padded(([IGNORE_INDEX] * n + ids[n:] for ids, n in windows), IGNORE_INDEX),
    }
    first = {} if prefix is None else {k: v for k, v in prefix.items() if k not in batch}
    paligemma = vlm.config.model_type == "paligemma"  # of type 0 sees all other tokens of type 0
    if paligemma and prefix is None:
        first["token_type_ids"] = torch.zeros(1, 0, dtype=torch.long)
    for name, value in first.items():
        if name in _ALIGNED:
            text = value.new_full((1, longest - value.shape[1]), int(paligemma))
            value = torch.cat([value, text], 1)
        elif name == "cross_attention_mask":  # the text sees what the last token of the prefix sees
            last = value[:, -1:].expand(-1, longest - value.shape[1], -1, -1)
            value = torch.cat([value, last], 1)
        repeated = isinstance(value, Tensor)
        batch[name] = torch.cat([value] * len(windows)) if repeated else value
    return batch


def _check_causal(vlm: VLM, inputs: Mapping[str, Tensor]) -> None:
    """Raise where a token changes what the model makes of those before it."""
    short = {k: v[:1, :16] for k, v in inputs.items() if k != "labels"}
    ids = short["input_ids"]
    end = int(short["attention_mask"].sum())
    if end < 2:
        return
    other = ids.clone()
    other[:, end - 1] = torch.where(ids[:, end - 1] == ids[:, 0], ids[:, end - 2], ids[:, 0])
    before, after = (
        vlm.forward({**short, "input_ids": x}).hidden[:, : end - 1].float() for x in (ids, other)
    )
    if float((before - after).abs().max()) > 0.01 * float(before.abs().max()):
        raise ValueError(
            f"model must read text from left to right: in {type(vlm.model).__name__} a token "
            "changes the states of tokens before it, so that it has no perplexity"
        )


def plot_perplexity(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Nats per token of each window, with the mean; without the adapter as well where measured.

    Args:
        curves: Names to results of `perplexity`.
    """
    check_curves(curves)
    shown: dict[str, Mapping[str, Any]] = {}
    for name, data in curves.items():
        shown[name] = data
        if "without_adapter" in data:
            shown[f"{name}, without its adapter"] = data["without_adapter"]
    figure = new_figure(6.8, 4.0)
    axes = figure.add_subplot()
    for i, (name, data) in enumerate(shown.items()):
        color = COLORS[i % len(COLORS)]
        label = f"{name} (perplexity {data['perplexity']:.4g})"
        values = data["per_window"]
        marker = "o" if len(values) < 60 else ""
        style: dict[str, Any] = {"marker": marker, "markersize": 3, "linewidth": 0.8}
        axes.plot(range(1, len(values) + 1), values, color=color, label=label, alpha=0.7, **style)
        axes.axhline(data["nats"], color=color, linestyle="--", linewidth=1.2)
    axes.set_xlabel("window")
    axes.set_ylabel("cross-entropy (nats / token)")
    axes.set_title("Running text (lower: better predicted)")
    finish_axes(axes, integers=True)
    return figure
