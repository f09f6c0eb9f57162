"""From the streams of all layers, on all ranks, to the distance of each layer.

Norms are gathered; with them every rank knows which of its held rows are inliers, so rows need not
travel. The sums of a layer go to one rank, its owner, and each owner finishes a layer while the
others finish theirs: no rank holds more than its own state and one layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastalign.metrics._frechet import Moments, distance_of
from fastalign.metrics._ranks import Ranks
from fastalign.metrics._stream import (
    LIMIT,
    MODALITIES,
    Stream,
    gram_of,
    joined,
    sample_size,
    sum_dtype,
)
from fastalign.reference import frechet as _ref

# Columns of the table of counts, after the sum of the inliers.
_ACCEPTED, _INSIDE, _OUTSIDE, _DROPPED, _WRONGLY = range(5)


class Join:
    """All that `compute` needs, for one call.

    Args:
        layers: Streams of vision and text for each layer; they stay as they are.
        dim: Their width d.
        device: Where to compute.
        ranks: Who takes part, each with its own streams.
        method: As in `ModalityIntegrationRate`.
        outliers: As in `ModalityIntegrationRate`.

    Raises:
        ValueError: A layer has fewer than two rows of one modality.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Stream, Stream]],
        dim: int,
        device: torch.device,
        ranks: Ranks,
        method: str,
        outliers: str,
    ) -> None:
        self.layers, self.dim, self.ranks = layers, dim, ranks
        self.method, self.outliers = method, outliers
        self.none = torch.zeros(0, dtype=torch.float64, device=device)
        self.no_rows = torch.zeros(0, dim, dtype=torch.float64, device=device)
        self.warnings: list[str] = []
        self.low_rank: list[str] = []
        streams = [stream for pair in layers for stream in pair]
        norms = ranks.concatenate([joined(stream.norms, self.none) for stream in streams])
        self.norms = list(zip(norms[::2], norms[1::2], strict=True))
        self._check_counts()
        self.broken = [self._why_broken(layer) for layer in range(len(layers))]
        self.warnings += [reason for reason in self.broken if reason]
        self.keys: list[tuple[Tensor, Tensor]] = []
        if outliers == "median":
            keys = ranks.concatenate([joined(stream.key, self.none) for stream in streams])
            self.keys = list(zip(keys[::2], keys[1::2], strict=True))
        self.table = ranks.stack(self._count())  # (ranks, layers, 2, d + 5)

    def _check_counts(self) -> None:
        for layer, pair in enumerate(self.norms):
            for norms, name in zip(pair, MODALITIES, strict=True):
                if len(norms) < 2:
                    raise ValueError(
                        f"{name} must have at least 2 rows in layer {layer} for a covariance: "
                        f"got {len(norms)}; call update with samples that hold {name} tokens first"
                    )

    def _why_broken(self, layer: int) -> str | None:
        for norms, name in zip(self.norms[layer], MODALITIES, strict=True):
            bad = int((~norms.isfinite()).sum())
            if bad:
                return f"MIR is NaN: {bad} {name} row(s) of layer {layer} hold NaN or inf"
        if not bool(self.norms[layer][1].any()):
            return f"MIR is NaN: every text row of layer {layer} is zero, and sets the scale"
        return None

    def _inside(self, norms: Tensor, layer: int, modality: int) -> Tensor:
        if self.outliers == "keep":
            return torch.ones_like(norms, dtype=torch.bool)
        return _ref.within_sigma(norms, self.norms[layer][modality], LIMIT)

    def _inliers(self, layer: int, modality: int) -> tuple[Tensor, int]:
        """Held rows of this rank that are inliers, (n, d), and how many are not."""
        held = joined(self.layers[layer][modality].held, self.no_rows)
        inside = self._inside(_ref.row_norms(held), layer, modality)
        count = int(inside.sum())
        return (held if count == len(held) else held[inside]), len(held) - count

    def _count(self) -> Tensor:
        """Sum of the inliers of this rank and its counts, (layers, 2, d + 5)."""
        table = self.none.new_zeros(len(self.layers), 2, self.dim + 5)
        for layer, pair in enumerate(self.layers):
            for modality, stream in enumerate(pair):
                if self.broken[layer]:
                    continue
                row = table[layer, modality]
                total, counts = row[: self.dim], row[self.dim :]
                rows, outside = self._inliers(layer, modality)
                total += rows.sum(0, dtype=torch.float64)
                for part in self._moments(stream):
                    total += part[self.dim : -1] + part[-1] * part[: self.dim]
                    counts[_ACCEPTED] += part[-1]
                dropped = joined(stream.dropped, self.none)
                wrongly = self._inside(dropped, layer, modality).sum()
                counts[_INSIDE], counts[_OUTSIDE] = len(rows), outside
                counts[_DROPPED], counts[_WRONGLY] = len(dropped), wrongly
        return table

    def _moments(self, stream: Stream) -> Tensor:
        none = self.none.new_zeros(0, 2, 2 * self.dim + 1)
        return joined(stream.moments, none)[:, stream.modality]

    def distances(self) -> Tensor:
        """The distance of each layer, (layers,) float64, the same on every rank."""
        distances = self.none.new_zeros(len(self.layers))
        for first in range(0, len(self.layers), self.ranks.size):
            mine: tuple[int, Moments, Moments] | None = None
            for owner, layer in enumerate(range(len(self.layers))[first:][: self.ranks.size]):
                if self.broken[layer]:
                    distances[layer] = torch.nan
                    continue
                x, y = (self._collect(layer, modality, owner) for modality in range(2))
                if owner == self.ranks.rank:
                    mine = layer, x, y
            if mine is not None:
                distances[mine[0]] = distance_of(*mine[1:], self.method)
        return self.ranks.add(distances)

    def _collect(self, layer: int, modality: int, owner: int) -> Moments:
        """Moments of a layer and modality; they mean something at rank `owner` only."""
        table = self.table[:, layer, modality]
        counts = table[:, self.dim :].sum(0)
        count = counts[_ACCEPTED] + counts[_INSIDE]
        self._report(layer, modality, counts)
        mean = table[:, : self.dim].sum(0) / count
        scale = self.norms[layer][1].mean().reciprocal()
        rows, _ = self._inliers(layer, modality)
        cov = factor = None
        if int(counts[_ACCEPTED]) == 0 and int(count) <= self.dim:
            before = int(table[: self.ranks.rank, self.dim + _INSIDE].sum())
            everyone = rows.new_zeros(int(count), self.dim, dtype=torch.float64)
            everyone[before : before + len(rows)] = rows
            factor = _ref.scaled_factor(self.ranks.add_at(everyone, owner), mean, scale)
        else:
            gram = self._gram(layer, modality, rows, mean, owner)
            cov = gram * (scale.square() / (count - 1))
        removed = len(self.norms[layer][modality]) - count
        mean = scale * mean
        if self.outliers == "median" and bool(removed > 0):
            row = scale * self._median_row(layer, modality, owner)
            mean, shrink, extra = _ref.replaced_rows(mean, count, row, removed)
            if factor is not None:
                factor = torch.cat([shrink.sqrt() * factor, extra.unsqueeze(1)], dim=1)
            elif cov is not None:
                cov = shrink * cov + extra.outer(extra)
            count = count + 1
        return Moments(mean, cov, factor, min(self.dim, int(count) - 1))

    def _gram(self, layer: int, modality: int, rows: Tensor, mean: Tensor, owner: int) -> Tensor:
        """Gram matrix about the mean of all ranks, (d, d) float64."""
        stream, lower = self.layers[layer][modality], modality == 0
        gram = self.none.new_zeros(self.dim, self.dim)
        _ref.shifted_sums(rows, mean, gram.add_, sum_dtype(self.dim), gram_of)
        no_scatter = gram.new_zeros(0, self.dim + 1, self.dim, dtype=sum_dtype(self.dim))
        scatter = joined(stream.scatter, no_scatter)
        for part, packed in zip(self._moments(stream), scatter, strict=True):
            count = part[-1]
            if bool(count > 0):
                offset = part[self.dim : -1] / count
                moved = part[: self.dim] + offset - mean
                part_gram = _ref.unpack_triangle(packed, lower)
                gram += _ref.moved_gram(part_gram, count, offset, moved)
        if self.ranks.size == 1:
            return gram
        packed = gram.new_zeros(self.dim + 1, self.dim, dtype=sum_dtype(self.dim))
        _ref.add_triangle(packed, lower, gram.to(packed.dtype))
        return _ref.unpack_triangle(self.ranks.add_at(packed, owner), lower)

    def _median_row(self, layer: int, modality: int, owner: int) -> Tensor:
        """Median of each dimension over all rows seen, or over a sample of them, (d,)."""
        key = self.keys[layer][modality]
        # By the number of rows, not of those sampled, so that how ranks share them is all one.
        size = min(len(self.norms[layer][modality]), sample_size(self.dim))
        chosen = key.topk(size, largest=False).indices
        stream = self.layers[layer][modality]
        mine = joined(stream.sample, self.no_rows)
        lengths = self.ranks.stack(torch.tensor([len(mine)], device=key.device)).flatten()
        before = int(lengths[: self.ranks.rank].sum())
        place = chosen - before
        here = (place >= 0) & (place < len(mine))
        rows = self.no_rows.new_zeros(size, self.dim)
        rows[here] = mine[place[here]].double()
        return self.ranks.add_at(rows, owner).median(dim=0).values

    def _report(self, layer: int, modality: int, counts: Tensor) -> None:
        """Note rows that were judged too early, and a covariance that is singular."""
        name, norms = MODALITIES[modality], self.norms[layer][modality]
        outliers = (~self._inside(norms, layer, modality)).sum()
        rightly = counts[_DROPPED] - counts[_WRONGLY]
        mistaken = int(outliers - counts[_OUTSIDE] - rightly + counts[_WRONGLY])
        if mistaken:
            self.warnings.append(
                f"{mistaken} of {len(norms)} {name} rows of layer {layer} were accepted or dropped "
                "before norms drifted, and would be judged otherwise now: shuffle the samples"
            )
        count = int(counts[_ACCEPTED] + counts[_INSIDE])
        count += int(self.outliers == "median" and count < len(norms))
        if count <= self.dim:
            self.low_rank.append(
                f"{count} {name} rows in layer {layer} for {self.dim} dimensions: the covariance "
                "is singular and MIR depends on the number of rows; "
                f"give more than {self.dim} rows for a value that compares with others"
            )
