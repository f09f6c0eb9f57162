"""`fastalign plan`: what a training run will take, from a model's config.json alone."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastalign.adapters import AdapterConfig
from fastalign.commands.console import parse, table, write_json
from fastalign.planning import DEVICES, Plan, PlanConfig, make_plan

# DeepAlign's paper: a million samples on two A100; and what is aimed at.
PAPER_HOURS, AIM_HOURS, PAPER_GPUS = 48.0, 18.0, 2
_PAPER_SAMPLES = 1_000_000
_DERIVED = ("fits", "flops_per_sample", "bound_by", "step_seconds", "samples_per_second", "hours")


@dataclass(kw_only=True)
class PlanOptions:
    """Parameters, memory, FLOPs and hours of a training run, before it is started.

    Of the model only config.json is read. Nothing is measured: the utilisation is an assumption.

    Attributes:
        model: Folder of a model.
        adapter: Folder of a saved adapter, of whose settings the plan is; else the published one.
        objective: What is minimised.
        trainable: "adapters" freezes the base; "all" trains every parameter.
        teacher: Name of a published size (dinov2-large, dinov3-vitl16, ...), or a folder with a
            config.json; for "deepalign".
        teacher_image_size: Side of the teacher's images in pixels; its own by default.
        teacher_cached: Its features lie on disk already.
        image_size: Height and width in pixels, for towers that take any size; 448 448 by default.
        tiles: Pictures that the tower sees of a sample: the tiles of InternVL, its thumbnail too.
        image_tokens: Of a sample, in the decoder; by its family where that is known.
        text_tokens: Of a sample: all of its text.
        label_tokens: Of the text, at its end.
        prefix_tokens: Of the text, before the image.
        batch_size: Samples per GPU and micro-batch.
        accumulation: Micro-batches per step.
        checkpointing: Layers run again in the backward pass, in place of keeping what is inside.
        dtype: In which products are computed.
        attention: "flash" neither keeps nor, where causal, computes all scores; "eager" does.
        engine: "ddp", each GPU with all weights; "fsdp2", all of them sharded.
        gpus: How many.
        gpu: Which.
        utilisation: Share of the peak at which the FLOPs are computed, an assumption.
        interconnect: GB/s between GPUs in one direction; the data sheet's by default.
        headroom: Share of the memory left to the context, to workspaces and to fragmentation.
        samples: Of the data set.
        json: Write the plan here.
    """

    model: Path
    adapter: Path | None = None
    objective: Literal["sft", "cal", "deepalign"] = "deepalign"
    trainable: Literal["adapters", "all"] = "adapters"
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
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["flash", "eager"] = "flash"
    engine: Literal["ddp", "fsdp2"] = "ddp"
    gpus: int = 1
    gpu: Literal["a100-40", "a100-80", "h100", "h200", "b200"] = "h100"
    utilisation: float = 0.4
    interconnect: float | None = None
    headroom: float = 0.1
    samples: int = _PAPER_SAMPLES
    json: Path | None = None


def run(argv: list[str]) -> None:
    """The command, of its arguments."""
    options = parse(PlanOptions, argv, "plan")
    if not (options.model / "config.json").is_file():
        raise FileNotFoundError(f"model must be a folder with a config.json: got {options.model}")
    from transformers import AutoConfig

    load: Any = AutoConfig.from_pretrained
    config = load(options.model, local_files_only=True)
    plan = make_plan(config, _asked(options, config))
    show(plan)
    write_json(options.json, report(plan) | {"model": options.model})


def _asked(options: PlanOptions, config: Any) -> PlanConfig:
    named = {f.name for f in dataclasses.fields(PlanConfig)} - {"adapter"}
    values = {name: getattr(options, name) for name in named & set(vars(options))}
    return PlanConfig(**values, adapter=_adapter(options.adapter, config))


def _adapter(saved: Path | None, config: Any) -> AdapterConfig | None:
    if saved is None:
        return None
    from fastalign.adapters._metadata import read_config

    adapter, base = read_config(saved)
    if base.get("model_type") != config.model_type:
        raise ValueError(
            f"{saved} was saved from {base.get('model_type')}, and this is {config.model_type}"
        )
    return adapter


def report(plan: Plan) -> dict[str, Any]:
    """A plan with what follows from it, as data."""
    return dataclasses.asdict(plan) | {
        **{name: getattr(plan, name) for name in _DERIVED},
        "device": DEVICES[plan.options.gpu]._asdict(),
        "utilisation_for": {str(h): plan.utilisation_for(h) for h in (AIM_HOURS, PAPER_HOURS)},
    }


def show(plan: Plan) -> None:
    """Print a plan."""
    options, device = plan.options, DEVICES[plan.options.gpu]
    total = sum(plan.parameters.values()) - plan.parameters.get("teacher", 0)
    parts = [(name, f"{count:,}") for name, count in plan.parameters.items()]
    beside = [("all but the teacher", f"{total:,}"), ("trained", f"{plan.trained:,}")]
    table("Parameters", (plan.family, ""), [*parts, *beside], right=True)
    held = sum(plan.memory.values())
    kinds = [*plan.memory.items(), ("sum", held), ("to be had", plan.capacity)]
    rows = [(kind, f"{size / 1e9:.2f}") for kind, size in kinds]
    table("Memory of a GPU", ("kind", "GB"), rows, right=True)
    whole = plan.flops_per_sample
    phases = [*plan.flops.items(), ("sum", whole)]
    shares = [(name, f"{flops / 1e12:.3f}", f"{flops / whole:.1%}") for name, flops in phases]
    table("A sample", ("phase", "TFLOP", "share"), shares, right=True)
    seconds = [(name, f"{spent:.3f}") for name, spent in plan.seconds.items()]
    table("A step", ("resource", "seconds"), seconds, right=True)
    for line in conclusions(plan):
        print(line)
    print(f"all logits of a batch at once would take {plan.unfused_logits / 1e9:.2f} GB")
    if plan.cache_bytes:
        print(f"the teacher's features on disk: {plan.cache_bytes / 1e12:.2f} TB")
    print(
        f"assumed: utilisation {options.utilisation:.2f} of {device.tflops:,.0f} TFLOP/s a GPU "
        f"({device.name}, data sheet), "
        f"{plan.tokens['image']} image and {plan.tokens['text']} text tokens a sample, "
        f"{plan.tokens['label']} of them labels"
    )


def conclusions(plan: Plan) -> list[str]:
    """What follows, in lines."""
    options = plan.options
    count = options.batch_size * options.accumulation * options.gpus
    fit = "fits" if plan.fits else "does not fit"
    lines = [
        f"{options.batch_size} samples a GPU {fit}; the largest batch that does: "
        f"{plan.largest_batch}",
        f"a step of {count} samples: {plan.step_seconds:.3f} s, bound by {plan.bound_by}; "
        f"{plan.samples_per_second:.1f} samples/s",
        f"{options.samples:,} samples: {plan.hours:.1f} h",
    ]
    needed = plan.utilisation_for(AIM_HOURS)
    beside = max(plan.seconds[name] for name in plan.seconds if name != "compute")
    others = beside / plan.step_seconds * plan.hours
    if others > AIM_HOURS:
        lines.append(f"at most {AIM_HOURS:.0f} h: at no utilisation, bound by {plan.bound_by}")
    elif needed > 1:
        lines.append(f"at most {AIM_HOURS:.0f} h: at no utilisation, as it would be {needed:.2f}")
    else:
        holds = "yes" if plan.hours <= AIM_HOURS else "no"
        lines.append(f"at most {AIM_HOURS:.0f} h: {holds}; from a utilisation of {needed:.2f} on")
    if _is_papers(options):
        lines.append(
            f"the paper's {PAPER_HOURS:.0f} h on two A100: a utilisation of "
            f"{plan.utilisation_for(PAPER_HOURS):.2f} of this plan's FLOPs"
        )
    return lines


def _is_papers(options: PlanConfig) -> bool:
    return (
        options.objective == "deepalign"
        and options.samples == _PAPER_SAMPLES
        and options.gpus == PAPER_GPUS
        and options.gpu.startswith("a100")
    )
