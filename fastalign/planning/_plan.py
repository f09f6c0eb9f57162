"""A plan: sizes, memory, FLOPs, and the time that the slowest of three resources takes."""

from dataclasses import dataclass, replace
from typing import Any

from fastalign.adapters import AdapterConfig, adapter_parameters
from fastalign.planning._devices import DEVICES
from fastalign.planning._flops import Gradient, count, deepest, find_gradient
from fastalign.planning._memory import (
    features,
    item,
    logits,
    memory,
    trained,
    weight_item,
)
from fastalign.planning._options import PlanConfig
from fastalign.planning._sizes import Sizes, measure
from fastalign.planning._teacher import TeacherSizes, measure_teacher

_HOUR = 3600.0
# Bytes of a parameter's step: weight, gradient and moments are read, all but the gradient written.
_UPDATE = 28


@dataclass(frozen=True)
class Plan:
    """What a run takes, as far as it can be known beforehand.

    Attributes:
        options: What was asked for, with the adapter chosen.
        family: Of the model.
        tokens: Of a sample: "image", "text", "label" and, of the tower, "vision".
        parameters: By part: "tower", "projector", "decoder", "head", "adapter", "teacher".
        trained: Parameters that are updated.
        flops: Of a sample, by phase.
        memory: Bytes of a GPU, by kind.
        capacity: Bytes that they may take: the data sheet's less the headroom.
        largest_batch: Samples per GPU and micro-batch that fit; 0 for none.
        unfused_logits: Bytes that logits would take without `linear_cross_entropy`.
        cache_bytes: Of the teacher's features of the data set on disk.
        seconds: Of a step, by resource: "compute", "memory", "interconnect".
        peak: FLOP/s of all GPUs by their data sheets.
    """

    options: PlanConfig
    family: str
    tokens: dict[str, int]
    parameters: dict[str, int]
    trained: int
    flops: dict[str, float]
    memory: dict[str, int]
    capacity: int
    largest_batch: int
    unfused_logits: int
    cache_bytes: int
    seconds: dict[str, float]
    peak: float

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return sum(self.memory.values()) <= self.capacity

    @property
    def flops_per_sample(self) -> float:
        return sum(self.flops.values())

    @property
    def bound_by(self) -> str:
        """The resource that takes longest: the others are hidden behind it."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        return max(self.seconds.values())

    @property
    def samples_per_second(self) -> float:
        options = self.options
        return options.batch_size * options.accumulation * options.gpus / self.step_seconds

    @property
    def hours(self) -> float:
        """For the data set."""
        return self.options.samples / self.samples_per_second / _HOUR

    def utilisation_for(self, hours: float) -> float:
        """The utilisation at which computing alone takes so long; above 1 it cannot be done.

        Raises:
            ValueError: `hours` is not above 0.
        """
        if not hours > 0:
            raise ValueError(f"hours must be above 0: got {hours}")
        return self.flops_per_sample * self.options.samples / (self.peak * hours * _HOUR)


def make_plan(config: Any, options: PlanConfig | None = None) -> Plan:
    """Plan a run. No weight is read or made, and nothing is measured.

    Args:
        config: Of an image-text-to-text model of transformers.
        options: The run; `PlanConfig()` when None.

    Raises:
        FileNotFoundError: There is no such teacher.
        TypeError: The model, or its vision tower, cannot be planned.
        ValueError: Options do not fit the model.
    """
    options = options or PlanConfig()
    sizes = measure(config, options)
    adapter, extra = None, 0
    if options.needs_adapter:
        adapter = options.adapter or AdapterConfig.paper(config)
        extra = adapter_parameters(adapter, config)["total"]
        options = replace(options, adapter=adapter)
    _check(sizes, options)
    teacher = None
    if options.distils:
        teacher = measure_teacher(options.teacher, options.teacher_image_size)
    gradient = find_gradient(sizes, adapter, config, options.trainable == "all")
    flops = count(sizes, gradient, options, teacher)
    device = DEVICES[options.gpu]
    capacity = int(device.memory * 1e9 * (1 - options.headroom))
    parameters = {**sizes.parameters, "adapter": extra}
    if teacher is not None:
        parameters["teacher"] = teacher.parameters
    return Plan(
        options=options,
        family=sizes.family,
        tokens={
            "image": sizes.picture.image_tokens,
            "text": options.text_tokens,
            "label": options.label_tokens,
            "vision": sizes.picture.views * sizes.picture.tokens,
        },
        parameters=parameters,
        trained=trained(sizes, extra, options),
        flops=flops,
        memory=memory(sizes, gradient, options, teacher, extra),
        capacity=capacity,
        largest_batch=_largest(sizes, gradient, options, teacher, extra, capacity),
        unfused_logits=logits(sizes, options, fused=False),
        cache_bytes=0 if teacher is None else options.samples * features(sizes, teacher),
        seconds=_seconds(sizes, options, sum(flops.values()), extra),
        peak=options.gpus * device.tflops * 1e12,
    )


def _check(sizes: Sizes, options: PlanConfig) -> None:
    if options.objective != "deepalign":
        return
    for name in ("layers", "student_layers"):
        for k in getattr(options.deepalign, name):
            if not 1 <= k <= sizes.decoder.layers:
                raise ValueError(f"deepalign.{name} must lie in 1..{sizes.decoder.layers}: got {k}")


def _largest(
    sizes: Sizes,
    gradient: Gradient,
    options: PlanConfig,
    teacher: TeacherSizes | None,
    adapter: int,
    capacity: int,
) -> int:
    """The largest batch that fits, by bisection: memory grows with it."""

    def fits(batch: int) -> bool:
        asked = replace(options, batch_size=batch)
        return sum(memory(sizes, gradient, asked, teacher, adapter).values()) <= capacity

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _seconds(sizes: Sizes, options: PlanConfig, flops: float, adapter: int) -> dict[str, float]:
    """Of a step, by resource."""
    device, ranks = DEVICES[options.gpu], options.gpus
    base, updated = sum(sizes.parameters.values()), trained(sizes, adapter, options)
    passes = _passes(sizes, options)
    share = 1 / ranks if options.engine == "fsdp2" else 1.0
    micro = options.accumulation
    traffic = micro * passes * base * item(options) + share * updated * _UPDATE
    rate = (options.interconnect or device.interconnect) * 1e9
    if options.engine == "fsdp2":
        gathered = base * min(item(options), weight_item(options)) + adapter * item(options)
        moved = micro * (passes * gathered + 4.0 * updated) * (ranks - 1) / ranks
    else:
        moved = 2 * 4.0 * updated * (ranks - 1) / ranks
    compute = micro * options.batch_size * flops / (device.tflops * 1e12 * options.utilisation)
    return {
        "compute": compute,
        "memory": traffic / (device.bandwidth * 1e9),
        "interconnect": moved / rate,
    }


def _passes(sizes: Sizes, options: PlanConfig) -> float:
    """How often a micro-batch reads the weights: forward, backward, and what comes beside them."""
    passes = 2.0 + options.checkpointing
    if options.objective == "cal" and options.engine == "ddp":  # sharded, it shares the gathering
        passes += 1
    if options.intervenes:
        # A pass over sharded weights cannot end early.
        early = deepest(sizes, options) / sizes.decoder.layers
        runs = 1 + options.collects_pairs
        passes += runs * (1 if options.engine == "fsdp2" else early)
    return passes
