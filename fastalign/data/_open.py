"""What lies at a path, as records."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastalign.data._errors import check_choice
from fastalign.data._records import Record, load_records
from fastalign.data._sources import JsonRecords, ShardedRecords, TableRecords

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def open_data(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Sequence[Record]:
    """Records by index from whatever lies at `path`; images are opened when they are collated.

    | `path` | is read as |
    | --- | --- |
    | a `.json` or `.jsonl` file | see `load_records` |
    | `a.tar`, `{000..003}.tar`, `*.tar`, or a folder of tar files | see `ShardedRecords` |
    | `a.parquet`, `*.parquet`, or a folder of them | see `TableRecords` |
    | a folder of `datasets.save_to_disk`, an `.arrow` file | see `TableRecords` |

    Args:
        path: As above; `{000..003}` is a range of numbers.
        image_root: Where relative image paths start; the folder of `path` by default.
        on_error: "raise" for a record of a JSON file that is wrong, and for a damaged shard. With
            "skip" such a record raises when it is taken (see `Replacing`), and a damaged shard
            gives what comes before the damage.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It holds none of the above, or something that is wrong in it.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    files = expand(os.fspath(path))
    first = files[0]
    if len(files) == 1 and first.is_dir():
        return _folder(first, image_root, on_error)
    suffixes = {file.suffix.lower() for file in files}
    root = Path(os.path.abspath(first.parent if image_root is None else image_root))
    if suffixes == {".tar"}:
        return ShardedRecords(files, on_error=on_error)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data must be a file or a folder: {file} is neither")
    if suffixes in ({".parquet"}, {".arrow"}):
        return _tables(files, root)
    if len(files) > 1:
        raise ValueError(
            f"data must be one JSON file, or files that are all .tar, .parquet or .arrow: got "
            f"{len(files)} files that match {os.fspath(path)}"
        )
    if on_error == "raise":
        return load_records(first, image_root)
    if not root.is_dir():
        raise FileNotFoundError(f"image_root must be a folder: {root} is not one")
    return JsonRecords(first, root)


def _folder(
    folder: Path, image_root: str | os.PathLike[str] | None, on_error: Literal["raise", "skip"]
) -> Sequence[Record]:
    root = Path(os.path.abspath(folder if image_root is None else image_root))
    if saved_files(folder):
        import datasets

        return TableRecords(datasets.load_from_disk(folder), root)
    for suffix in (".tar", ".parquet", ".arrow"):
        files = sorted(f for f in folder.glob(f"*{suffix}") if not f.name.startswith("."))
        if files and suffix == ".tar":
            return ShardedRecords(files, on_error=on_error)
        if files:
            return _tables(files, root)
    raise ValueError(
        f"data must hold .tar, .parquet or .arrow files, or what datasets.save_to_disk writes: "
        f"found none in {folder}"
    )


def saved_files(folder: Path) -> list[Path]:
    """The files of what `datasets.save_to_disk` wrote into a folder; none where it did not.

    Raises:
        ValueError: It wrote several splits.
    """
    if (folder / "dataset_dict.json").is_file():
        raise ValueError(f"data must be one split: {folder} holds several, name one of its folders")
    if not (folder / "state.json").is_file():
        return []
    try:
        listed = json.loads((folder / "state.json").read_text())["_data_files"]
        return [folder / file["filename"] for file in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data must be whole: {folder / 'state.json'}: {error!r}") from None


def _tables(files: list[Path], root: Path) -> TableRecords:
    import datasets

    if files[0].suffix.lower() == ".arrow":
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        return TableRecords(datasets.concatenate_datasets(parts), root)
    return TableRecords(datasets.Dataset.from_parquet([str(file) for file in files]), root)


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names: ranges of numbers first, then wildcards, sorted."""
    if os.path.exists(pattern):
        return [Path(pattern)]
    match = _RANGE.search(pattern)
    if match:
        first, last = match.groups()
        texts = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        if not texts:
            raise ValueError(f"data must name a range that ascends: got {match.group()}")
        return [
            p for t in texts for p in expand(pattern[: match.start()] + t + pattern[match.end() :])
        ]
    if glob.has_magic(pattern):
        found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"data must name at least one file: none matches {pattern}")
        return [Path(name) for name in found]
    return [Path(pattern)]
