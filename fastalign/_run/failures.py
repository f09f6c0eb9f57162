"""What ends a run from outside its arithmetic: a rank that is lost, and memory that is short."""

from __future__ import annotations

import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch

from fastalign.config import TrainConfig
from fastalign.progress import peak_memory_mib

# What torch says when the allocator of the CPU gets no memory.
_CPU_MEMORY = "can't allocate memory"
# What gloo, NCCL and the store say when another rank does not answer.
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
_PATIENCE = 2.0  # seconds in which the ranks that are left say that they are there


class LostRankError(RuntimeError):
    """Another rank was killed, has stalled or has stopped."""


class CPUMemoryError(RuntimeError):
    """The process got no memory; torch raises a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: a device's, or the process's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MEMORY in str(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed, for which another rank is to blame."""
    if not _distributed() or torch.distributed.get_world_size() < 2:
        return False
    known = isinstance(error, torch.distributed.DistError)
    return known or (isinstance(error, RuntimeError) and any(w in str(error) for w in _LOST))


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


# -- memory --------------------------------------------------------------------------------------


def short_of_memory(error: BaseException, config: TrainConfig, where: str) -> BaseException:
    """The same kind of error, with what would help this configuration, most helpful first."""
    device = torch.device("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")
    advice = "; ".join(memory_advice(config)) or "a larger device"
    message = (
        f"out of memory {where} (peak {peak_memory_mib(device):.0f} MiB in this process): "
        f"{str(error).strip() or type(error).__name__}\nWhat would help, most helpful first: "
        f"{advice}. The checkpoints are whole"
    )
    if isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError(message)
    return MemoryError(message) if isinstance(error, MemoryError) else CPUMemoryError(message)


def memory_advice(config: TrainConfig) -> list[str]:
    """Settings that lower the memory of a step, those that cost least and help most first."""
    size, micro = config.batch_size, config.gradient_accumulation_steps
    found = []
    if size > 1:
        smaller = next(k for k in range(size // 2, 0, -1) if size % k == 0)
        more = micro * (size // smaller)
        found.append(
            f"batch_size={smaller} with gradient_accumulation_steps={more} (now {size} and "
            f"{micro}), which makes the same step"
        )
    if not config.gradient_checkpointing:
        found.append("gradient_checkpointing=True")
    if config.max_length is None:
        found.append('max_length, with on_overflow="truncate" (now no limit)')
    else:
        found.append(f"a max_length below {config.max_length}")
    if not config.bf16:
        found.append("bf16=True")
    if config.objective == "deepalign":
        if config.deepalign.weight("visual") and not config.teacher_cache:
            found.append("teacher_cache, which keeps the teacher's features on disk")
        if config.deepalign.intervenes and len(config.deepalign.layers) != 1:
            found.append("fewer deepalign.layers")
    if config.trains_base:
        found.append('trainable="adapters" without train_vision_from, or several ranks with FSDP2')
    return found


# -- ranks ---------------------------------------------------------------------------------------


class Ranks:
    """Lets ranks tell each other why they stop, through the store they met by.

    A rank that dies takes its connections with it, so the others fail at their next exchange, at
    once or after the time-out. What they say then is what they can read here.
    """

    runs = 0

    def __init__(self) -> None:
        Ranks.runs += 1  # ranks start their runs in the same order
        self._prefix = f"fastalign/{Ranks.runs}/"

    def stopped(self, error: BaseException, where: str) -> None:
        """Leave word for the others."""
        if _distributed() and torch.distributed.get_world_size() > 1:
            text = f"{type(error).__name__} {where}: {' '.join(str(error).split())[:500]}"
            rank = torch.distributed.get_rank()
            _in_time(lambda: _store().set(f"{self._prefix}{rank}", text))

    def others(self) -> str:
        """What became of the other ranks, as far as that can be known within seconds."""
        ranks, own = torch.distributed.get_world_size(), torch.distributed.get_rank()
        waiting = [rank for rank in range(ranks) if rank != own]
        told: dict[int, str] = {}

        def ask() -> None:
            store = _store()
            store.set(f"{self._prefix}{own}", "")
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end and len(told) < len(waiting):
                for rank in waiting:
                    if rank not in told and store.check([f"{self._prefix}{rank}"]):
                        told[rank] = store.get(f"{self._prefix}{rank}").decode()
                time.sleep(0.05)

        if not _in_time(ask) and own != 0:
            return "rank 0, which keeps the ranks' store, is gone or stalled: see its output"
        words = [f"rank {rank} stopped with {text}" for rank, text in sorted(told.items()) if text]
        silent = [str(rank) for rank in waiting if rank not in told]
        if silent:
            of = f"rank{'s' * (len(silent) > 1)} {', '.join(silent)}"
            words.append(f"nothing is heard of {of}, killed or stalled")
        return "; ".join(words) or "all other ranks are there, and lost one another"


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _in_time(ask: Any) -> bool:
    """Run `ask`, but not for long: a store whose process has stalled would never answer."""
    done = threading.Event()

    def run() -> None:
        with suppress(Exception):  # the store may have died with its rank
            ask()
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PATIENCE + 1.0)
    return done.is_set()


def lost_rank(error: BaseException, config: TrainConfig, ranks: Ranks, where: str) -> LostRankError:
    """What the ranks that are left say: where it was, who is missing, and what to do."""
    return LostRankError(
        f"another rank was lost {where}, in {_waited_in(error)}: {ranks.others()}. A rank that "
        f"does not answer is given up after ddp_timeout={config.ddp_timeout:g} s; raise it if a "
        "rank is only slow. The checkpoints are whole: start the run again, and it goes on from "
        f"the newest ({' '.join(str(error).split())[:300]})"
    )


def _waited_in(error: BaseException) -> str:
    """The exchange that failed, and which function of fastalign asked for it."""
    frames = traceback.extract_tb(error.__traceback__)
    of_torch = [f.name for f in frames if "distributed" in f.filename and f.name != "wrapper"]
    backward = any(f.name == "backward" for f in frames)
    exchange = "the gradients' exchange" if backward else (of_torch or ["an exchange"])[-1]
    own = [f.name for f in frames if "fastalign" in f.filename and not f.name.startswith("__")]
    return f"{exchange} of {own[-1]}" if own else exchange


def process_group(config: TrainConfig) -> Any:
    """accelerate's settings of the process group, with this run's time-out."""
    from accelerate import InitProcessGroupKwargs

    # accelerate leaves out what equals its default of 600 s, and torch has another for gloo.
    return InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout, microseconds=1))
