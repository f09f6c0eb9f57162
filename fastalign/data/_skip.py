"""What happens to samples that cannot be used: another takes their place, and they are counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastalign.data._errors import REASONS, reason_of
from fastalign.data._stream import Stream
from fastalign.data._stream_shards import StreamItem

TRIES = 100
WARNINGS = 10
MOST = 0.1  # of the samples taken, once there are FROM of them
FROM = 100

_log = logging.getLogger("fastalign.data")


class CountedBatch(dict[str, Any]):
    """A batch that knows which samples were left out of it.

    Attributes:
        samples: Samples in the batch.
        skipped: Samples left out, by reason (see `SampleError`).
    """

    def __init__(self, batch: dict[str, Any], samples: int, skipped: dict[str, int]) -> None:
        super().__init__(batch)
        self.samples, self.skipped = samples, skipped


class Replacing:
    """Collates samples by index; one that cannot be used is replaced by another of the data.

    Which one follows from the seed and the index alone, so that a batch keeps its size, and a run
    that is resumed, or has another number of workers, sees the same samples.

    Args:
        dataset: Map-style; a bad sample raises here or in `collate`.
        collate: A list of its samples to a batch.
        seed: Of the choice.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], *, seed: int = 0
    ) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        self._warned = 0

    def __call__(self, indices: Sequence[int]) -> CountedBatch:
        """The batch of the samples `indices`.

        Raises:
            ValueError: None of 100 samples that could take a place can be used; or samples that
                are good by themselves cannot be collated together.
        """
        try:
            return CountedBatch(self.collate([self.dataset[i] for i in indices]), len(indices), {})
        except (ValueError, FileNotFoundError):
            pass  # one by one, to see which
        skipped: Counter[str] = Counter()
        samples = [self._usable(i, skipped) for i in indices]
        return CountedBatch(self.collate(samples), len(indices), dict(skipped))

    def _usable(self, index: Any, skipped: Counter[str]) -> Any:
        for tried, candidate in enumerate(self._candidates(index), 1):  # noqa: B007
            try:
                sample = self.dataset[candidate]
                self.collate([sample])
                return sample
            except (ValueError, FileNotFoundError) as error:
                last = error
                skipped[reason_of(error)] += 1
                self._warned += 1
                level = logging.WARNING if self._warned <= WARNINGS else logging.DEBUG
                _log.log(level, "sample %s skipped (%s): %s", candidate, reason_of(error), error)
        raise ValueError(
            f"the dataset must hold samples that can be used: none of {tried} was; the last one: "
            f"{last}"
        ) from last

    def _candidates(self, index: Any) -> Iterator[Any]:
        yield index
        seed = (self.seed * 1_000_003 + index) % 2**63
        generator = torch.Generator().manual_seed(seed)
        for _ in range(TRIES - 1):
            yield int(torch.randint(len(self.dataset), (), generator=generator))


class Parsing:
    """Collates what a stream holds.

    Args:
        collate: Records to a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[StreamItem]) -> dict[str, Any]:
        return self.collate([item.record() for item in items])


class StreamReplacing(Replacing):
    """`Replacing` for a stream: an item that cannot be used is replaced by one of its spares.

    Args:
        collate: Records to a batch.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        super().__init__(_Parsed(), collate)

    def _candidates(self, index: Any) -> Iterator[Any]:
        yield index
        yield from index.spares


class _Parsed:
    def __getitem__(self, item: StreamItem) -> Any:
        return item.record()


class Skips:
    """Follows what a run skips, over all its ranks.

    Args:
        on: Whether samples may be skipped at all; if not, nothing is changed or counted.
        every: Steps between looks at the share of what is skipped.
        last: The last step, after which there is a look too.
        accelerator: That of the run.
    """

    def __init__(self, on: bool, every: int, last: int, accelerator: Any) -> None:
        self.on, self.every, self.last, self.accelerator = on, every, last, accelerator
        # By reason, and the samples that were used: of this rank's step, and of all.
        self._new = torch.zeros(len(REASONS) + 1)
        self._all = torch.zeros(len(REASONS) + 1, device=accelerator.device)

    def wrap(
        self, dataset: Any, collate: Callable[[list[Any]], dict[str, Any]], seed: int
    ) -> tuple[Any, Callable[[list[Any]], dict[str, Any]]]:
        """Dataset and collate function of a loader; workers take samples in the latter."""
        if isinstance(dataset, Stream):
            return dataset, StreamReplacing(collate) if self.on else Parsing(collate)
        if not self.on:
            return dataset, collate
        return range(len(dataset)), Replacing(dataset, collate, seed=seed)

    def follow(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, counted as they are taken."""
        for batch in batches:
            if isinstance(batch, CountedBatch):
                self._new[-1] += batch.samples
                for i, reason in enumerate(REASONS):
                    self._new[i] += batch.skipped.get(reason, 0)
            yield batch

    def counts(self, done: int) -> dict[str, Tensor]:
        """What all ranks skipped in step `done`, counted from 1.

        Raises:
            ValueError: More than a tenth of at least 100 samples were skipped; on every rank.
        """
        if not self.on:
            return {}
        new = self.accelerator.reduce(self._new.to(self.accelerator.device))
        self._new = torch.zeros_like(self._new)
        self._all += new
        if done % self.every == 0 or done == self.last:
            skipped, used = float(self._all[:-1].sum()), float(self._all[-1])
            if used + skipped >= FROM and skipped > MOST * (used + skipped):
                raise ValueError(
                    f"at most {MOST:.0%} of the samples may be skipped: got {self}; mend the data, "
                    "or leave out what is bad in it"
                )
        names = (f"skipped_{reason}" for reason in REASONS)
        return {**dict(zip(names, new[:-1].unbind(), strict=True)), "skipped": new[:-1].sum()}

    def __str__(self) -> str:
        parts = [f"{int(n)} {r}" for n, r in zip(self._all[:-1], REASONS, strict=True) if n]
        skipped = int(self._all[:-1].sum())
        by = f" ({', '.join(parts)})" if parts else ""
        return f"{skipped} skipped of {skipped + int(self._all[-1])} samples{by}"

    def close(self) -> None:
        """Say how many were skipped in all, on the main rank, if there were any."""
        if self.on and self.accelerator.is_main_process and self._all[:-1].sum():
            _log.warning("%s", self)
