"""Streams: what lies at a path or an address, as shards that are read from front to back."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastalign.data._errors import check_choice
from fastalign.data._open import expand, saved_files
from fastalign.data._stream_shards import FileShard, Shard, StreamItem, root_of, table_shards

if TYPE_CHECKING:
    from datasets import IterableDataset

_SUFFIXES = (".tar", ".parquet", ".arrow", ".jsonl", ".json")
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}


class Stream:
    """Shards of records that are read in order; see `open_stream`.

    For `fastalign.train`, as `dataset`, with a `collate` of records. Its items are made records in
    the workers that collate them.

    Args:
        shards: Of one kind or several.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        if not shards:
            raise ValueError("a stream must have at least one shard: got none")
        self.shards = tuple(shards)

    def __getitem__(self, item: StreamItem) -> StreamItem:
        """`item`: a loader's sampler reads the stream, and its workers what they are handed."""
        return item

    def __repr__(self) -> str:
        return f"Stream({len(self.shards)} shards, {self.shards[0].name}, ...)"


def open_stream(
    source: str | os.PathLike[str] | IterableDataset,
    image_root: str | os.PathLike[str] | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Stream:
    """Records from whatever lies at `source`, read from front to back.

    | `source` | is read as |
    | --- | --- |
    | `a.parquet`, `a.arrow`, a folder of them, one of `save_to_disk` | tables of `datasets` |
    | `a.tar`, a folder of tar files | webdataset's shards; a sample's members stand together |
    | `a.jsonl`, `a.json` | see `load_records`; a JSON list is read whole |
    | an `IterableDataset` of `datasets` | rows with the columns of a record |

    Args:
        source: As above. A path may hold `*` and a range `{000..003}`, and be an address of
            fsspec: `https://`, `hf://datasets/NAME/...`, `s3://`.
        image_root: Where relative image paths start: by default the folder of the file, and for an
            address the working folder.
        on_error: "raise" for a damaged tar shard, or "skip" to use what comes before the damage.

    Raises:
        FileNotFoundError: There is nothing at `source`.
        ImportError: `datasets` is needed and not installed.
        ValueError: It holds none of the above.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "num_shards") or not hasattr(source, "state_dict"):
            raise ValueError(
                "source must be a path, an address or a datasets.IterableDataset: got "
                f"{type(source).__name__}"
            )
        root = os.fspath(image_root or ".")
        return Stream(table_shards(source, [], root, in_parts=False))
    path = os.fspath(source)
    files = _files(path)
    suffixes = {Path(file).suffix.lower() for file in files}
    suffix = suffixes.pop()
    if suffixes or suffix not in _SUFFIXES:
        raise ValueError(
            f"data must name files that are all {', '.join(_SUFFIXES[:-1])} or .json: got "
            f"{', '.join(sorted({suffix, *suffixes}))} at {path}"
        )
    root = os.path.abspath(root_of(files[0]) if image_root is None else image_root)
    if suffix in _BUILDERS:
        load = _load_dataset()
        table = load(_BUILDERS[suffix], data_files=files, split="train", streaming=True)
        return Stream(table_shards(table, files, root, in_parts=True))
    return Stream([FileShard(file, root, on_error == "skip") for file in files])


def _load_dataset() -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            'streams of parquet and Arrow need datasets: pip install "fastalign[hf]"'
        ) from error
    return load_dataset


def _files(path: str) -> list[str]:
    """The files at a path or an address, sorted; of a folder those of the first kind it holds."""
    if "://" not in path:
        found = expand(path)
        if len(found) == 1 and found[0].is_dir():
            saved = saved_files(found[0])
            listed = saved or [f for f in found[0].iterdir() if not f.name.startswith(".")]
            return _of_one_kind([str(f) for f in listed], path)
        for file in found:
            if not file.is_file():
                raise FileNotFoundError(f"data must be a file or a folder: {file} is neither")
        return [str(file) for file in found]
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        first, last = match.groups()
        numbers = (f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1))
        return [f for n in numbers for f in _files(path[: match.start()] + n + path[match.end() :])]
    if Path(path).suffix.lower() in _SUFFIXES and "*" not in path:
        return [path]
    import fsspec

    system, inside = fsspec.core.url_to_fs(path)
    names = system.glob(inside) if "*" in inside else system.ls(inside, detail=False)
    return _of_one_kind([str(system.unstrip_protocol(name)) for name in names], path)


def _of_one_kind(files: list[str], path: str) -> list[str]:
    for suffix in _SUFFIXES:
        chosen = sorted(file for file in files if file.lower().endswith(suffix))
        if chosen:
            return chosen
    raise ValueError(f"data must hold {', '.join(_SUFFIXES)} files: found none in {path}")
