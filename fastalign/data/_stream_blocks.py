"""The order of a stream: shards drawn once an epoch, rows shuffled by blocks.

An epoch takes the shards in an order drawn from (seed, epoch). A block of its next rows is read
ahead, in a thread, and permuted by (seed, epoch, block): so where a stream stands is an epoch, the
place at which a block begins, and how many of the block were taken. A buffer that is filled and
drained, as `datasets` shuffles, would be lost with the run, as its rows come from all over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice

import torch

from fastalign.data._stream import Stream
from fastalign.data._stream_shards import Cursor, Shard, State, StreamItem

SPARES = 8  # items that may take the place of one that cannot be used


@dataclass(frozen=True)
class Mark:
    """Where a stream stands: where a block begins, and how many of its items were taken."""

    begin: State
    taken: int


@dataclass
class _Block:
    begin: State
    end: State
    items: list[StreamItem | None]
    order: list[int]


class _Reader:
    """Reads block after block, epoch after epoch.

    Args:
        stream: What to read.
        seed: Of the order of shards and of rows within a block.
        size: Rows of a block; the last of an epoch has fewer.
        least: Rows that an epoch must have.
        begin: Of the block to begin with; None for the first.
    """

    def __init__(
        self, stream: Stream, seed: int, size: int, least: int, begin: State | None
    ) -> None:
        self._shards, self._seed, self._size, self._least = stream.shards, seed, size, least
        first = {"epoch": 0, "block": 0, "rows": 0, "shard": 0, "cursor": None}
        self._state: State = first if begin is None else begin
        self._cursor: Cursor | None = None
        self._items: Iterator[StreamItem] = iter(())
        self._order = self._shard_order()

    def read(self) -> _Block:
        """The next block, of at least one row.

        Raises:
            OSError: A shard cannot be read.
            ValueError: A shard is damaged, or an epoch has too few rows.
        """
        begin, items = self._place(), list[StreamItem | None]()
        while len(items) < self._size and self._state["shard"] < len(self._order):
            item = self._next()
            if item is not None:
                items.append(item)
        rows = self._state["rows"] + len(items)
        self._state = {**self._state, "rows": rows, "block": self._state["block"] + 1}
        if self._state["shard"] == len(self._order):
            if rows < self._least:
                raise ValueError(_too_few(rows, self._least, self._shards))
            epoch = self._state["epoch"] + 1
            self._state = {"epoch": epoch, "block": 0, "rows": 0, "shard": 0, "cursor": None}
            self._order = self._shard_order()
            if not items:
                return self.read()
        seed = (self._seed * 1_000_003 + begin["epoch"]) * 1_000_003 + begin["block"] + 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        order = torch.randperm(len(items), generator=generator).tolist()
        return _Block(begin, self._place(), items, order)

    def close(self) -> None:
        if hasattr(self._items, "close"):
            self._items.close()

    def _place(self) -> State:
        """Where the next block begins."""
        cursor = self._state["cursor"] if self._cursor is None else self._cursor.state()
        return {**self._state, "cursor": cursor}

    def _shard_order(self) -> list[int]:
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + self._state["epoch"]) % 2**63
        )
        return torch.randperm(len(self._shards), generator=generator).tolist()

    def _next(self) -> StreamItem | None:
        """The next item of the shard; None at its end, from which on the next shard is open."""
        shard = self._shards[self._order[self._state["shard"]]]
        if self._cursor is None:
            self._cursor = shard.open(self._state["cursor"])
            self._items = iter(self._cursor)
        try:
            item = next(self._items, None)
        except (OSError, ValueError) as error:
            kinds = (FileNotFoundError, OSError, ValueError)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            raise kind(f"shard {shard.name} must be there, and whole: {error}") from error
        if item is None:
            self._cursor = None
            self._state = {**self._state, "shard": self._state["shard"] + 1, "cursor": None}
        return item


def _too_few(rows: int, least: int, shards: Sequence[Shard]) -> str:
    where = f"{shards[0].name}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
    if not rows:
        return f"a stream must hold at least one sample: got none in {where}"
    return (
        f"a stream must hold the {least} samples of a step: got {rows} in {where}; lower "
        "batch_size or gradient_accumulation_steps, or read it by index (streaming=False)"
    )


def ordered(
    stream: Stream, seed: int, size: int, least: int = 1, mark: Mark | None = None
) -> Iterator[tuple[StreamItem, Mark]]:
    """The endless sequence of a stream, each item with the mark of where to go on after it.

    Args:
        stream: What to read; a block ahead, in a thread.
        seed: Of the order.
        size: Rows of a block.
        least: Rows that an epoch must have.
        mark: Where to begin.

    Raises:
        OSError: A shard is missing or cannot be read; names it.
        ValueError: A shard is damaged, or an epoch has fewer than `least` rows.
    """
    reader = _Reader(stream, seed, size, least, None if mark is None else mark.begin)
    taken = 0 if mark is None else mark.taken
    pool = ThreadPoolExecutor(1, "fastalign-stream")
    try:
        pending = pool.submit(reader.read)
        while True:
            block = pending.result()
            pending = pool.submit(reader.read)
            for number, place in islice(enumerate(block.order), taken, None):
                item, block.items[place] = block.items[place], None  # let go of it
                assert item is not None
                whole = number + 1 == len(block.order)
                yield item, Mark(block.end, 0) if whole else Mark(block.begin, number + 1)
            taken = 0
    finally:
        pool.shutdown(cancel_futures=True)
        reader.close()


def first_items(stream: Stream, seed: int, size: int, count: int) -> list[StreamItem]:
    """The first `count` items of the first epoch, or all of them, each with its spares."""
    found: list[StreamItem] = []
    for item, mark in ordered(stream, seed, size):
        found.append(item)
        if mark.begin["epoch"] or len(found) == count + SPARES:  # its last item, or enough
            break
    following = [found[(i + 1 + k) % len(found)] for i in range(len(found)) for k in range(SPARES)]
    return [
        replace(item, spares=tuple(following[i * SPARES : (i + 1) * SPARES]))
        for i, item in enumerate(found[:count])
    ]
