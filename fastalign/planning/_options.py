"""What a plan is asked for."""

from dataclasses import dataclass, field

from fastalign.adapters import AdapterConfig
from fastalign.config import OBJECTIVES, TRAINABLE
from fastalign.objectives import DeepAlignConfig
from fastalign.ops._check import check_one_of
from fastalign.planning._devices import DEVICES

ENGINES = ("ddp", "fsdp2")
ATTENTION = ("flash", "eager")
DTYPES = ("bfloat16", "float32")
_COUNTS = ("tiles", "text_tokens", "batch_size", "accumulation", "gpus", "samples")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A run to be planned.

    Attributes:
        objective: "sft", "cal" or "deepalign".
        trainable: "adapters" freezes the base; "all" trains every parameter.
        adapter: What is inserted; None for `AdapterConfig.paper`. Unused where everything is
            trained by "sft" or "cal".
        deepalign: Its layers and terms.
        teacher: One of `TEACHERS`, or the folder of a vision transformer's config.json; for the
            distillation of "deepalign" only.
        teacher_image_size: Side of the teacher's images in pixels; its own when None.
        teacher_cached: Its features lie on disk already, so that it does not run.
        image_size: Height and width in pixels of a picture of a tower that takes any size; 448 x
            448 when None. Other towers have their own.
        tiles: Pictures that the tower sees of a sample: the tiles of InternVL, its thumbnail too.
        image_tokens: Of a sample in the decoder; by its family when None.
        text_tokens, label_tokens, prefix_tokens: Of a sample: all of its text, the labels at its
            end, and the text before its image.
        batch_size: Samples per GPU and micro-batch.
        accumulation: Micro-batches per step.
        checkpointing: Layers run again in the backward pass, in place of keeping what is inside.
        dtype: In which products are computed; "bfloat16" is autocast, as `TrainConfig.bf16`.
        attention: "flash" skips the upper half of causal scores and computes the scores once more
            in the backward pass; "eager" computes and keeps all of them.
        engine: "ddp", each GPU with all weights; "fsdp2", all of them sharded.
        gpus: How many.
        gpu: One of `DEVICES`.
        utilisation: Share of the peak at which the counted FLOPs are computed, an assumption.
        interconnect: GB/s in one direction between GPUs; that of the data sheet when None.
        headroom: Share of the memory left to the context, to workspaces and to fragmentation.
        samples: Of the data set.
    """

    objective: str = "deepalign"
    trainable: str = "adapters"
    adapter: AdapterConfig | None = None
    deepalign: DeepAlignConfig = field(default_factory=DeepAlignConfig)
    teacher: str = "dinov2-large"
    teacher_image_size: int | None = None
    teacher_cached: bool = False
    image_size: tuple[int, int] | None = None
    tiles: int = 1
    image_tokens: int | None = None
    text_tokens: int = 170
    label_tokens: int = 104
    prefix_tokens: int = 35
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    dtype: str = "bfloat16"
    attention: str = "flash"
    engine: str = "ddp"
    gpus: int = 1
    gpu: str = "h100"
    utilisation: float = 0.4
    interconnect: float | None = None
    headroom: float = 0.1
    samples: int = 1_000_000

    def __post_init__(self) -> None:
        check_one_of("objective", self.objective, OBJECTIVES)
        check_one_of("trainable", self.trainable, TRAINABLE)
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("attention", self.attention, ATTENTION)
        check_one_of("engine", self.engine, ENGINES)
        check_one_of("gpu", self.gpu, tuple(DEVICES))
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: got {getattr(self, name)}")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation must lie in (0, 1]: got {self.utilisation}")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom must lie in [0, 1): got {self.headroom}")
        if self.interconnect is not None and not self.interconnect > 0:
            raise ValueError(f"interconnect must be above 0 GB/s: got {self.interconnect}")
        if self.image_tokens is not None and self.image_tokens < 0:
            raise ValueError(f"image_tokens must be at least 0: got {self.image_tokens}")
        for name in ("label_tokens", "prefix_tokens"):
            if not 0 <= getattr(self, name) <= self.text_tokens:
                raise ValueError(
                    f"{name} must lie in 0..text_tokens = {self.text_tokens}: got "
                    f"{getattr(self, name)}"
                )
        if self.label_tokens + self.prefix_tokens > self.text_tokens:
            raise ValueError(
                "label_tokens and prefix_tokens must together be at most text_tokens = "
                f"{self.text_tokens}: got {self.label_tokens} and {self.prefix_tokens}"
            )

    @property
    def needs_adapter(self) -> bool:
        """As `TrainConfig.needs_adapter`."""
        return self.trainable == "adapters" or self.objective == "deepalign"

    @property
    def distils(self) -> bool:
        """Whether a teacher supervises."""
        return self.objective == "deepalign" and self.deepalign.weight("visual") != 0

    @property
    def intervenes(self) -> bool:
        """Whether the base model runs a second time."""
        return self.objective == "deepalign" and self.deepalign.intervenes

    @property
    def collects_pairs(self) -> bool:
        """Whether a first pass collects the pairs of a step: see `objectives.mutual_shares`."""
        mutual = self.objective == "deepalign" and self.deepalign.weight("mutual") != 0
        return mutual and self.accumulation > 1
