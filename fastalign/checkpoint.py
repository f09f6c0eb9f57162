"""Training checkpoints: what is trained, the optimizer and the step, in safetensors and JSON.

A checkpoint is written into a hidden folder, flushed to disk and renamed, so that a folder named
`checkpoint-N` is always whole. The order of the data and the random numbers follow from the step,
so neither is stored.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 1
_PREFIX = "checkpoint-"
_FILES = ("trained.safetensors", "optimizer.safetensors", "trainer.json")


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    found = []
    for path in folder.glob(_PREFIX + "*"):
        step = path.name[len(_PREFIX) :]
        if step.isdigit() and all((path / name).is_file() for name in _FILES):
            found.append((int(step), path))
    return [path for _, path in sorted(found)]


def save(
    folder: Path,
    step: int,
    trained: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-{step}` and remove all but the newest `keep`.

    Args:
        folder: Of the run.
        step: Optimizer steps done.
        trained: Parameters and buffers by name.
        optimizer: Its state is stored by the position of each parameter.
        about: What `load` gives back; JSON.
        keep: At least 1.
    """
    from safetensors.torch import save_file

    partial, final = folder / f".{_PREFIX}{step}.partial", folder / f"{_PREFIX}{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: _plain(v) for k, v in trained.items()}, partial / _FILES[0])
    moments = {
        f"{index}.{name}": _plain(value)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    save_file(moments, partial / _FILES[1])
    text = json.dumps({"format": FORMAT, "step": step, **about}, indent=2)
    (partial / _FILES[2]).write_text(text + "\n")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(
    path: Path, trained: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore parameters, buffers and the optimizer in place; return what `save` was told.

    Raises:
        ValueError: The checkpoint's tensors are not those of this run.
    """
    from safetensors.torch import load_file

    about: dict[str, Any] = json.loads((path / _FILES[2]).read_text())
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a checkpoint of format {FORMAT}: got {about.get('format')}"
        )
    stored = load_file(path / _FILES[0])
    if stored.keys() != trained.keys():
        raise ValueError(
            f"{path} must hold what this run trains: missing "
            f"{sorted(trained.keys() - stored.keys())}, unknown "
            f"{sorted(stored.keys() - trained.keys())}"
        )
    with torch.no_grad():
        for name, tensor in trained.items():
            if tensor.shape != stored[name].shape:
                raise ValueError(
                    f"{name} in {path} must have the shape {tuple(tensor.shape)}: "
                    f"got {tuple(stored[name].shape)}"
                )
            tensor.copy_(stored[name])
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path / _FILES[1]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return about


def trained_tensors(model: nn.Module, state: nn.Module | None) -> dict[str, Tensor]:
    """What a checkpoint holds: trainable parameters of the model, and the objective's state."""
    tensors: dict[str, Tensor] = {
        f"model.{k}": p for k, p in model.named_parameters() if p.requires_grad
    }
    if state is not None:
        tensors |= {f"objective.{k}": v for k, v in state.state_dict(keep_vars=True).items()}
    return tensors


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().clone()


def _flush(path: Path) -> None:
    """Bring a file or folder to disk before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
