r"""Rows of one modality in one layer, taken in as they come and kept as sums.

    norms += |x|                                                   float64, all kept
    |x| within 2 deviations of the running median: sums += x       else the row is held
    end: rows that are held join the sums if within 3 deviations of the median of all norms

Sums are taken about an origin near the mean. The Gram matrices of both modalities of a layer are
triangles of one matrix (d + 1, d): in float32, 32 layers of 4,096 take 2.1 GB. Up to d = 1,024,
where fewer entries average the rounding out, everything is in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.metrics._frechet import FLOAT64_DIM
from fastalign.ops.syrk import syrk
from fastalign.reference import frechet as _ref

MODALITIES = ("vision", "text")
ACCEPT, LIMIT = 2.0, 3.0  # deviations: surely inside while norms still come; the rule

_WARMUP = 1024  # rows before a running median and deviation are trusted, and rows a step takes
_HELD = 1024  # rows that may be held after a step
# Raw half-precision rows go through the tensor cores; beyond this ratio of |mean|^2 to the
# variance their float32 sums would cancel, and the rows are shifted first.
_RAW_RATIO = 10.0


def sum_dtype(dim: int) -> torch.dtype:
    """Of the Gram matrices of a layer, and of the products they come from."""
    return torch.float64 if dim <= FLOAT64_DIM else torch.float32


def most_kept(dim: int) -> int:
    """Rows from which on a stream has sums: one more than dimensions, and a trusted median."""
    return max(dim + 1, _WARMUP)


def step_rows(dtype: torch.dtype, outliers: str) -> int:
    """New rows that make a step; of half precision twice as many, where no sample takes memory."""
    return _WARMUP * (2 if dtype.itemsize == 2 and outliers != "median" else 1)


def memory_bound(num_layers: int, dim: int, dtype: torch.dtype, outliers: str) -> int:
    """Bytes that all streams take between updates at most, but for 8 a row and layer."""
    held = (0 if outliers == "keep" else _HELD) + step_rows(dtype, outliers)
    sample = sample_size(dim) * 5 // 4 if outliers == "median" else 0
    row = dim * dtype.itemsize
    sums = dim * (dim + 1) * sum_dtype(dim).itemsize + 2 * (2 * dim + 1) * 8
    # Sums begin with the first modality that has enough rows; the other may keep all of its own.
    streams = 2 * held, held + most_kept(dim)
    return num_layers * (sums + (max(streams) + 2 * sample) * row)


def sample_size(dim: int) -> int:
    """Rows that give the median row of many: 4,096, or 1,024 of a wide layer."""
    return min(4096, max(1024, 2**22 // dim))


@dataclass(frozen=True)
class Stream:
    """The list states of one modality of a layer; they are changed in place.

    Attributes:
        modality: 0 vision, 1 text.
        outliers: As in `ModalityIntegrationRate`.
        norms: Norms of all rows, (n,) float64. Entry 0 is what earlier steps left behind; the
            entries after it, here and in `held`, are new.
        held: Rows (n, d), as they came, that are in no sum.
        dropped: Norms of rows that were taken for outliers before the end.
        sample, key: Rows that are drawn for the median row, and their random numbers.
        moments: Of the layer, (1, 2, 2 d + 1) float64 a part: origin, sum of rows less the origin,
            number of rows, for each modality.
        scatter: Of the layer, (1, d + 1, d) of `sum_dtype` a part: Gram matrices about the
            origins.
    """

    modality: int
    outliers: str
    norms: list[Tensor]
    held: list[Tensor]
    dropped: list[Tensor]
    sample: list[Tensor]
    key: list[Tensor]
    moments: list[Tensor]
    scatter: list[Tensor]

    def add(self, rows: Tensor) -> None:
        """Take in rows (n, d), n >= 1, which now belong to the stream."""
        norms = _ref.row_norms(rows)
        if self.outliers == "median":
            self._subsample(rows, norms)
        if not self.norms:
            self.norms.append(norms[:0])
        if not self.held:
            self.held.append(rows[:0])
        self.norms.append(norms)
        self.held.append(rows)
        # Up to d rows, or the first 1,024, are all kept: few rows are their own exact factor.
        seen = sum(len(part) for part in self.norms)
        before = len(self.norms[0])
        if seen >= most_kept(rows.shape[1]) and seen - before >= (
            step_rows(rows.dtype, self.outliers) if before else 1
        ):
            self._step()

    def _step(self) -> None:
        """Move the rows near the median to the sums; of the rest hold the doubtful."""
        norms, rows = torch.cat(self.norms), torch.cat(self.held)
        rows_norms = _ref.row_norms(rows)
        self.norms[:] = [norms]
        if self.outliers == "keep":
            self._sum(rows)
            self.held[:] = [rows[:0]]
            return
        near = _ref.within_sigma(rows_norms, norms, ACCEPT)
        self._sum(rows[near])
        rest, rest_norms = rows[~near], rows_norms[~near]
        if len(rest) > _HELD:
            margin = _ref.sigma_margin(rest_norms, norms, LIMIT)
            order = margin.abs().argsort(stable=True)
            margin, rest, rest_norms = margin[order], rest[order], rest_norms[order]
            sure = margin[_HELD:] < 0
            self._sum(rest[_HELD:][sure])
            self.dropped.append(rest_norms[_HELD:][~sure])
            rest = rest[:_HELD].clone()
        self.held[:] = [rest]

    def _sum(self, rows: Tensor) -> None:
        """Add rows (n, d) to the sums of the layer."""
        if len(rows) == 0:
            return
        dim = rows.shape[1]
        if not self.moments:
            self.moments.append(rows.new_zeros(1, 2, 2 * dim + 1, dtype=torch.float64))
            self.scatter.append(rows.new_zeros(1, dim + 1, dim, dtype=sum_dtype(dim)))
        moments, packed = self.moments[0][0, self.modality], self.scatter[0][0]
        origin, total, count = moments[:dim], moments[dim:-1], moments[-1]
        if bool(count == 0):
            origin.copy_(_origin(rows))
        total += _ref.shifted_sums(
            rows,
            origin if bool(origin.any()) else None,
            lambda gram: _ref.add_triangle(packed, self.modality == 0, gram),
            sum_dtype(dim),
            gram=gram_of,
        )
        count += len(rows)

    def _subsample(self, rows: Tensor, norms: Tensor) -> None:
        """Keep the rows with the smallest keys, between `sample_size` and a quarter more."""
        size = sample_size(rows.shape[1])
        self.sample.append(rows)
        self.key.append(_ref.row_keys(norms))
        if sum(len(key) for key in self.key) > size + size // 4:
            key = torch.cat(self.key)
            chosen = key.topk(size, largest=False).indices
            self.sample[:], self.key[:] = [torch.cat(self.sample)[chosen]], [key[chosen]]


def _origin(rows: Tensor) -> Tensor:
    """A point near the mean, (d,) float64 that float32 holds; 0 where raw rows do as well."""
    mean = rows.mean(0, dtype=torch.float64)
    if rows.is_cuda and rows.element_size() == 2:
        square = mean.square().sum()
        variance = _ref.row_norms(rows).square().mean() - square
        if bool(square <= _RAW_RATIO * variance):
            return torch.zeros_like(mean)
    return mean.float().double().nan_to_num(0.0, 0.0, 0.0)


def gram_of(block: Tensor) -> Tensor:
    """X^T X (d, d), accumulated in `sum_dtype`; in float32 on a GPU for half precision."""
    if block.is_cuda and block.element_size() == 2:
        return syrk(block, out_dtype=torch.float32)
    return syrk(block.to(sum_dtype(block.shape[1])))


def joined(parts: list[Tensor] | Tensor, like: Tensor) -> Tensor:
    """A list state as one tensor; after a gather it is one already. `like` stands for none."""
    if isinstance(parts, Tensor):
        return parts.to(like.device)
    return torch.cat(parts) if parts else like
