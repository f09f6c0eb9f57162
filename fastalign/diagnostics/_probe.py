"""What a linear classifier reads from the visual states of each layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure
from fastalign.diagnostics._intervals import wilson_interval
from fastalign.diagnostics._modalities import (
    check_image_tokens,
    check_layers,
    each_state,
    places_of,
    to_model,
)
from fastalign.diagnostics._sklearn import sklearn
from fastalign.models import VLM, Batch, evaluating, first_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOWER = -1  # the key of the vision tower's output among the layers'


def linear_probe(
    vlm: VLM,
    batches: Iterable[tuple[Batch, Sequence[int]]],
    layers: Sequence[int] | None = None,
    *,
    folds: int = 5,
    regularization: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of a linear classifier on the mean visual state of each image, by decoder layer.

    Features are standardised and classified by scikit-learn's logistic regression; each image is
    judged by the classifier of the fold that it is left out of. Beside it stands a control: the
    same on classes shuffled among the images, which ought to come out at chance.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batches: Pairs of a batch, with an image in every sample, and the class of each sample.
        layers: 0, what the decoder is handed, to K; all by default.
        folds: Of the cross-validation, from 2 on; every class needs as many images.
        regularization: C of the logistic regression; smaller is stronger.
        seed: Of the folds and of the shuffled classes.

    Returns:
        Columns with an entry for each of "layer": "accuracy", "interval" (Wilson's, 95 %),
        "shuffled", the control; "tower", the same three for the vision tower's output, or None
        where its rows do not tell the images of a batch apart (then batches of one sample help);
        "chance", the share of the most frequent class; "samples", "classes", "folds", "seed".

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: A layer does not exist, a sample has no image, classes and samples differ in
            number, there is one class only or fewer images of one than `folds`, an option is out of
            range, or images enter the model by cross-attention (Mllama).
    """
    sklearn("linear_model")
    check_image_tokens(vlm)
    chosen = check_layers(vlm, layers, first=0)
    if folds < 2 or regularization <= 0:
        raise ValueError(
            f"folds must be at least 2 and regularization above 0: got {folds} and {regularization}"
        )
    features, classes = _features(vlm, batches, chosen)
    sizes = Counter(classes)
    if len(sizes) < 2 or min(sizes.values()) < folds:
        raise ValueError(
            f"batches must hold at least two classes with at least folds = {folds} images each: "
            f"got {len(sizes)} classes, the smallest with {min(sizes.values(), default=0)}"
        )
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [classes[i] for i in order]
    how = (folds, regularization, seed)
    judged = {}
    for k, rows in features.items():
        x = rows.double().numpy()
        hits = _hits(x, classes, *how)
        judged[k] = {
            "accuracy": hits / len(classes),
            "interval": wilson_interval(hits, len(classes)),
            "shuffled": _hits(x, shuffled, *how) / len(classes),
        }
    tower = judged.pop(TOWER, None)
    columns = {name: [row[name] for row in judged.values()] for name in next(iter(judged.values()))}
    about = {"samples": len(classes), "classes": len(sizes), "folds": folds, "seed": seed}
    chance = max(sizes.values()) / len(classes)
    return {"layer": list(judged), **columns, "tower": tower, "chance": chance} | about


def _hits(x: Any, classes: Sequence[int], folds: int, regularization: float, seed: int) -> int:
    """Images whose class was predicted by the classifier of the other folds."""
    selection, pipeline = sklearn("model_selection"), sklearn("pipeline")
    split = selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    model = pipeline.make_pipeline(
        sklearn("preprocessing").StandardScaler(),
        sklearn("linear_model").LogisticRegression(C=regularization, max_iter=1000),
    )
    predicted = selection.cross_val_predict(model, x, classes, cv=split)
    return sum(int(p == c) for p, c in zip(predicted, classes, strict=True))


def _features(
    vlm: VLM, batches: Iterable[tuple[Batch, Sequence[int]]], layers: Sequence[int]
) -> tuple[dict[int, Tensor], list[int]]:
    """Mean visual state of every sample, {layer: (samples, d)} on the CPU, and the classes."""
    kept: dict[int, list[Tensor]] = {TOWER: [], **{k: [] for k in layers}}
    classes: list[int] = []
    with evaluating(vlm.model):
        for batch, given in batches:
            inputs = to_model(vlm, batch)
            image = vlm.vision_mask(inputs)
            counts, mine = image.sum(1), [int(c) for c in given]
            if len(mine) != len(image) or bool((counts == 0).any()):
                raise ValueError(
                    f"batches must hold a class and an image for each sample: got {len(mine)} "
                    f"classes and {int((counts > 0).sum())} images of {len(image)} samples"
                )
            classes += mine
            places = places_of(image)
            sample = places // image.shape[1]
            seen: list[Tensor] = []

            def visit(
                k: int,
                hidden: Tensor,
                places: Tensor = places,
                sample: Tensor = sample,
                counts: Tensor = counts,
            ) -> None:
                if k in layers:
                    rows = hidden.flatten(0, 1)
                    at = rows.device
                    sums = rows.new_zeros(len(counts), rows.shape[1], dtype=torch.float32)
                    sums.index_add_(0, sample.to(at), rows[places.to(at)].float())
                    kept[k].append((sums / counts.to(at)[:, None]).cpu())

            def look(module: nn.Module, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
                seen.append(first_tensor(output).detach().float())

            handle = vlm.vision_tower.register_forward_hook(look)
            try:
                each_state(vlm, inputs, visit)
            finally:
                handle.remove()
            pooled = _tower_means(vlm, inputs, seen)
            if pooled is not None:
                kept[TOWER].append(pooled.cpu())
    features = {k: torch.cat(rows) for k, rows in kept.items() if rows}
    if TOWER in features and len(features[TOWER]) != len(classes):
        del features[TOWER]
    return features, classes


def _tower_means(vlm: VLM, inputs: Batch, seen: Sequence[Tensor]) -> Tensor | None:
    """Mean of the vision tower's rows over the images of each sample, (b, d), where it is known."""
    samples, length = inputs["input_ids"].shape
    if len(seen) != 1:
        return None
    rows = seen[0]
    if samples == 1:
        return rows.flatten(0, -2).mean(0, keepdim=True)
    try:
        patches = vlm.patches(inputs)
    except ValueError:  # a Q-Former's queries: one image a sample
        return rows.mean(1) if rows.dim() == 3 and len(rows) == samples else None
    owner = patches.places[patches.cu_seqlens[:-1].long()] // length
    flat = rows.flatten(0, -2)
    if rows.dim() == 3 and len(rows) == len(patches.grids):
        owner = owner.repeat_interleave(rows.shape[1])
    else:  # all pictures in one row, as long as their grids or by a fixed factor longer
        factor, rest = divmod(len(flat), sum(patches.lengths))
        if rest or not factor or (rows.dim() == 3 and len(rows) != 1):
            return None
        lengths = torch.tensor([factor * n for n in patches.lengths], device=owner.device)
        owner = owner.repeat_interleave(lengths)
    owner = owner.to(flat.device)
    sums = flat.new_zeros(samples, flat.shape[1]).index_add(0, owner, flat)
    return sums / torch.bincount(owner, minlength=samples)[:, None]


def plot_linear_probe(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy by layer with its interval, the vision tower's, the shuffled control and chance.

    Args:
        curves: Names to results of `linear_probe`.
    """
    check_curves(curves)
    figure = new_figure(6.4, 4.2)
    axes = figure.add_subplot()
    for i, (name, data) in enumerate(curves.items()):
        style = line_style(i)
        axes.plot(data["layer"], data["accuracy"], label=name, markersize=4, **style)
        low, high = zip(*data["interval"], strict=True)
        axes.fill_between(data["layer"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.plot(
            data["layer"], data["shuffled"], color=style["color"], linestyle=":", linewidth=1.2,
            label=f"{name}, classes shuffled",
        )  # fmt: skip
        if data["tower"] is not None:
            level = data["tower"]["accuracy"]
            axes.axhline(
                level, color=style["color"], linestyle="--", linewidth=1.2,
                label=f"{name}, vision tower",
            )  # fmt: skip
    chance = max(data["chance"] for data in curves.values())
    if math.isfinite(chance):
        axes.axhline(chance, color="#888888", linewidth=1.0, label="chance")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("decoder layer (0: its input)")
    axes.set_ylabel("accuracy of a linear probe")
    axes.set_title("What is linearly readable from the mean visual state")
    finish_axes(axes, integers=True)
    return figure
