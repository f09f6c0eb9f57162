"""Features of a frozen teacher, kept on disk by view."""

import hashlib
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fastalign.models import Batch
from fastalign.teachers._patch import Features, PatchTeacher, Teacher, Views, pixel_views, raw_bytes

_FORMAT = 1  # of the keys and of what is stored under them


class CachedTeacher:
    """A teacher whose features of each view are stored on disk: a second epoch costs no teacher.

    A view is known by the SHA-256 of its pixels (bytes, shape, dtype), and by autocast's dtype
    where that is on; two views of equal pixels are one entry. A teacher is known by its name and,
    a `PatchTeacher`, by its fingerprint (`PatchTeacher.fingerprint`, taken here, so cast the
    teacher before), and has a subfolder of its own. Views that are found never reach the teacher;
    a `PatchTeacher` sees the others alone, another callable the whole batch.

    Hashing pixels that lie on a GPU copies them to the host. A batch may instead hold `view_keys`,
    a list of one string per view: whoever gives them vouches that a key always stands for the same
    pixels. They are never mixed up with hashes.

    Features wait in memory until they fill a shard, and are also written by `flush`, by `close` and
    when the interpreter ends; a process that is killed loses no more than those that wait. Several
    processes may share the folder. A shard that is damaged (each entry has a checksum) is reported
    with its name and counts as missing.

    Args:
        teacher: A `PatchTeacher`, or a callable from a batch to (views, n, C), (views, h, w, C) or
            a list of (h, w, C), whose features of a view depend on that view alone.
        folder: Where the subfolder of this teacher is.
        views: A batch to its views' pixels (3, H, W): `VLM.views`. When None, the `PatchTeacher`'s
            own; else the images of a four-dimensional `pixel_values`.
        name: Of the subfolder. A callable that is no `PatchTeacher` must be given one, and another
            when its features change.
        dtype: In which features are stored. None stores them as they are; torch.bfloat16, float32
            and float64 are cast back when read, and so are features that were just computed, so
            that all epochs see the same numbers.
        shard_mib: Size at which a shard is written, in MiB of memory.
        max_gib: Limit of the subfolder in GiB; beyond it nothing more is stored, which is logged
            once. None for no limit.

    Attributes:
        hits, misses: Views that were found and that were not, so far.

    Raises:
        TypeError: `teacher` is not callable.
        ValueError: A callable has no name, a name is no file name, or a number is out of range.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: str | Path,
        *,
        views: Views | None = None,
        name: str | None = None,
        dtype: torch.dtype | None = None,
        shard_mib: float = 256.0,
        max_gib: float | None = None,
    ) -> None:
        # Here, so that `import fastalign` does without safetensors.
        from fastalign.teachers._shards import ShardStore

        if not callable(teacher):
            raise TypeError(f"teacher must be callable: got {type(teacher).__name__}")
        if shard_mib <= 0 or (max_gib is not None and max_gib <= 0):
            raise ValueError(
                f"shard_mib and max_gib must be positive: got {shard_mib} and {max_gib}"
            )
        if dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
            # float16 would turn large features into infinities.
            raise ValueError(
                f"dtype must be torch.bfloat16, float32 or float64, or None: got {dtype}"
            )
        own = teacher.views if isinstance(teacher, PatchTeacher) else pixel_views
        self.teacher, self.views = teacher, views or own
        self._store = ShardStore(
            Path(folder) / _subfolder(teacher, name, dtype),
            dtype=dtype,
            shard_bytes=round(shard_mib * 2**20),
            max_bytes=None if max_gib is None else round(max_gib * 2**30),
        )
        self.hits = self.misses = 0
        # Holds the store, not the teacher, which may go as soon as nobody uses it.
        self._at_end = weakref.finalize(self, self._store.flush_if_there)

    @property
    def folder(self) -> Path:
        """The subfolder of this teacher."""
        return self._store.folder

    def __len__(self) -> int:
        """Views whose features are known, on disk or waiting to be written."""
        return len(self._store)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Features:
        """Features of a batch's views, read or computed.

        Returns:
            As the teacher's: a tensor where all views have one shape, else a list; on the teacher's
            device, or on that of the batch where the teacher is not a `PatchTeacher`.

        Raises:
            ValueError: `view_keys` or the teacher's features are not one per view.
        """
        given = batch.get("view_keys")
        views = None if given is not None else self._views(batch)
        device = self._device(batch)
        names = [str(key) for key in given] if given is not None else views or []
        if not names:
            return self.teacher.features([]) if isinstance(self.teacher, PatchTeacher) else []
        keys = [view_key(name, device) for name in names]
        found = {key: self._store.get(key) for key in dict.fromkeys(keys)}
        if None in found.values():
            self._store.refresh()  # another process may have computed them
            found = {k: self._store.get(k) if f is None else f for k, f in found.items()}
        missing = [key for key, features in found.items() if features is None]
        self.misses += (missed := sum(key in missing for key in keys))
        self.hits += len(keys) - missed
        if missing:
            found.update(self._compute(batch, views, keys, missing))
        maps = [found[key] for key in keys]
        return _joined([m for m in maps if m is not None], device)

    def flush(self) -> None:
        """Writes the features that wait in memory."""
        self._store.flush()

    def close(self) -> None:
        """Writes the features that wait and closes the files; a later call opens them again."""
        self._store.close()

    def __enter__(self) -> "CachedTeacher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _views(self, batch: Batch) -> list[Tensor]:
        return [] if batch.get("pixel_values") is None else list(self.views(batch))

    def _device(self, batch: Batch) -> torch.device:
        if isinstance(self.teacher, PatchTeacher):
            return self.teacher.device
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _compute(
        self, batch: Batch, views: list[Tensor] | None, keys: list[bytes], missing: list[bytes]
    ) -> dict[bytes, Tensor]:
        """Features of the missing keys from the teacher, as they are stored."""
        places = {key: keys.index(key) for key in missing}
        features: Sequence[Tensor] | Tensor
        if isinstance(self.teacher, PatchTeacher):
            views = self._views(batch) if views is None else views
            self._check("view_keys", keys, views)
            features = self.teacher.features([views[place] for place in places.values()])
        else:
            features = self.teacher(batch)
            self._check("the teacher's features", keys, features)
            features = [features[place] for place in places.values()]
        new = dict(zip(missing, features, strict=True))
        if not all(map_.isfinite().all() for map_ in new.values()):
            return new  # for the training to name; the next run would read them again
        return dict(zip(missing, self._store.put(new), strict=True))

    def _check(self, name: str, keys: list[bytes], found: Sequence[Tensor] | Tensor) -> None:
        if len(found) != len(keys):
            raise ValueError(
                f"{name} must be one per view: got {len(keys)} keys and {len(found)} views"
            )


def view_key(view: Tensor | str, device: torch.device) -> bytes:
    """SHA-256 of a view's pixels, or of its name, and of the arithmetic in force on `device`."""
    autocast = torch.is_autocast_enabled(device.type)
    precision = str(torch.get_autocast_dtype(device.type)) if autocast else "as it is"
    if isinstance(view, str):
        return hashlib.sha256(f"name {precision}\n{view}".encode()).digest()
    head = f"pixels {precision} {view.dtype} {tuple(view.shape)}\n".encode()
    digest = hashlib.sha256(head)
    digest.update(raw_bytes(view))
    return digest.digest()


def _subfolder(teacher: Teacher, name: str | None, dtype: torch.dtype | None) -> str:
    """A name that differs wherever stored features would."""
    known = ""
    if isinstance(teacher, PatchTeacher):
        known = teacher.fingerprint()
        name = name or type(teacher.model).__name__
    if not name or not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise ValueError(
            "name must be letters, digits, _, - and . (the teacher is no PatchTeacher, whose "
            f"weights tell it from others, so it needs a name of its own): got {name!r}"
        )
    about = f"{_FORMAT} {name} {known} {dtype}"
    return f"{name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def _joined(maps: list[Tensor], device: torch.device) -> Features:
    """One tensor where all shapes are equal; what was read is copied to the device at once."""
    if len({m.shape for m in maps}) > 1:
        return [m.to(device) for m in maps]
    if all(m.device.type == "cpu" for m in maps):
        return torch.stack(maps).to(device)
    return torch.stack([m.to(device) for m in maps])
