"""Held-out accuracy by attribute, with the right images and with the wrong ones.

What accuracy keeps when the images are shuffled is what the text alone gives away; the difference
is what the model reads from the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastalign.demo.dataset import IGNORE_INDEX, SceneDataset, collate
from fastalign.demo.scenes import ATTRIBUTES

# The accuracy of a guess that knows the possible answers and nothing else.
CHANCE = {name: 1.0 / len(words) for name, words in ATTRIBUTES.items()}


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: SceneDataset, *, shuffle: bool = False, batch_size: int = 64
) -> dict[str, float]:
    """Teacher-forced accuracy at the word of each attribute, and the mean cross-entropy.

    A word counts as right where it has the largest logit of the whole vocabulary.

    Args:
        model: A LLaVA of transformers on any device; its mode is put back.
        dataset: At least one scene, at least two to shuffle.
        shuffle: Give every caption the image of another scene, half the data set further on: the
            same ones at every call.
        batch_size: Scenes in one forward pass; it does not change the result beyond rounding.

    Returns:
        "count", "colour", "object", "side", "background": fractions in [0, 1];
        "ce": nats per label token, `<eos>` included.

    Raises:
        ValueError: `dataset` is too small or `batch_size` is below 1.
    """
    n = len(dataset)
    if n < 1 + shuffle:
        raise ValueError(f"dataset must hold at least {1 + shuffle} scenes: got {n}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: got {batch_size}")
    device = next(model.parameters()).device
    words = {name: ids.to(device) for name, ids in dataset.attribute_ids.items()}
    totals = torch.zeros(len(words) + 1, 2, dtype=torch.float64, device=device)
    turn = n // 2 if shuffle else 0

    training = model.training
    model.eval()
    try:
        for start in range(0, n, batch_size):
            rows = range(start, min(start + batch_size, n))
            batch = collate([_sample(dataset, i, (i + turn) % n) for i in rows])
            batch = {name: value.to(device) for name, value in batch.items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            totals += _sums(logits, labels, words)
    finally:
        model.train(training)
    values = (totals[:, 0] / totals[:, 1]).tolist()
    return dict(zip([*words, "ce"], values, strict=True))


def _sample(dataset: SceneDataset, index: int, image: int) -> dict[str, Any]:
    """The caption of one scene with the image of another, without teacher features."""
    item = dataset[index]
    item.pop("teacher", None)
    return item if image == index else item | {"pixel_values": dataset[image]["pixel_values"]}


def _sums(logits: Tensor, labels: Tensor, words: dict[str, Tensor]) -> Tensor:
    """Sum and count of the hits of each attribute, then of the cross-entropy: (len + 1, 2)."""
    hit = logits.argmax(-1) == labels
    rows = []
    for ids in words.values():
        here = torch.isin(labels, ids)
        rows.append(torch.stack([(hit & here).sum(), here.sum()]))
    ce = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    rows.append(torch.stack([ce, (labels != IGNORE_INDEX).sum()]))
    return torch.stack([row.double() for row in rows])
