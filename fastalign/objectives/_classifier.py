"""DeepAlign's first phase: the modality classifier is trained, and judged before and after."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastalign.adapters import NAME, disabled
from fastalign.models import VLM, Batch
from fastalign.objectives._intervention import TEXT, VISION, instance_direction, representations
from fastalign.objectives._terms import pair_masks
from fastalign.ops._autocast import no_autocast

if TYPE_CHECKING:
    from fastalign.objectives._deepalign import DeepAlignState


@dataclass
class ClassifierReport:
    """How well the modality classifier separates pairs it was not trained on."""

    accuracy: float
    train_pairs: int
    heldout_pairs: int
    warning: str | None = None


@dataclass
class ModalityScore:
    """What the classifier says about the text and the vision vectors of some pairs.

    Attributes:
        accuracy: Share of all vectors that it takes for what they are.
        text, vision: The same of each modality alone.
        margin: Mean of the true modality's logit less the other's.
    """

    accuracy: float
    text: float
    vision: float
    margin: float


@dataclass
class ClassifierAccuracy:
    """The classifier on `pairs` pairs, with the adapter switched off and on."""

    before: ModalityScore
    after: ModalityScore
    pairs: int


def fit_classifier(
    state: DeepAlignState, vlm: VLM, batches: Iterable[Batch], *, heldout: float = 0.2
) -> ClassifierReport:
    """Train the modality classifier on the base model's representations (appendix A).

    Text is class 0 and vision class 1. The last `heldout` of the pairs are kept for judging. The
    global direction starts anew with the mean over all of the pairs, so that it is one from the
    first step on; with several ranks each has to be given the same batches.

    Args:
        state: Its classifier is trained in place and left frozen.
        vlm: The model; an attached adapter is switched off for the passes.
        batches: Batches with image-text pairs, of which the first `classifier_pairs` are taken.
        heldout: Fraction of the pairs.

    Returns:
        Held-out accuracy, with a warning below 0.9: the shift direction is then noise.

    Raises:
        ValueError: Fewer than 5 pairs.
    """
    vectors = _collect(state, vlm, batches)
    pairs = vectors.shape[1]
    if pairs < 5:
        raise ValueError(f"the classifier needs at least 5 image-text pairs: got {pairs}")
    cut = pairs - max(1, round(heldout * pairs))
    with no_autocast(vectors), torch.enable_grad():
        _fit(state, vectors[:, :cut])
    state.direction.restart(instance_direction(state.classifier, vectors[VISION], vectors[TEXT]))
    accuracy = _score(state, vectors[:, cut:]).accuracy
    warning = None
    if accuracy < 0.9:
        warning = (
            f"the modality classifier is right on {accuracy:.0%} of held-out pairs, below 90 %: "
            "its shift direction is mostly noise; give it more pairs, steps or layers"
        )
    return ClassifierReport(accuracy, cut, pairs - cut, warning)


def _fit(state: DeepAlignState, vectors: Tensor) -> None:
    """Full-batch AdamW on (2, pairs, d)."""
    labels = torch.arange(2, device=vectors.device)[:, None].expand(vectors.shape[:2])
    classifier = state.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=state.config.classifier_lr)
    for _ in range(state.config.classifier_steps):
        logits = classifier(vectors)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier.requires_grad_(False)


@torch.no_grad()
def _score(state: DeepAlignState, vectors: Tensor) -> ModalityScore:
    """Of text and vision vectors, (2, pairs, d)."""
    with no_autocast(vectors):
        logits = state.classifier(vectors).float()
    margins = torch.stack([logits[i, :, i] - logits[i, :, 1 - i] for i in (TEXT, VISION)])
    text, vision = (margins > 0).float().mean(1).tolist()
    return ModalityScore((text + vision) / 2, text, vision, float(margins.mean()))


def _collect(state: DeepAlignState, vlm: VLM, batches: Iterable[Batch]) -> Tensor:
    """Text and vision vectors of the base model's first pairs, (2, pairs, d)."""
    most = state.config.classifier_pairs
    found: list[Tensor] = []
    for batch in batches:
        with _base(vlm):
            h_v, h_t = representations(vlm, batch, state.layers, state.config.pool)
        found.append(torch.stack([h_t, h_v]))
        if sum(v.shape[1] for v in found) >= most:
            break
    if not sum(v.shape[1] for v in found):
        raise ValueError("the classifier needs image-text pairs: got none")
    return torch.cat(found, 1)[:, :most]


def _base(vlm: VLM) -> AbstractContextManager[None]:
    """The model without its adapter, if it has one."""
    adapted = getattr(vlm.model, NAME, None) is not None
    return disabled(vlm.model) if adapted else nullcontext()


def classifier_accuracy(
    state: DeepAlignState,
    vlm: VLM,
    batches: Iterable[Batch],
    *,
    report: ClassifierReport | None = None,
) -> ClassifierAccuracy:
    """The trained classifier on pairs, with the adapter switched off and on.

    What post-training has moved towards text is no longer taken for vision so often, and by a
    smaller margin.

    Args:
        state: With a fitted classifier.
        vlm: The model, with its adapter.
        batches: Batches with pairs that the classifier was not trained on.
        report: Of `fit_classifier`, when `batches` are those that it was given: only the pairs that
            it held out are then judged, and batches without any are not run.

    Returns:
        Accuracy and mean margin, before and after.

    Raises:
        ValueError: The model has no adapter, or there is no pair.
    """
    start = 0 if report is None else report.train_pairs
    end = None if report is None else start + report.heldout_pairs
    before: list[Tensor] = []
    after: list[Tensor] = []
    seen = 0
    for batch in batches:
        pairs = int(pair_masks(vlm, batch)[0].sum())
        rows = slice(max(0, start - seen), pairs if end is None else min(pairs, end - seen))
        seen += pairs
        if rows.start < rows.stop:
            for vectors, context in ((before, disabled(vlm.model)), (after, nullcontext())):
                with context:
                    h_v, h_t = representations(vlm, batch, state.layers, state.config.pool)
                vectors.append(torch.stack([h_t, h_v])[:, rows])
        if end is not None and seen >= end:
            break
    if not before:
        raise ValueError("the classifier is judged on image-text pairs: got none")
    base, adapted = torch.cat(before, 1), torch.cat(after, 1)
    return ClassifierAccuracy(_score(state, base), _score(state, adapted), base.shape[1])
