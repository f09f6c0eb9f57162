"""Training checkpoints: what is trained, and all else that a run goes on from.

A checkpoint is written into a hidden folder, flushed to disk and renamed, so that a folder named
`checkpoint-N` was whole when it got its name. Its manifest, written last, holds the size and the
SHA-256 of every file: damage that comes later is found before a run goes on. Files are safetensors
and JSON; nothing is unpickled.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign._manifest import (
    FILES,
    FORMAT,
    MANIFEST,
    OPTIMIZER,
    PREFIX,
    STATES,
    TRAINED,
    layout_of,
    sha256_of,
    step_of,
)
from fastalign._manifest import verify as verify
from fastalign.models._side_stream import is_part, is_writer, whole_tensor


def checkpoints(folder: Path) -> list[Path]:
    """Folders named `checkpoint-N` in `folder`, by N; `verify` says whether one is whole."""
    found = [path for path in folder.glob(PREFIX + "*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; None where there is none at all.

    Warns of each that is passed over, with what is wrong with it.

    Raises:
        ValueError: There are checkpoints, and none verifies. To start over in silence would lose
            the run.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        problems = verify(path)
        if not problems:
            return path
        warnings.warn(f"{path} is passed over: {'; '.join(problems)}", stacklevel=2)
    if not found:
        return None
    raise ValueError(
        f"output_dir must hold a checkpoint that verifies, or none: got {folder} with "
        f"{', '.join(path.name for path in found)}, all damaged ({found[-1].name}: {problems[0]}). "
        "To start over delete them, choose another output_dir or resume=False"
    )


def save(
    folder: Path,
    step: int,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    states: dict[str, dict[str, Any]],
    keep: int,
) -> Path:
    """Write `checkpoint-{step}`, then remove all but the newest `keep` up to this step.

    Of tensors that FSDP2 has sharded every rank must call; the first one writes them whole, so that
    the files are those of one process.

    A checkpoint of a later step is of a run that was given up, and goes too. None goes unless one
    of those that stay verifies.

    Args:
        folder: Of the run.
        step: Optimizer steps done.
        trained: Parameters and buffers by name.
        optimizer: Its state is stored by the position of each parameter.
        states: By name of `STATES`: JSON for a `.json`, tensors by name for a `.safetensors`.
        keep: At least 1.

    Raises:
        FloatingPointError: A weight or a moment is not finite. Nothing is written.
        OSError: The disk did not take a file: names it and the bytes it needs. What was written is
            removed, and the checkpoints before it are as they were.
    """
    if set(states) != set(STATES):
        raise ValueError(f"states must be given for {sorted(STATES)}: got {sorted(states)}")
    moments = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    partial, final = folder / f".{PREFIX}{step}.partial", folder / f"{PREFIX}{step}"
    writes = is_writer(trained)
    trained, moments = (_gathered(tensors, writes) for tensors in (trained, moments))
    if not writes:
        return final
    contents: dict[str, dict[str, Any]] = {TRAINED: trained, OPTIMIZER: moments, **states}
    _refuse_not_finite(contents, step)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = {name: _write(partial / name, contents[name]) for name in FILES}
        _write(partial / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        with _told(partial, 0):
            _flush(partial)
            if final.exists():
                _remove(final)
            os.replace(partial, final)
            _flush(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _retain(folder, step, keep)
    return final


def load(
    path: Path, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """Restore parameters, buffers and the optimizer in place; return the states `save` was given.

    They may be sharded: each rank reads the files and takes its part.

    Raises:
        ValueError: The checkpoint's tensors are not those of this run; nothing is changed.
    """
    from safetensors.torch import load_file

    stored = load_file(path / TRAINED)
    if stored.keys() != trained.keys():
        raise ValueError(
            f"{path} must hold what this run trains: missing "
            f"{sorted(trained.keys() - stored.keys())}, unknown "
            f"{sorted(stored.keys() - trained.keys())}"
        )
    for name, tensor in trained.items():
        if tensor.shape != stored[name].shape:
            raise ValueError(
                f"{name} in {path} must have the shape {tuple(tensor.shape)}: "
                f"got {tuple(stored[name].shape)}"
            )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / OPTIMIZER).items():
        index, name = key.split(".", 1)
        fits = int(index) < len(parameters)
        if not fits or (value.dim() and value.shape != parameters[int(index)].shape):
            raise ValueError(f"{key} in {path / OPTIMIZER} must fit a parameter of this run")
        if value.dim():
            value = _sharded_as(parameters[int(index)], value)
        state.setdefault(int(index), {})[name] = value
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(_sharded_as(tensor, stored[name]))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return {
        name: json.loads((path / name).read_text())
        if name.endswith(".json")
        else load_file(path / name)
        for name in STATES
    }


def remove_leftovers(folder: Path) -> None:
    """Remove what saves and removals that were killed left in `folder`."""
    for path in folder.glob(f".{PREFIX}*"):
        if path.suffix in (".partial", ".removed"):
            shutil.rmtree(path, ignore_errors=True)


def trained_tensors(model: nn.Module, state: nn.Module | None) -> dict[str, Tensor]:
    """What a checkpoint holds: trainable parameters of the model, and the objective's state."""
    tensors: dict[str, Tensor] = {
        f"model.{k}": p for k, p in model.named_parameters() if p.requires_grad
    }
    if state is not None:
        tensors |= {f"objective.{k}": v for k, v in state.state_dict(keep_vars=True).items()}
    return tensors


def _refuse_not_finite(contents: dict[str, dict[str, Any]], step: int) -> None:
    for file in (TRAINED, OPTIMIZER):
        for name, tensor in contents[file].items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} must be finite to be written to {file} at step {step}: got NaN or "
                    "infinity; the checkpoints before it are whole"
                )


def _write(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write a file and bring it to disk; return its entry in the manifest."""
    from safetensors.torch import save_file

    layouts = {}
    if path.suffix == ".json":
        text = json.dumps(content, indent=2) + "\n"
        with _told(path, len(text)):
            path.write_text(text)
            _flush(path)
    else:
        tensors = {name: _plain(tensor) for name, tensor in content.items()}
        layouts = {name: layout_of(tensor) for name, tensor in tensors.items()}
        with _told(path, sum(t.numel() * t.element_size() for t in tensors.values())):
            save_file(tensors, path)
            _flush(path)
    with _told(path, 0):
        return {"bytes": path.stat().st_size, "sha256": sha256_of(path), "tensors": layouts}


@contextlib.contextmanager
def _told(path: Path, needed: int) -> Iterator[None]:
    """Say in an error which file it was, and how many bytes it needs."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if told := re.search(r"os error (\d+)", str(error)):  # how safetensors gives it
            number = int(told[1])
        free = shutil.disk_usage(path.parent.parent).free
        whole = path.parent.name.removeprefix(".").removesuffix(".partial")
        raise OSError(
            number or errno.EIO,
            f"{path.name} of {whole} could not be written: it needs {needed} bytes, "
            f"{free} are free ({error}). The checkpoints before it are whole: free space, then "
            "start the run again",
        ) from error


def _retain(folder: Path, step: int, keep: int) -> None:
    found = checkpoints(folder)
    kept = [path for path in found if step_of(path) <= step][-keep:]
    old = [path for path in found if path not in kept]
    if not old:
        return
    if not any(not verify(path) for path in reversed(kept)):
        warnings.warn(f"{kept[-1]} does not verify: no older checkpoint is removed", stacklevel=3)
        return
    for path in old:
        _remove(path)


def _remove(path: Path) -> None:
    """Under another name first, so that no half of it is ever taken for a checkpoint."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


@torch.no_grad()
def _gathered(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one by one; nothing where they are not kept. Others as they are."""
    found = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor)
        if keep:
            found[name] = tensor if whole is tensor else whole.cpu()
    return found


def _sharded_as(like: Tensor, whole: Tensor) -> Tensor:
    """A tensor that every rank has read, sharded as `like` is; itself where that is not."""
    if not is_part(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    # Of the rank's own copy: nothing is sent.
    return distribute_tensor(
        whole.to(like.device), sharded.device_mesh, sharded.placements, src_data_rank=None
    )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _flush(path: Path) -> None:
    """Bring a file or folder to disk before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
