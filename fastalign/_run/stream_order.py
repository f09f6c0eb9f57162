"""The order in which a run takes the samples of its data, by index or as a stream."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fastalign.config import StepSampler, TrainConfig
from fastalign.data._sources import sample_lengths
from fastalign.data._stream import Stream
from fastalign.data._stream_blocks import SPARES, Mark, first_items, ordered
from fastalign.data._stream_shards import StreamItem


class StreamSampler(StepSampler):
    """Lists of a stream's items, one per micro-batch of this rank, from any step on.

    A step takes the next ranks * accumulation * batch_size items of the endless sequence, however
    they are divided: every rank reads all of it, and keeps its share. With `group_by_length` those
    of a step are sorted by size first. What comes after the step lends spares to its samples.

    Args:
        stream: What to read.
        config: Of the run.
        rank: Of this process.
        ranks: How many there are.
        start: Steps done.
        stored: What `state(start)` was, unless `start` is 0.
    """

    def __init__(
        self,
        stream: Stream,
        config: TrainConfig,
        rank: int,
        ranks: int,
        start: int,
        stored: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(len(stream.shards), config, rank, ranks, start)
        self.stream = stream
        # Of steps that the loader may have taken already; what is consumed lags behind.
        self._marks: dict[int, Mark | None] = {start: None}
        if start:
            place = None if stored is None else stored.get("stream")
            if place is None:
                raise ValueError(
                    f"a stream goes on after step {start} from where it stood: the checkpoint is "
                    "of data by index; give the data of that run, or choose another output_dir"
                )
            self._marks[start] = Mark(place["begin"], place["taken"])

    def state(self, step: int) -> dict[str, Any]:
        """Where the sequence stands after `step` steps, of which none is long past."""
        mark = self._marks[step]
        whole = super().state(step)
        whole["shards"] = whole.pop("samples")
        return {**whole, "stream": None if mark is None else asdict(mark)}

    def __iter__(self) -> Iterator[list[Any]]:
        config = self.config
        share = config.gradient_accumulation_steps * config.batch_size
        spares = SPARES if config.on_bad_sample == "skip" else 0
        begin = self._marks[self.start]
        items = ordered(self.stream, config.seed, config.shuffle_buffer, share * self.ranks, begin)
        ahead: deque[tuple[StreamItem, Mark]] = deque()
        try:
            for step in range(self.start, config.max_steps):
                while len(ahead) < share * self.ranks + spares:
                    ahead.append(next(items))
                taken = [ahead.popleft() for _ in range(share * self.ranks)]
                self._remember(step + 1, taken[-1][1])
                chosen = [item for item, _ in taken]
                if config.group_by_length:
                    chosen.sort(key=StreamItem.size)
                chosen = _lend(chosen, [item for item, _ in ahead])
                for micro in range(config.gradient_accumulation_steps):
                    first = (micro * self.ranks + self.rank) * config.batch_size
                    yield chosen[first : first + config.batch_size]
        finally:
            items.close()  # type: ignore[attr-defined]

    def _remember(self, step: int, mark: Mark) -> None:
        self._marks[step] = mark
        # A loader is at most two micro-batches a worker ahead, and a save asks for the step done.
        self._marks.pop(step - 2 * self.config.num_workers - 4, None)


def _lend(items: list[StreamItem], spares: list[StreamItem]) -> list[StreamItem]:
    """Each with all the spares, from another one on."""
    if not spares:
        return items
    turns = [tuple(spares[i:] + spares[:i]) for i in range(len(spares))]
    return [replace(item, spares=turns[i % len(turns)]) for i, item in enumerate(items)]


def sampler_of(
    dataset: Any,
    config: TrainConfig,
    accelerator: Any,
    start: int,
    lengths: Sequence[Any] | None,
    stored: dict[str, Any] | None,
) -> StepSampler:
    """The sampler of a run's data on this rank.

    Args:
        dataset: By index, or a `Stream`.
        config: Of the run.
        accelerator: Of the run.
        start: Steps done.
        lengths: See `StepSampler`; of data by index.
        stored: The sampler's state in the checkpoint that the run goes on from.
    """
    place = accelerator.process_index, accelerator.num_processes, start
    if isinstance(dataset, Stream):
        return StreamSampler(dataset, config, *place, stored)
    return StepSampler(len(dataset), config, *place, lengths)


def lengths_of(dataset: Any, config: TrainConfig) -> list[Any] | None:
    """By what the samples of a step are grouped, if they are; a stream's items tell their own."""
    if not config.group_by_length or isinstance(dataset, Stream):
        return None
    return sample_lengths(dataset)


def first_samples(dataset: Any, config: TrainConfig, count: int) -> list[Any]:
    """Indices drawn from the seed, or the first items of a stream: the same on every rank."""
    if isinstance(dataset, Stream):
        return first_items(dataset, config.seed, config.shuffle_buffer, count)
    generator = torch.Generator().manual_seed(config.seed)
    chosen: list[Any] = torch.randperm(len(dataset), generator=generator)[:count].tolist()
    return chosen


def watched(dataset: Any, config: TrainConfig) -> Any:
    """Data by index of which MIR is measured: of a stream its first items, where it is."""
    if not isinstance(dataset, Stream):
        return dataset
    return first_samples(dataset, config, config.mir_samples) if config.mir_every else []
