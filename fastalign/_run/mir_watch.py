"""MIR of a model in training: every few steps on the same samples, until it stands still."""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fastalign._run import random_states
from fastalign.config import TrainConfig
from fastalign.models import VLM
from fastalign.models._mir import check_image_tokens, measure_mir

Batches = Iterable[Mapping[str, Any]]


class MIRWatch:
    """Measures MIR when it is due, on the same samples each time, and counts where it stays.

    Measuring changes nothing that training draws or computes: modes and random generators (torch's,
    its device's, Python's, NumPy's) are put back. While it lasts they start from `seed`, so that a
    collate function that draws makes the same batches each time.

    Args:
        data: Batches, which are read once and kept; or, with `collate`, a map-style dataset.
        every: Steps between two measurements; 0 for never.
        samples, patience, min_delta, collate, batch_size, seed: See `MIRCallback`.
        bf16: Measure under automatic mixed precision in bfloat16.
        options: `method`, `outliers` and `text` of `measure_mir`.
    """

    def __init__(
        self,
        data: Any,
        *,
        every: int,
        samples: int,
        patience: int | None,
        min_delta: float,
        collate: Callable[[list[Any]], Mapping[str, Any]] | None,
        batch_size: int,
        seed: int,
        bf16: bool = False,
        **options: Any,
    ) -> None:
        self.every, self.samples = every, samples
        self.patience, self.min_delta = patience, min_delta
        self.collate, self.batch_size, self.seed = collate, batch_size, seed
        self.bf16, self.options = bf16, options
        self._data = data
        self._own: list[Mapping[str, Any]] | None = None  # this rank's batches, once read
        self._best, self._without = math.inf, 0

    # Measuring

    def measure(self, vlm: VLM, rank: int, ranks: int) -> dict[str, Any]:
        """`measure_mir` of the samples; every rank runs its share, and all get the same number."""
        device = next(vlm.model.parameters()).device
        half = torch.autocast(device.type, torch.bfloat16) if self.bf16 else None
        with self._apart(device), half or contextlib.nullcontext():
            found = measure_mir(vlm, self._share(rank, ranks), **self.options)
        if ranks > 1:  # what ends training must be the same number everywhere
            mir = torch.tensor(found["mir"], dtype=torch.float64, device=device)
            torch.distributed.broadcast(mir, 0)
            found["mir"] = float(mir)
        return found

    @contextlib.contextmanager
    def _apart(self, device: torch.device) -> Iterator[None]:
        """Random generators of its own."""
        before = random_states.states(device)
        torch.default_generator.manual_seed(self.seed)  # of the CPU, where batches are made
        random.seed(self.seed)
        np.random.seed(self.seed % 2**32)
        try:
            yield
        finally:
            random_states.restore(before, device)

    def check_samples(self, vlm: VLM) -> None:
        """Refuse, before the first step, samples of which none has an image.

        Raises:
            ValueError: There is no image token in them, or the model knows none.
        """
        check_image_tokens(vlm)
        assert self.collate is not None
        device = next(vlm.model.parameters()).device
        with self._apart(device):
            for batch in self._collated(0, 1, self.collate):
                ids = {"input_ids": batch["input_ids"].to(device)}
                if vlm.vision_mask(ids).any():
                    return
        raise ValueError(
            f"mir_every needs samples with images: none of {self.samples} that were drawn has one; "
            "raise mir_samples, or set mir_every to 0"
        )

    # Judging

    def judge(self, mir: float) -> None:
        """Take a value in."""
        if mir < self._best - self.min_delta:
            self._best, self._without = mir, 0
        else:
            self._without += 1

    def forget(self) -> None:
        """As before the first value."""
        self._best, self._without = math.inf, 0

    @property
    def stands_still(self) -> bool:
        """Whether there was no new minimum for `patience` values."""
        return self.patience is not None and self._without >= self.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, for JSON."""
        best = None if math.isinf(self._best) else self._best
        return {"best": best, "without": self._without, "samples": self.samples}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what `state` returned; from nothing where other samples were measured."""
        if state and state["samples"] == self.samples:
            self._best = math.inf if state["best"] is None else state["best"]
            self._without = state["without"]

    # Samples

    def _share(self, rank: int, ranks: int) -> Batches:
        """This rank's batches: every `ranks`-th."""
        if self.collate is not None:
            return self._collated(rank, ranks, self.collate)
        if self._own is None:
            self._own = [b for i, b in enumerate(self._first_batches()) if i % ranks == rank]
            self._data = None
        return self._own

    def _first_batches(self) -> Iterator[Mapping[str, Any]]:
        left = self.samples
        for batch in self._data:
            yield batch
            left -= len(batch["input_ids"])
            if left <= 0:
                return

    def _collated(
        self, rank: int, ranks: int, collate: Callable[[list[Any]], Mapping[str, Any]]
    ) -> Batches:
        """Batches made anew each time: images in memory would take more than decoding takes."""
        size = len(self._data)
        drawn = random.Random(self.seed).sample(range(size), min(self.samples, size))
        groups = [drawn[i : i + self.batch_size] for i in range(0, len(drawn), self.batch_size)]
        for group in groups[rank::ranks]:
            yield collate([self._data[i] for i in group])


class RunWatch(MIRWatch):
    """The watch of a run of `fastalign.train`, which takes its place in the loop.

    Args:
        vlm, ranks: The model, and `(process_index, num_processes)`.
        settings: Of `MIRWatch`.
    """

    def __init__(self, data: Any, vlm: VLM, ranks: tuple[int, int], **settings: Any) -> None:
        super().__init__(data, **settings)
        self._vlm, self._ranks = vlm, ranks

    def after(self, step: int) -> dict[str, float]:
        """What the log gets after `step` steps, "mir" and "mir_seconds"; nothing if it is not due.

        Every rank must call.
        """
        if not self.every or step % self.every:
            return {}
        start = time.perf_counter()
        mir = self.measure(self._vlm, *self._ranks)["mir"]
        self.judge(mir)
        return {"mir": mir, "mir_seconds": time.perf_counter() - start}


def watch_of(
    config: TrainConfig,
    vlm: VLM,
    dataset: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    accelerator: Any,
) -> RunWatch:
    """The watch that a run's settings ask for, over samples drawn from its own data.

    Raises:
        ValueError: An engine shards the weights; images are no tokens of this model; or none of
            the samples has an image.
    """
    watch = RunWatch(
        dataset,
        vlm,
        (accelerator.process_index, accelerator.num_processes),
        every=config.mir_every,
        samples=config.mir_samples,
        patience=config.mir_patience,
        min_delta=config.mir_min_delta,
        collate=collate,
        batch_size=config.batch_size,
        seed=config.seed,
        bf16=config.bf16,
    )
    if watch.every:
        check_whole(str(accelerator.distributed_type.value))
        watch.check_samples(vlm)
    return watch


def check_whole(engine: str) -> None:
    """Refuse an engine that shards the weights.

    Raises:
        ValueError: `engine` is one.
    """
    if engine.upper().startswith(("FSDP", "DEEPSPEED", "MEGATRON")):
        raise ValueError(
            "the model must be whole on every rank to measure MIR while it trains: ranks run "
            f"different numbers of batches, and sharded weights ({engine}) would wait for each "
            "other; use DDP, or measure checkpoints with fastalign mir"
        )
