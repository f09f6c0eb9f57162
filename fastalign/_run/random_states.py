"""States of a process's random generators as tensors: torch's, its device's, Python's and NumPy's.

A step seeds torch by its number, so only what draws from the others, or between steps, needs them.
"""

import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def states(device: torch.device) -> dict[str, Tensor]:
    """Of this process, uint8, by name; always of the same sizes."""
    version, words, gauss = random.getstate()
    assert version == 3
    found = {
        "torch": torch.get_rng_state(),
        "python": _bytes(words, [math.nan if gauss is None else gauss]),
    }
    legacy = np.random.get_state(legacy=True)
    if isinstance(legacy, tuple):  # a dict where the global generator was replaced by another kind
        _, keys, position, has_gauss, cached = legacy
        found["numpy"] = _bytes((*keys.tolist(), position), [has_gauss, cached])
    if device.type != "cpu":
        found["device"] = torch.get_device_module(device).get_rng_state()
    return found


def restore(stored: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators of this process to what `states` returned."""
    torch.set_rng_state(stored["torch"])
    words, (gauss,) = _numbers(stored["python"], 625)
    random.setstate((3, tuple(words), None if math.isnan(gauss) else gauss))
    if "numpy" in stored:
        words, (has_gauss, cached) = _numbers(stored["numpy"], 625)
        keys = np.array(words[:-1], dtype=np.uint32)
        np.random.set_state(("MT19937", keys, words[-1], int(has_gauss), cached))
    if "device" in stored and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(stored["device"])


def gather(accelerator: Any) -> dict[str, Tensor]:
    """Of all ranks, by `rank.name`; every rank must call."""
    own = states(accelerator.device)
    packed = torch.cat(list(own.values())).to(accelerator.device)
    rows = accelerator.gather(packed).cpu().view(accelerator.num_processes, -1)
    sizes = [len(state) for state in own.values()]
    return {
        f"{rank}.{name}": state
        for rank, row in enumerate(rows)
        for name, state in zip(own, row.split(sizes), strict=True)
    }


def restore_rank(stored: dict[str, Tensor], accelerator: Any) -> None:
    """Give this rank what `gather` returned for it."""
    prefix = f"{accelerator.process_index}."
    own = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    restore(own, accelerator.device)


def _bytes(words: tuple[int, ...], reals: list[float]) -> Tensor:
    halves = (
        torch.tensor(words, dtype=torch.int64),
        torch.tensor(reals, dtype=torch.float64),
    )
    return torch.cat([half.view(torch.uint8) for half in halves])


def _numbers(state: Tensor, words: int) -> tuple[list[int], list[float]]:
    split = 8 * words
    integers, reals = state[:split].clone(), state[split:].clone()  # aligned for the views
    return integers.view(torch.int64).tolist(), reals.view(torch.float64).tolist()
