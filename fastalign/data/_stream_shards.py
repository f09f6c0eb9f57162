"""Shards of a stream, read from front to back, from any sample on that was marked before.

Each kind has a cursor that says where it stands in JSON, so that it can be opened there again.
Nothing is decoded here: an item holds bytes, and becomes a record where its batch is made.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fastalign.data._errors import SampleError
from fastalign.data._records import Record, parse_record
from fastalign.data._shards import MEMBER_NAME, at_end
from fastalign.data._sources import image_members, item_size, members_record, row_images, row_record

_log = logging.getLogger("fastalign.data")
State = dict[str, Any]
END = -1  # the place of a cursor that has given its last item


@dataclass(frozen=True)
class StreamItem:
    """One sample of a stream, as it was read.

    Attributes:
        name: Where it came from, for messages.
        form: What `content` is: the row of a table, the members of a tar shard's sample, the line
            of a JSONL file or an item of a JSON list.
        content: Undecoded.
        root: Where relative image paths start.
        spares: Items that may take its place, in this order.
    """

    name: str
    form: Literal["row", "members", "line", "item"]
    content: Any
    root: str
    spares: tuple[StreamItem, ...] = ()

    def __repr__(self) -> str:
        return self.name

    def record(self) -> Record:
        """The record that it holds.

        Raises:
            SampleError: It holds none; begins with the item's name.
        """
        try:
            if self.form == "members":
                shard, _, key = self.name.rpartition(": sample ")
                id = f"{Path(shard).name}:{key}"
                return members_record(self.content, self.content.__getitem__, self.name, id)
            if self.form == "row":
                return row_record(self.content, self.root, self.name)
            return parse_record(self._json(), self.root)
        except ValueError as error:
            reason = error.reason if isinstance(error, SampleError) else "invalid_record"
            raise SampleError(f"{self.name}: {error}", reason) from error

    def size(self) -> tuple[int, int]:
        """Images and letters (bytes in a tar shard), by which a step's samples are grouped."""
        content = self.content
        if self.form == "members":
            texts = (len(content[name]) for name in ("json", "txt") if name in content)
            return len(image_members(content)), sum(texts)
        with suppress(ValueError):
            content = self._json()
        if not isinstance(content, dict):
            return 0, 0
        if self.form == "row":
            shown = {k: v for k, v in content.items() if v is not None}
            return len(row_images(shown)), item_size(shown)[1]
        return item_size(content)

    def _json(self) -> Any:
        return json.loads(self.content) if self.form == "line" else self.content


class Cursor(Protocol):
    """Items of one shard, and where it stands: `state()` after an item is where to go on."""

    def __iter__(self) -> Iterator[StreamItem]: ...
    def state(self) -> State: ...


class Shard(Protocol):
    """A shard by its name; opened at its beginning, or where a cursor stood."""

    @property
    def name(self) -> str: ...
    def open(self, state: State | None) -> Cursor: ...


@dataclass(frozen=True)
class TableShard:
    """One shard of an iterable dataset of `datasets`, in parts (row groups) where it has any."""

    name: str
    table: Any
    root: str
    in_parts: bool

    def open(self, state: State | None) -> Cursor:
        return _TableCursor(self, state)


class _TableCursor:
    def __init__(self, shard: TableShard, state: State | None) -> None:
        self._shard = shard
        self._state: State = state or {"part": 0, "row": 0, "rows": None}
        self._part: Any = None

    def state(self) -> State:
        rows = self._state["rows"] if self._part is None else self._part.state_dict()
        return {**self._state, "rows": rows}

    def __iter__(self) -> Iterator[StreamItem]:
        shard = self._shard
        parts = shard.table.reshard() if shard.in_parts else shard.table
        while self._state["part"] < parts.num_shards:
            part = parts.shard(parts.num_shards, self._state["part"])
            if self._state["rows"] is not None:
                part.load_state_dict(self._state["rows"])
            self._part = part
            for row in part:
                number = self._state["row"]
                self._state = {**self._state, "row": number + 1}
                yield StreamItem(f"{shard.name}: row {number}", "row", row, shard.root)
            self._part = None
            self._state = {**self._state, "part": self._state["part"] + 1, "rows": None}


@dataclass(frozen=True)
class FileShard:
    """A tar, JSONL or JSON file, here or wherever fsspec reads."""

    name: str
    root: str
    lenient: bool = False

    def open(self, state: State | None) -> Cursor:
        kind = _TarCursor if self.name.lower().endswith(".tar") else _JsonCursor
        return kind(self, state)


class _FileCursor:
    """Where a file stands: the place of the next item, and its number."""

    def __init__(self, shard: FileShard, state: State | None) -> None:
        self._shard = shard
        self._at: int = state["at"] if state else 0
        self._number: int = state["number"] if state else 0

    def state(self) -> State:
        return {"at": self._at, "number": self._number}

    def _open(self) -> Any:
        import fsspec

        return fsspec.open(self._shard.name, "rb")


class _TarCursor(_FileCursor):
    """Samples of consecutive members; resumed at the byte where the next one begins."""

    def __iter__(self) -> Iterator[StreamItem]:
        if self._at == END:
            return
        shard = self._shard
        try:
            with self._open() as file:
                file.seek(self._at)
                yield from self._samples(file)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            if not shard.lenient:
                raise ValueError(f"it is no whole, uncompressed tar file: {error}") from error
            _log.warning("%s: %s; the samples before are used", shard.name, error)

    def _samples(self, file: Any) -> Iterator[StreamItem]:
        key, members = "", dict[str, bytes]()
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                found = MEMBER_NAME.fullmatch(member.name)
                if member.size < 0:
                    raise tarfile.ReadError(f"a negative size at byte {member.offset}")
                if found is None or not member.isreg() or member.issparse():
                    continue
                stem, suffix = found.groups()
                if members and stem != key:
                    self._at = member.offset
                    yield self._item(key, members)
                    members = {}
                key, suffix = stem, suffix.lower()
                if suffix in members:
                    raise tarfile.ReadError(f"two members are named {member.name}")
                data = tar.extractfile(member)
                members[suffix] = b"" if data is None else data.read()
                if len(members[suffix]) != member.size:
                    raise tarfile.ReadError("the file ends early")
            if not at_end(file, tar.offset):
                raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")
        self._at = END
        if members:
            yield self._item(key, members)

    def _item(self, key: str, members: dict[str, bytes]) -> StreamItem:
        return StreamItem(f"{self._shard.name}: sample {key}", "members", members, self._shard.root)


class _JsonCursor(_FileCursor):
    """Lines from any byte on, or the items of a list, which is read whole."""

    def __iter__(self) -> Iterator[StreamItem]:
        with self._open() as file:
            is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
            file.seek(0 if is_list else self._at)
            if is_list:
                yield from self._items(file.read())
                return
            for line in file:
                self._at += len(line)
                text = line.removeprefix(b"\xef\xbb\xbf").strip()
                if text:
                    self._number += 1
                    yield self._item("line", text)

    def _items(self, data: bytes) -> Iterator[StreamItem]:
        try:
            items = json.loads(data.decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"it is no valid JSON: {error}") from None
        for item in items[self._at :]:
            self._at, self._number = self._at + 1, self._number + 1
            yield self._item("item", item)

    def _item(self, form: Literal["line", "item"], content: Any) -> StreamItem:
        name = f"{self._shard.name}: record {self._number - 1}"
        return StreamItem(name, form, content, self._shard.root)


def table_shards(table: Any, names: list[str], root: str, *, in_parts: bool) -> list[Shard]:
    """The shards of an iterable dataset, with images undecoded."""
    if table.features is not None:
        table = table.decode(False)
    count = table.num_shards
    if len(names) != count:
        names = [f"shard {i} of {count}" for i in range(count)]
    return [TableShard(names[i], table.shard(count, i), root, in_parts) for i in range(count)]


def root_of(file: str) -> str:
    """The folder of a file here; the working folder for an address."""
    return "." if "://" in file else str(Path(file).absolute().parent)
