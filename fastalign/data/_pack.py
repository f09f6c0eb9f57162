"""Tokenised samples, and rows that several of them share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Sample:
    """A row of a batch before it is padded.

    Attributes:
        ids: Token ids.
        labels: The same where they are learned, else -100.
        aligned: What else has a value for each token.
        tensors: What the processor returned for its images.
        segments: Which of a packed row's samples each token is of.
    """

    ids: list[int]
    labels: list[int]
    aligned: dict[str, list[int]]
    tensors: dict[str, list[Tensor]]
    segments: list[int] = field(default_factory=list)


def pack(samples: list[Sample]) -> list[Sample]:
    """Samples without images put into rows of at most the longest sample's tokens, first fit."""
    room = max(len(sample.ids) for sample in samples)
    rows: list[Sample] = []
    for sample in samples:
        size = len(sample.ids)
        open_rows = (r for r in rows if not r.tensors and len(r.ids) + size <= room)
        row = None if sample.tensors else next(open_rows, None)
        if row is None:
            rows.append(replace(sample, segments=[0] * size))
            continue
        for key in row.aligned.keys() | sample.aligned.keys():
            values = row.aligned.get(key, [0] * len(row.ids))
            row.aligned[key] = values + sample.aligned.get(key, [0] * size)
        row.segments = row.segments + [row.segments[-1] + 1] * size
        # The first token of a sample has no predictor within it.
        row.ids, row.labels = row.ids + sample.ids, [*row.labels, IGNORE_INDEX, *sample.labels[1:]]
    return rows
