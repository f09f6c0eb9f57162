"""Tar shards as webdataset writes them, read in place: no file of them is ever extracted."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tarfile
from pathlib import Path
from typing import IO, Any

from fastalign.data._errors import SampleError

Members = dict[str, tuple[int, int]]  # (offset, size) by what follows the first dot of the name

# Stem (with its folders) and suffix: what comes before and after the first dot of the name.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_BLOCK = 512
_VERSION = 1
_log = logging.getLogger("fastalign.data")


def index_shard(path: Path, *, lenient: bool = False) -> list[tuple[str, Members]]:
    """Key and members of each sample of a tar file, in its order.

    The index is kept beside the shard as `.NAME.index.json`, for as long as the shard has the same
    size and time of change; where that cannot be written, it is made again each time.

    Args:
        path: An uncompressed tar file.
        lenient: Take what comes before damage, with a warning, instead of raising.

    Raises:
        ValueError: It is no tar file, it ends early or holds a damaged header, or a name twice.
    """
    stat = path.stat()
    stamp = [_VERSION, stat.st_size, stat.st_mtime_ns]
    kept = path.with_name(f".{path.name}.index.json")
    found = _read_index(kept, stamp)
    if found is not None:
        return found
    samples, fault = _scan(path, stat.st_size)
    if fault:
        if not lenient:
            raise ValueError(f"shard must be a whole, uncompressed tar file: {path}: {fault}")
        _log.warning("%s: %s; its first %d samples are used", path, fault, len(samples))
        return samples
    with contextlib.suppress(OSError):
        draft = kept.with_name(f"{kept.name}.{os.getpid()}")
        draft.write_text(json.dumps([stamp, samples]), encoding="utf-8")
        draft.replace(kept)
    return samples


def _read_index(kept: Path, stamp: list[int]) -> list[tuple[str, Members]] | None:
    """The index that was kept of a shard with this stamp, if it makes sense."""
    try:
        found, rows = json.loads(kept.read_text(encoding="utf-8"))
        if found != stamp:
            return None
        samples = []
        for key, members in rows:
            for offset, size in members.values():
                if not (0 <= offset <= offset + size <= stamp[1]):
                    return None
            samples.append((str(key), {str(k): (int(o), int(n)) for k, (o, n) in members.items()}))
        return samples
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _scan(path: Path, size: int) -> tuple[list[tuple[str, Members]], str]:
    """All samples up to the end, or up to the fault that is named."""
    samples: dict[str, Members] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.size < 0:  # would lead tarfile back, and round and round
                    raise tarfile.ReadError(f"a negative size at byte {member.offset}")
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("the file ends early")
                # Links would lead elsewhere, and the data of a sparse file is not contiguous.
                named = MEMBER_NAME.fullmatch(member.name)
                if named is None or not member.isreg() or member.issparse():
                    continue
                stem, suffix = named.groups()
                members = samples.setdefault(stem, {})
                if suffix.lower() in members:
                    return list(samples.items())[:-1], f"two members are named {member.name}"
                members[suffix.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        return _whole(samples), str(error)
    with path.open("rb") as file:
        if not at_end(file, end):
            return _whole(samples), f"a damaged header at byte {end}"
    return list(samples.items()), ""


def at_end(file: IO[bytes], offset: int) -> bool:
    """Whether a tar file ends at `offset`; tarfile takes a damaged header for its end."""
    file.seek(offset)
    return not any(file.read(_BLOCK))


def _whole(samples: dict[str, Members]) -> list[tuple[str, Members]]:
    """Without the last sample, of which more may have followed."""
    return list(samples.items())[:-1]


def read_member(path: Path, place: tuple[int, int]) -> bytes:
    """The bytes of a member.

    Raises:
        SampleError: The shard cannot be read there.
    """
    offset, size = place
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise SampleError(f"shard must be readable: {path}: {error}", "invalid_record") from error
    if len(data) != size:
        raise SampleError(f"shard must not have changed: {path} has become shorter")
    return data


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object of a member."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise SampleError(f"json must be valid: {error}") from None
    if not isinstance(value, dict):
        raise SampleError(f"json must hold an object: got {type(value).__name__}")
    return value
