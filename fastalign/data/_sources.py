"""Records from JSON, tar shards and tables of `datasets`; all by index, made when taken."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from fastalign.data._errors import SampleError, check_choice
from fastalign.data._records import IMAGE_SUFFIXES, Record, parse_record, read_items
from fastalign.data._shards import Members, index_shard, json_object, read_member

if TYPE_CHECKING:
    from datasets import Dataset


class Records(Sequence[Record]):
    """Records by index, made when they are taken."""

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self._record(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}: got {index}")
        index %= len(self)
        try:
            return self._record(index)
        except ValueError as error:
            reason = error.reason if isinstance(error, SampleError) else "invalid_record"
            raise SampleError(f"{self._name(index)}: {error}", reason) from error

    def lengths(self) -> list[tuple[int, int]]:
        """Images and letters of each record, as far as can be told without reading it."""
        raise NotImplementedError

    def _record(self, index: int) -> Record:
        raise NotImplementedError

    def _name(self, index: int) -> str:
        return f"record {index}"


class JsonRecords(Records):
    """Items of a JSON file that have yet to be checked."""

    def __init__(self, path: Path, root: Path) -> None:
        self._items, self._root = read_items(path), root

    def __len__(self) -> int:
        return len(self._items)

    def lengths(self) -> list[tuple[int, int]]:
        return [item_size(item) if isinstance(item, dict) else (0, 0) for item in self._items]

    def _record(self, index: int) -> Record:
        return parse_record(self._items[index], self._root)


class ShardedRecords(Records):
    """Records in webdataset's tar shards, by index and without extraction.

    The members of a sample share their name up to its first dot. Image members are its images, in
    their order; a `json` member holds `conversations` or `caption`, a `txt` member the caption. A
    json member may have both text and other keys, which are left alone; its conversations come
    before `txt`, and that before its caption.

    Args:
        shards: Uncompressed tar files; each is read through once, and its index kept beside it.
        on_error: "raise" for a damaged shard, or "skip" to use what comes before the damage.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is damaged or compressed, or there is no sample.
    """

    def __init__(
        self, shards: Sequence[Path | str], *, on_error: Literal["raise", "skip"] = "raise"
    ) -> None:
        check_choice("on_error", on_error, ("raise", "skip"))
        self.shards = [Path(shard) for shard in shards]
        self._samples: list[tuple[int, str, Members]] = []
        for number, shard in enumerate(self.shards):
            if not shard.is_file():
                raise FileNotFoundError(f"shards must be tar files: {shard} is not a file")
            found = index_shard(shard, lenient=on_error == "skip")
            self._samples += [(number, key, members) for key, members in found]
        if not self._samples:
            raise ValueError(f"shards must hold at least one sample: got {shards}")

    def __len__(self) -> int:
        return len(self._samples)

    def lengths(self) -> list[tuple[int, int]]:
        """Image members and bytes of text of each record."""
        return [
            (len(image_members(m)), sum(m[name][1] for name in ("json", "txt") if name in m))
            for _, _, m in self._samples
        ]

    def _record(self, index: int) -> Record:
        number, key, members = self._samples[index]
        shard = self.shards[number]
        return members_record(
            members,
            lambda name: read_member(shard, members[name]),
            self._name(index),
            f"{shard.name}:{key}",
        )

    def _name(self, index: int) -> str:
        number, key, _ = self._samples[index]
        return f"{self.shards[number]}: sample {key}"


class TableRecords(Records):
    """Records in a map-style dataset of `datasets`: Arrow tables that are mapped, not read.

    Args:
        table: Has the columns of a record (see `load_records`): `image` or `images`, with the
            image or its path, and `conversations` or `caption`.
        image_root: Where relative image paths start.

    Raises:
        ValueError: It is no map-style dataset.
    """

    def __init__(self, table: Dataset, image_root: str | os.PathLike[str] = ".") -> None:
        import datasets

        if not isinstance(table, datasets.Dataset):
            raise ValueError(
                f"table must be a datasets.Dataset: got {type(table).__name__}; an order that can "
                "be resumed at any step needs samples by index; open_stream takes a stream"
            )
        lazy = datasets.Image(decode=False)
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(name, lazy)
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                table = table.cast_column(name, datasets.List(lazy))
        self._table, self._root = table, image_root

    def __len__(self) -> int:
        return len(self._table)

    def lengths(self) -> list[tuple[int, int]]:
        kept = [n for n in ("caption", "conversations") if n in self._table.column_names]
        texts = [item_size(row)[1] for row in self._table.select_columns(kept)]
        return list(zip(self._image_counts(), texts, strict=True))

    def _image_counts(self) -> list[int]:
        counts = [0] * len(self)
        for name in {"image", "images"} & set(self._table.column_names):
            column = self._table.select_columns(name).with_format("arrow")[:].column(name)
            listed = hasattr(column.type, "value_type")
            chunks = (c.value_lengths() if listed else c.is_valid() for c in column.chunks)
            found = [int(n or 0) for chunk in chunks for n in chunk.to_pylist()]
            counts = [total + n for total, n in zip(counts, found, strict=True)]
        return counts

    def _record(self, index: int) -> Record:
        return row_record(self._table[index], self._root, f"row {index}")

    def _name(self, index: int) -> str:
        return f"row {index}"


def members_record(
    names: Collection[str], read: Callable[[str], bytes], where: str, id: str
) -> Record:
    """The record of a tar shard's sample.

    Args:
        names: Of its members, in their order.
        read: The bytes of a member.
        where: The sample, for messages.
        id: Of the record, unless its json names one.
    """
    item = json_object(read("json")) if "json" in names else {}
    if "txt" in names and "conversations" not in item:
        try:
            item["caption"] = read("txt").decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleError(f"txt must be UTF-8: {error}") from None
    images = image_members(names)
    if item.get("image") and not images:
        raise FileNotFoundError(
            f"{where}: image must be a member beside the json: got {', '.join(names)}"
        )
    item["image"] = [read(name) for name in images]
    item.setdefault("id", id)
    return parse_record(item)


def row_record(row: dict[str, Any], root: str | os.PathLike[str], id: str) -> Record:
    """The record of a table's row, whose columns are None where it leaves them out."""
    item = {name: value for name, value in row.items() if value is not None}
    item["image"] = [_content(image) for image in row_images(item)]
    item.pop("images", None)
    item.setdefault("id", id)
    return parse_record(item, root)


def image_members(names: Collection[str]) -> list[str]:
    """The members of a sample that are images."""
    return [n for n in names if f".{n.rpartition('.')[2]}" in IMAGE_SUFFIXES]


def row_images(row: dict[str, Any]) -> list[Any]:
    """The images of a table's row."""
    images = row.get("images") or row.get("image") or []
    return images if isinstance(images, list) else [images]


def item_size(item: dict[str, Any]) -> tuple[int, int]:
    """Images and letters of an item that may be wrong in any way."""
    image, turns = item.get("image"), item.get("conversations")
    images = len(image) if isinstance(image, list) else int(image is not None)
    if not isinstance(turns, list):
        return images, len(str(item.get("caption")))
    return images, sum(len(str(t.get("value"))) for t in turns if isinstance(t, dict))


def sample_lengths(dataset: Any) -> list[tuple[int, int]]:
    """Images and length of text of every sample, by which a step's samples are grouped.

    Raises:
        ValueError: The dataset has no `lengths()` and is no list of records.
    """
    if hasattr(dataset, "lengths"):
        return list(dataset.lengths())
    if isinstance(dataset, list) and all(isinstance(record, Record) for record in dataset):
        return [(len(r.images), sum(len(turn.text) for turn in r.turns)) for r in dataset]
    raise ValueError(
        "group_by_length needs a dataset with lengths(), a list of what can be compared: got "
        f"{type(dataset).__name__}"
    )


def _content(image: Any) -> Any:
    """Bytes or path of an image as `datasets` keeps it."""
    if isinstance(image, dict):
        return image.get("path") if image.get("bytes") is None else image["bytes"]
    return image
