"""What a model reads from images: its labels with the right image, with another, and with none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.data import IMAGE_MARK, Record, parse_record
from fastalign.diagnostics._figures import COLORS, check_curves, new_figure
from fastalign.diagnostics._intervals import ratio_interval
from fastalign.diagnostics._modalities import to_model
from fastalign.diagnostics._scores import Scores, check_text_alone, label_scores
from fastalign.models import IGNORE_INDEX, VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS = ("image", "shuffled", "none")


def blind_accuracy(
    vlm: VLM,
    records: Sequence[Record | dict[str, Any]],
    collate: Callable[[Sequence[Record]], Batch],
    *,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Token accuracy and cross-entropy of answers with the right image, another's and none.

    The conditions are records of their own, which `collate` renders like any other: "shuffled" has
    the images of the record half the set further on (among those with as many images), "none" has
    no image and no image token. Answers are the same, and are teacher-forced: a token is right
    where it has the largest logit, given the answer before it.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        records: Each with an image, and another record with as many; or items that `parse_record`
            makes records of.
        collate: Records to a batch with labels, such as a `Collator`.
        batch_size: Records in a forward pass.

    Returns:
        For each of "image", "shuffled" and "none": "accuracy" and "cross_entropy" (nats) per label
        token, with 95 % intervals over samples ("accuracy_interval", "cross_entropy_interval").
        "difference" has the same for "shuffled" and "none": the value with the right image less
        that without it, paired by sample. Also "samples", "tokens", and "same_image", the number of
        records whose other image is their own (a file that several share).

    Raises:
        ValueError: A record has no image, or no other has as many; the answers of a record differ
            between conditions (a `max_length` that cuts them); or the model demands an image.
    """
    check_text_alone(vlm)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: got {batch_size}")
    given = [parse_record(r) if isinstance(r, dict) else r for r in records]
    others = _others(given)
    variants = {
        "image": given,
        "shuffled": [
            replace(r, images=given[i].images) for r, i in zip(given, others, strict=True)
        ],
        "none": [_without_images(record) for record in given],
    }
    parts: dict[str, list[Scores]] = {name: [] for name in CONDITIONS}
    with evaluating(vlm.model):
        for start in range(0, len(records), batch_size):
            end = start + batch_size
            inputs = {name: dict(collate(variants[name][start:end])) for name in CONDITIONS}
            _make_comparable(inputs, start)
            for name in CONDITIONS:
                parts[name].append(label_scores(vlm, to_model(vlm, inputs[name])))
    scores = {name: Scores.join(parts[name]) for name in CONDITIONS}
    right = scores["image"]
    if not bool(right.tokens.any()):
        raise ValueError("records must hold an answer with a token before it: got none")
    result: dict[str, Any] = {name: _rates(s.hits, s.ce, s.tokens) for name, s in scores.items()}
    result["difference"] = {
        name: _rates(right.hits - s.hits, right.ce - s.ce, s.tokens)
        for name, s in scores.items()
        if name != "image"
    }
    same = sum(given[i].images == r.images for r, i in zip(given, others, strict=True))
    about = {"samples": len(records), "tokens": int(right.tokens.sum()), "same_image": same}
    return result | about


def _others(records: Sequence[Record]) -> list[int]:
    """For each record, one with as many images: half the number of such records further on."""
    groups: dict[int, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(len(record.images), []).append(i)
    for number, group in groups.items():
        if number == 0 or len(group) < 2:
            raise ValueError(
                "records must each hold an image, and another record as many: got "
                f"{len(group)} with {number} images"
            )
    if not groups:
        raise ValueError("records must hold at least two records: got none")
    others = [0] * len(records)
    for group in groups.values():
        half = len(group) // 2
        for i, j in zip(group, group[half:] + group[:half], strict=True):
            others[i] = j
    return others


def _without_images(record: Record) -> Record:
    turns = tuple(
        replace(turn, text=turn.text.replace(IMAGE_MARK, "").strip("\n"))
        if IMAGE_MARK in turn.text
        else turn
        for turn in record.turns
    )
    return replace(record, turns=turns, images=())


def _make_comparable(inputs: dict[str, dict[str, Any]], start: int) -> None:
    """Check that answers are the same; leave out tokens without a predictor in one condition.

    Args:
        inputs: The batch of each condition; its labels are replaced.
        start: Number of its first record.
    """
    bare = (inputs["none"]["labels"][:, 0] != IGNORE_INDEX).tolist()
    expected = None
    for name, batch in inputs.items():
        labels = batch["labels"].clone()
        answers = [row[row != IGNORE_INDEX].tolist() for row in labels]
        if expected is not None and answers != expected:
            raise ValueError(
                "collate must give a record the same labels with and without its image: got "
                f"others for {name!r} in records {start}..{start + len(answers) - 1}; raise "
                "max_length if it cuts them"
            )
        expected = answers
        for row, alone in zip(labels, bare, strict=True):
            if alone:
                row[(row != IGNORE_INDEX).nonzero()[0]] = IGNORE_INDEX
        batch["labels"] = labels


def _rates(hits: Tensor, ce: Tensor, tokens: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in (("accuracy", hits), ("cross_entropy", ce)):
        found[name], found[f"{name}_interval"] = ratio_interval(values, tokens)
    return found


_LABELS = {"image": "right image", "shuffled": "another's image", "none": "no image"}


def plot_blind_accuracy(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy and cross-entropy in the three conditions, with intervals; a colour for each name.

    Args:
        curves: Names to results of `blind_accuracy`.
    """
    check_curves(curves)
    figure = new_figure(9.6, 3.8)
    width = 0.8 / len(curves)
    panels = (("accuracy", "token accuracy"), ("cross_entropy", "cross-entropy (nats / token)"))
    for place, (key, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for i, (name, data) in enumerate(curves.items()):
            x = [j + (i - (len(curves) - 1) / 2) * width for j in range(len(CONDITIONS))]
            values = [data[c][key] for c in CONDITIONS]
            ends = torch.tensor([data[c][f"{key}_interval"] for c in CONDITIONS])
            halves = (ends[:, 1] - torch.tensor(values)).nan_to_num(0.0).clamp_min(0).tolist()
            color = COLORS[i % len(COLORS)]
            axes.bar(x, values, width * 0.92, yerr=halves, color=color, label=name, capsize=3)
        axes.set_xticks(range(len(CONDITIONS)), [_LABELS[c] for c in CONDITIONS])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle("What the model reads from the image")
    return figure
