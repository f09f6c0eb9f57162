"""The manifest of a checkpoint, and what it tells of damage."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT = 2
PREFIX = "checkpoint-"
MANIFEST, TRAINED, OPTIMIZER = "manifest.json", "trained.safetensors", "optimizer.safetensors"
# What a run is besides its tensors; `checkpoint.save` is given one entry for each.
STATES = ("trainer.json", "schedule.json", "sampler.json", "rng.safetensors", "log.safetensors")
FILES = (TRAINED, OPTIMIZER, *STATES)


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each fault, which names the file; [] if nothing.

    Reads every byte: the manifest, sizes, SHA-256, whether JSON parses, names, shapes and dtypes of
    tensors, and whether their values are finite.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        form, step, files = manifest["format"], manifest["step"], manifest["files"]
        entries = {
            name: (int(files[name]["bytes"]), str(files[name]["sha256"]), files[name]["tensors"])
            for name in FILES
        }
        unknown = sorted(files.keys() - set(FILES))
    except FileNotFoundError:
        return [f"{MANIFEST} is missing{_older_format(path)}"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if form != FORMAT:
        return [f"{MANIFEST} is of format {form}: this version reads format {FORMAT} only"]
    problems = [f"{MANIFEST} lists {name}, which belongs to no checkpoint" for name in unknown]
    if step != step_of(path):
        problems.append(f"{MANIFEST} is of step {step}, and the folder's name of {step_of(path)}")
    for name, (size, digest, tensors) in entries.items():
        problems += _file_problems(path / name, size, digest, tensors)
    return problems


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 for any other name."""
    match = re.fullmatch(PREFIX + r"(\d+)", path.name, re.ASCII)
    return int(match[1]) if match else -1


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def layout_of(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _file_problems(path: Path, size: int, digest: str, tensors: Any) -> list[str]:
    from safetensors import SafetensorError

    name = path.name
    try:
        actual = path.stat().st_size
        if actual != size:
            what = "truncated" if actual < size else "too long"
            return [f"{name} is {what}: {actual} bytes instead of {size}"]
        problems = [] if sha256_of(path) == digest else [f"{name} has changed: SHA-256 differs"]
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            problems += _tensor_problems(path, tensors)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        return [f"{name} cannot be read ({type(error).__name__}: {error})"]
    return problems


def _tensor_problems(path: Path, expected: dict[str, str]) -> list[str]:
    from safetensors import safe_open

    problems = []
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
        for name in sorted(names ^ expected.keys()):
            what = "holds an unknown" if name in names else "lacks"
            problems.append(f"{path.name} {what} {name}")
        for name in sorted(names & expected.keys()):
            tensor = stored.get_tensor(name)
            if layout_of(tensor) != expected[name]:
                layouts = f"{layout_of(tensor)} instead of {expected[name]}"
                problems.append(f"{path.name} holds {name} as {layouts}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                problems.append(f"{path.name} holds {name}, which is not finite")
    return problems


def _older_format(path: Path) -> str:
    """Format 1 had no manifest, and its number in `trainer.json`."""
    try:
        form = json.loads((path / "trainer.json").read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f": the checkpoint is of format {form}, and this version reads format {FORMAT} only"
