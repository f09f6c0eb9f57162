"""Settings of a training run, and what follows from them alone: learning rate and data order."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from fastalign.adapters import AdapterConfig
from fastalign.objectives import DeepAlignConfig

OBJECTIVES = ("sft", "cal", "deepalign")
TRAINABLE = ("adapters", "all")
# Settings that a resumed run may change: none of them alters what a step computes.
_FREE = {"output_dir", "log_every", "save_every", "keep_checkpoints", "num_workers", "report_to"}
_FREE |= {"progress", "resume", "teacher_cache", "gradient_checkpointing"}
_FREE |= {"on_nonfinite", "ddp_timeout"}  # they alter steps that the others would not have taken
_FREE |= {"mir_every", "mir_samples", "mir_patience", "mir_min_delta"}


@dataclass(frozen=True)
class CALConfig:
    """Options of `objectives.cal` and of `VLM.contrast`, by the same names."""

    clamp: tuple[float, float] = (1.0, 5.0)
    window: int = 3
    mode: str = "drop"
    ratio: float = 0.7
    sigma: float = 10.0
    packed: bool = True
    backend: str = "auto"
    normalize: str = "mean"
    compat: str = "paper"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults are DeepAlign's published ones where it names them.

    Attributes:
        model: Folder or hub name of an image-text-to-text model, unless `train` is given one.
        data: What `fastalign.data.open_data` reads: JSON or JSONL of LLaVA-style records, tar
            shards, parquet, a folder of `datasets`; unless `train` is given a dataset.
        image_root: Where relative image paths start; the folder of `data` when None.
        output_dir: For checkpoints, `metrics.jsonl` and the result.
        objective: "sft", "cal" or "deepalign".
        trainable: "adapters" freezes the base; "all" trains every parameter.
        adapter, cal, deepalign: See `AdapterConfig`, `CALConfig` and `DeepAlignConfig`. No adapter
            is attached when everything is trained by "sft" or "cal".
        train_vision_from: With "adapters": the first layer of the vision tower, from 1, that is
            trained too, with all above it as far as the language model reads them. ShareGPT4V's
            upper half is `fastalign.adapters.upper_half(model)`, 13 of 24. None for none.
        teacher: Folder or hub name of DINOv2 or DINOv3, for "deepalign" without `teacher` features.
        teacher_image_size: Side of the teacher's images in pixels; its own when None.
        teacher_cache: Folder for the teacher's features, so that each image meets it once.
        max_steps: Optimizer steps.
        batch_size: Samples per rank and micro-batch.
        gradient_accumulation_steps: Micro-batches per step.
        learning_rate: Peak; linear warm-up over `warmup_ratio` of the steps, then cosine to 0.
        weight_decay: Of matrices and kernels; vectors have none.
        max_grad_norm: Gradients are scaled down to this norm; 0 for never.
        max_length: Longest sequence in tokens; None for no limit.
        on_overflow: What becomes of a longer one: "raise" makes it a bad sample, "truncate" cuts
            its end, never an image token.
        on_bad_sample: "raise", or "skip" to have another take the place of a sample that cannot be
            used, and count it.
        on_nonfinite: Of a step in which a tensor is NaN or infinite: "raise" ends the run and names
            the tensor, "skip" changes nothing by it, and counts it; 10 in a row end the run.
        streaming: Read `data` from front to back, as `fastalign.data.open_stream` does, instead of
            by index.
        shuffle_buffer: Rows of a stream that are held and shuffled at a time.
        pack_text: Samples of a micro-batch without an image share rows (see `Collator`); with a
            collate function of your own, only check that the model can keep them apart.
        group_by_length: Divide the samples of a step among its micro-batches and ranks by images
            and length of text, so that less is padded. The step keeps its samples.
        bf16: Automatic mixed precision in bfloat16.
        gradient_checkpointing: Layers that need gradients run again in the backward instead of
            keeping their activations: less memory, more time, the same numbers.
        torch_compile: Compile the step, on one process or DDP; see `VLM.compilable`.
        torch_compile_backend: "inductor" when None.
        seed: Of data order, initialisation and dropout.
        log_every: Steps between lines of `metrics.jsonl`.
        save_every: Steps between checkpoints; 0 for none.
        keep_checkpoints: How many of the newest stay.
        resume: Continue from the newest checkpoint in `output_dir`, if there is one.
        mir_every: Steps between measurements of MIR, logged as "mir"; 0 for none.
        mir_samples: How many samples to measure it on, drawn from the data; always the same.
        mir_patience: Measurements in a row without a new minimum after which training ends; None
            to go on.
        mir_min_delta: How far below the old one a new minimum must lie, in MIR.
        num_workers: Processes that load data.
        ddp_timeout: Seconds after which a rank that does not answer is given up, as transformers
            names it.
        report_to: Trackers of accelerate: "tensorboard", "trackio", "wandb", ...
        progress: Show a progress bar.
    """

    model: str = ""
    data: str = ""
    image_root: str | None = None
    output_dir: str = "runs/fastalign"
    objective: str = "deepalign"
    trainable: str = "adapters"
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    cal: CALConfig = field(default_factory=CALConfig)
    deepalign: DeepAlignConfig = field(default_factory=DeepAlignConfig)
    train_vision_from: int | None = None
    teacher: str | None = None
    teacher_image_size: int | None = None
    teacher_cache: str | None = None
    max_steps: int = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-5
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_ratio: float = 0.03
    max_grad_norm: float = 1.0
    max_length: int | None = None
    on_overflow: Literal["raise", "truncate"] = "raise"
    on_bad_sample: Literal["raise", "skip"] = "raise"
    on_nonfinite: Literal["raise", "skip"] = "raise"
    streaming: bool = False
    shuffle_buffer: int = 1000
    pack_text: bool = False
    group_by_length: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    torch_compile_backend: str | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = True
    mir_every: int = 0
    mir_samples: int = 100
    mir_patience: int | None = None
    mir_min_delta: float = 0.0
    num_workers: int = 0
    ddp_timeout: float = 1800.0
    report_to: tuple[str, ...] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        choices = (
            ("objective", OBJECTIVES),
            ("trainable", TRAINABLE),
            ("on_overflow", ("raise", "truncate")),
            ("on_bad_sample", ("raise", "skip")),
            ("on_nonfinite", ("raise", "skip")),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}: got {getattr(self, name)!r}")
        positive = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_every")
        for name in (*positive, "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if self.train_vision_from is not None and self.trainable != "adapters":
            raise ValueError(
                'train_vision_from goes with trainable="adapters": got trainable='
                f"{self.trainable!r}, which trains the whole tower"
            )
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints must be at least 1: got {self.keep_checkpoints}")
        self._check_mir()
        if self.pack_text and self.objective == "cal" and self.cal.compat == "official":
            raise ValueError(
                'pack_text must be False with cal.compat="official", which pools over rows of one '
                "sample each"
            )
        if self.pack_text and self.torch_compile:
            raise ValueError(
                "pack_text must be False with torch_compile: rows differ in number at every step"
            )
        if not self.ddp_timeout > 0:
            raise ValueError(f"ddp_timeout must be positive, in seconds: got {self.ddp_timeout}")
        if self.torch_compile and self.objective == "cal":
            raise ValueError(
                'torch_compile goes with objective "sft" or "deepalign": the image-free forward of '
                '"cal" packs texts by lengths that it reads to the host, which no graph can hold'
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio must lie in 0..1: got {self.warmup_ratio}")

    def _check_mir(self) -> None:
        least = {"mir_every": 0, "mir_samples": 1, "mir_patience": 1, "mir_min_delta": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name} must be at least {bound}: got {value}")
        if self.mir_patience is not None and not self.mir_every:
            raise ValueError("mir_patience needs measurements: set mir_every too, got 0")

    @property
    def trains_base(self) -> bool:
        """Whether weights of the model itself change."""
        return self.trainable == "all" or self.train_vision_from is not None

    @property
    def needs_adapter(self) -> bool:
        return self.trainable == "adapters" or self.objective == "deepalign"


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from one part in `warmup`, then half a cosine to 0."""
    warmup = round(config.warmup_ratio * config.max_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.max_steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class StepSampler:
    """Lists of sample indices, one per micro-batch of this rank, from any step on.

    Every epoch is a permutation drawn from (seed, epoch); a step takes the next
    ranks * accumulation * batch_size samples of the endless sequence, however they are divided.
    With `lengths`, anything that can be compared, those of a step are sorted by it first, so that
    a micro-batch holds samples that are alike and little is padded.
    """

    def __init__(
        self,
        size: int,
        config: TrainConfig,
        rank: int,
        ranks: int,
        start: int,
        lengths: Sequence[Any] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError("the dataset must hold at least one sample: got none")
        if lengths is not None and len(lengths) != size:
            raise ValueError(f"lengths must be those of {size} samples: got {len(lengths)}")
        self.size, self.config, self.rank, self.ranks, self.start = size, config, rank, ranks, start
        self.lengths = lengths

    def state(self, step: int) -> dict[str, Any]:
        """Where the sequence of samples stands after `step` steps, and what it follows from."""
        batch = self.config.batch_size * self.config.gradient_accumulation_steps
        return {
            "seed": self.config.seed,
            "position": step * batch * self.ranks,
            "samples": self.size,
            "world_size": self.ranks,
            "batch_size": self.config.batch_size,
            "gradient_accumulation_steps": self.config.gradient_accumulation_steps,
        }

    def __len__(self) -> int:
        return (self.config.max_steps - self.start) * self.config.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        config, epoch, order = self.config, -1, torch.empty(0)
        per_step = self.ranks * config.gradient_accumulation_steps * config.batch_size
        for step in range(self.start, config.max_steps):
            indices = []
            for position in range(step * per_step, (step + 1) * per_step):
                if position // self.size != epoch:
                    epoch = position // self.size
                    seed = config.seed * 1_000_003 + epoch
                    generator = torch.Generator().manual_seed(seed)
                    order = torch.randperm(self.size, generator=generator)
                indices.append(int(order[position % self.size]))
            if self.lengths is not None:
                indices.sort(key=self.lengths.__getitem__)
            for micro in range(config.gradient_accumulation_steps):
                first = (micro * self.ranks + self.rank) * config.batch_size
                yield indices[first : first + config.batch_size]


def schedule_state(step: int, config: TrainConfig) -> dict[str, Any]:
    """What `learning_rate` goes by, and what it gave in the last of `step` steps."""
    return {
        "step": step,
        "rule": "linear warm-up, then half a cosine to 0",
        "peak": config.learning_rate,
        "warmup_ratio": config.warmup_ratio,
        "max_steps": config.max_steps,
        "last": learning_rate(step - 1, config),
    }


def check_same_run(stored: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """A checkpoint continues only the run that made it."""
    before, now = flat(stored), flat(json.loads(json.dumps(asdict(config))))
    changed = [k for k in now if k.split(".")[0] not in _FREE and now[k] != before.get(k)]
    _refuse(changed, before, now, path)


def check_same_place(stored: dict[str, Any], sampler: StepSampler, path: Path) -> None:
    """The samples and learning rates to come are those that the stored run would have met."""
    start = sampler.start
    places = {"sampler": sampler.state(start), "schedule": schedule_state(start, sampler.config)}
    now, before = flat(places), flat({name: stored[name + ".json"] for name in places})
    changed = [k for k in now if not _same(now[k], before.get(k))]
    _refuse(changed, before, now, path)


def _same(a: Any, b: Any) -> bool:
    """Equal, or floats that two machines' cosines may tell apart."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-30)
    return bool(a == b)


def _refuse(changed: list[str], before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    if changed:
        listed = ", ".join(f"{k}: {before.get(k)} then, {now[k]} now" for k in changed)
        raise ValueError(
            f"{path} is of another run ({listed}): choose another output_dir or resume=False"
        )


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to plain values."""
    pairs: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        else:
            pairs[prefix + key] = value if isinstance(value, int | float | str) else str(value)
    return pairs
