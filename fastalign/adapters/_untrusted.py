"""Files from strangers: inside their folder, and bounded before anything is made from them."""

import json
import math
import os
import reprlib
import stat
from collections import Counter
from pathlib import Path
from typing import Any

# An adapter's header takes some 100 bytes a tensor: 40 KB for a calibration of 100 layers.
MAX_HEADER = 2**20
_MAX_DIMS = 8
_LENGTH = 8  # bytes of the number before the header
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

_repr = reprlib.Repr()
_repr.maxstring, _repr.maxlist, _repr.maxdict, _repr.maxlevel = 80, 8, 8, 3


def short(value: Any) -> str:
    """`repr`, cut: what a stranger wrote may be long."""
    return _repr.repr(value)


def file_in(folder: Path, name: str) -> Path:
    """The regular file `name` in `folder`.

    A link may not lead out of the folder, but for the hub's cache: there the files of
    `snapshots/REVISION` are links into `blobs`, two folders up.

    Raises:
        FileNotFoundError: There is none.
        NotADirectoryError: `folder` is a file.
        ValueError: It leads out of the folder, or is a pipe, a device or a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be the folder of an adapter: got a file")
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path, strict=True))
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parents[1] / "blobs")
    if target.parent not in homes:
        raise ValueError(f"{path} must lie in its folder: got a link to {target}")
    if not stat.S_ISREG(target.stat().st_mode):
        raise ValueError(f"{path} must be a regular file: got a folder, a pipe or a device")
    return path


def read_json(path: Path, limit: int) -> Any:
    """The content of a JSON file of at most `limit` bytes.

    Raises:
        ValueError: It is longer, or no JSON.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path} must have at most {limit:,} bytes: got {path.stat().st_size:,}")
    return _parse(data, f"{path} must be JSON")


def _parse(data: bytes, rule: str) -> Any:
    """JSON without what its standard leaves open: a key that stands twice, NaN, Infinity."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{rule}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twins = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twins:
        raise ValueError(f"the key {short(twins[0])} stands twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a safetensors file, read from its header alone.

    The tensors must be floating point and fill the file without overlaps or gaps.

    Raises:
        ValueError: The header is longer than `MAX_HEADER` or than the file, is no JSON, or does not
            describe such tensors.
    """
    size, rule = path.stat().st_size, f"{path} must be a safetensors file"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or length > min(MAX_HEADER, size - _LENGTH):
            raise ValueError(
                f"{rule}, with a header of at most {MAX_HEADER:,} bytes inside the file: it claims "
                f"{length:,} bytes, and the file has {size:,}"
            )
        entries = _parse(file.read(length), f"{rule}, with a header of JSON")
    if not isinstance(entries, dict):
        raise ValueError(f"{rule}, with a header of names: got {short(entries)}")
    entries.pop("__metadata__", None)
    shapes, end = {}, 0
    places = []
    for name, entry in entries.items():
        shapes[name], first, last = _entry(entry, f"{short(name)} in {path}")
        places.append((first, last, name))
    for first, last, name in sorted(places):
        if first != end:
            raise ValueError(
                f"{short(name)} in {path} must begin where the tensor before it ends, at {end}: "
                f"its data_offsets are {[first, last]}"
            )
        end = last
    if end != size - _LENGTH - length:
        raise ValueError(
            f"{path} must end with its last tensor: the header describes {end:,} bytes of data, "
            f"and the file has {size - _LENGTH - length:,}"
        )
    return shapes


def _entry(entry: Any, where: str) -> tuple[tuple[int, ...], int, int]:
    """Shape of a tensor, and its first and last byte."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(
            f"{where} must have dtype, shape and data_offsets and no more: got {short(entry)}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{where} must be floating point, {list(_BYTES)}: got {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS:
        raise ValueError(
            f"{where} must have a shape of at most {_MAX_DIMS} whole numbers: got {short(shape)}"
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where} must have two data_offsets: got {short(offsets)}")
    needed = math.prod(shape) * _BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f"{where} must have the {needed:,} bytes of its shape {shape} in {dtype}: "
            f"its data_offsets are {offsets}"
        )
    return tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
