"""Tensors on disk by key, in safetensors shards that several processes may write at once.

A shard is written under a hidden name, flushed to disk and renamed; it is never changed after. Its
header holds, per entry, a checksum and the dtype that the tensor had before it was stored. The
index in memory is made from headers alone.
"""

import contextlib
import hashlib
import logging
import os
import time
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_log = logging.getLogger("fastalign.teachers")
_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_DAY = 86400.0
_BLOCK = 4096
_OpenShard = tuple[Any, Mapping[str, str], int]  # handle, notes in the header, bytes of the file


class ShardStore:
    """A folder of shards: keys of 32 bytes to tensors on the CPU.

    Args:
        folder: Made when it is missing.
        dtype: In which tensors are stored; None for their own.
        shard_bytes: Tensors wait in memory until they are this many bytes.
        max_bytes: Of the folder; nothing is stored beyond. None for no limit.
        open_shards: Most shards that are kept open for reading.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int,
        max_bytes: int | None = None,
        open_shards: int = 16,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, dtype
        self.shard_bytes, self.max_bytes, self.open_shards = shard_bytes, max_bytes, open_shards
        self.stored_bytes = self.pending_bytes = 0
        self.full = False
        self._writer, self._written = uuid.uuid4().hex[:16], 0
        self._index: dict[bytes, str] = {}
        self._seen: set[str] = set()
        self._bad: set[str] = set()
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._pending: dict[bytes, tuple[Tensor, torch.dtype]] = {}
        self._remove_old_partials()
        self.refresh()

    def __len__(self) -> int:
        """Entries on disk, as far as seen, and waiting to be written."""
        return len(self._index.keys() | self._pending.keys())

    def get(self, key: bytes) -> Tensor | None:
        """The tensor of a key, in its dtype before storing; None when none is whole."""
        if key in self._pending:
            tensor, dtype = self._pending[key]
            return tensor.to(dtype)
        while (name := self._index.get(key)) is not None:
            try:
                return self._read(name, key)
            except FileNotFoundError:  # removed while the run goes on
                self._forget(name)
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                self._reject(name, error)
        return None

    def put(self, tensors: Mapping[bytes, Tensor]) -> list[Tensor]:
        """Stores tensors, and returns what `get` gives for them from now on, on their devices.

        All of one call come into one shard, or none is stored.
        """
        kept = [t.detach().to(self.dtype or t.dtype) for t in tensors.values()]
        given = [k.to(t.dtype) for k, t in zip(kept, tensors.values(), strict=True)]
        size = sum(k.nbytes for k in kept)
        if self._fits(size):
            for (key, tensor), stored in zip(tensors.items(), kept, strict=True):
                # A copy, since a slice would keep the whole batch in memory.
                copy = torch.empty_like(stored, device="cpu").copy_(stored)
                self._pending[key] = (copy.contiguous(), tensor.dtype)
            self.pending_bytes += size
            if self.pending_bytes >= self.shard_bytes:
                self.flush()
        return given

    def flush(self) -> None:
        """Writes what waits; afterwards it survives whatever happens to the process."""
        if not self._pending:
            return
        waiting, self._pending, self.pending_bytes = self._pending, {}, 0
        name = f"{self._writer}-{os.getpid()}-{self._written:06d}{_SUFFIX}"
        partial, final = self.folder / f".{name}{_PARTIAL}", self.folder / name
        about = {
            key.hex(): f"{checksum(key, tensor, str(dtype)):016x} {dtype}"
            for key, (tensor, dtype) in waiting.items()
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({k.hex(): tensor for k, (tensor, _) in waiting.items()}, partial, about)
            _sync(partial)
            os.replace(partial, final)
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self.full = True
            warnings.warn(
                f"teacher features cannot be written to {final}: {error}; no more are stored",
                stacklevel=2,
            )
            return
        self._written += 1
        self._seen.add(name)
        self.stored_bytes += final.stat().st_size
        self._index.update(dict.fromkeys(waiting, name))

    def flush_if_there(self) -> None:
        """`flush`, unless the folder has been removed: nobody waits for these features then."""
        if self.folder.is_dir():
            self.flush()

    def refresh(self) -> None:
        """Takes in the shards that were written since, by this process or another."""
        try:
            names = [entry.name for entry in os.scandir(self.folder)]
        except FileNotFoundError:
            return
        for name in sorted(names):
            if not name.endswith(_SUFFIX) or name.startswith(".") or name in self._seen:
                continue
            self._seen.add(name)
            try:
                self.stored_bytes += (self.folder / name).stat().st_size
                if name not in self._bad:
                    handle, about, _ = self._opened(name)
                    keys = [bytes.fromhex(key) for key in handle.keys()]  # noqa: SIM118
                    if {k.hex() for k in keys} != about.keys():
                        raise ValueError("its header does not list its entries")
                    for key in keys:
                        self._index.setdefault(key, name)
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError) as error:
                self._reject(name, error, rebuild=False)

    def close(self) -> None:
        """Writes what waits and closes all shards; both are done again when needed."""
        self.flush()
        self._open.clear()

    def _opened(self, name: str) -> _OpenShard:
        """An open shard; those longest unused are closed."""
        if name not in self._open:
            path = self.folder / name
            size = path.stat().st_size
            handle: Any = safe_open(path, framework="pt")
            self._open[name] = (handle, handle.metadata() or {}, size)
        self._open.move_to_end(name)
        while len(self._open) > self.open_shards:
            self._open.popitem(last=False)
        return self._open[name]

    def _read(self, name: str, key: bytes) -> Tensor:
        handle, about, size = self._opened(name)
        if (self.folder / name).stat().st_size != size:
            raise ValueError("its size has changed")  # reading on would be a bus error
        expected, dtype = about[key.hex()].split()
        tensor: Tensor = handle.get_tensor(key.hex())
        if checksum(key, tensor, dtype) != int(expected, 16):
            raise ValueError(f"the checksum of {key.hex()} is wrong")
        return tensor.to(getattr(torch, dtype.removeprefix("torch.")))

    def _reject(self, name: str, error: Exception, *, rebuild: bool = True) -> None:
        """Treats a shard as missing from now on, and says so once."""
        warnings.warn(
            f"{self.folder / name} is no whole shard of teacher features ({error}): its features "
            "are computed again; delete it",
            stacklevel=2,
        )
        self._bad.add(name)
        self._open.pop(name, None)
        if rebuild:
            self._rebuild()

    def _forget(self, name: str) -> None:
        self._open.pop(name, None)
        self._rebuild()

    def _rebuild(self) -> None:
        """Reads all headers again: another shard may hold what was taken from a lost one."""
        self._index.clear()
        self._seen.clear()
        self.stored_bytes = 0
        self.refresh()

    def _fits(self, size: int) -> bool:
        """Whether so many more bytes may be stored; the first time that not, it is logged."""
        if self.full or self.max_bytes is None:
            return not self.full
        self.full = self.stored_bytes + self.pending_bytes + size > self.max_bytes
        if self.full:
            _log.warning(
                "%s has reached its limit of %.2f GiB: no more teacher features are stored",
                self.folder, self.max_bytes / 2**30,
            )  # fmt: skip
        return not self.full

    def _remove_old_partials(self) -> None:
        """What killed processes left half written, once nobody can be writing it any more."""
        for path in self.folder.glob(f".*{_PARTIAL}"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _DAY:
                    path.unlink()


def checksum(key: bytes, tensor: Tensor, dtype: str) -> int:
    """64 bits that change with key, dtypes, shape, and any altered word or lost block of bytes.

    Sums of 8-byte words by blocks, added with odd weights, modulo 2^64: at the speed of memory,
    where CRC-32 would cost as much as the rest of a hit.
    """
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    about = key + f"{dtype} {tensor.dtype} {tuple(tensor.shape)}".encode()
    if spare := -raw.numel() % _BLOCK:
        raw = torch.nn.functional.pad(raw, (0, spare))
    blocks = raw.view(torch.int64).view(-1, _BLOCK // 8).sum(1)
    total = int((blocks * (2 * torch.arange(len(blocks)) + 1)).sum())
    head = int.from_bytes(hashlib.sha256(about).digest()[:8], "little")
    return (total + head) % 2**64


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
