"""Which of DeepSpeed's configurations a run can be on, and what the loop makes of one."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastalign.config import TrainConfig

OLDEST = (0, 19)

# What a configuration may say beside the stage; another key might change what a step computes.
_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "bf16",
    "fp16",
}
_ZERO_KEYS = {
    "stage",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "reduce_scatter",
    "contiguous_gradients",
}
_INSTEAD = (
    "launch with --use_fsdp --fsdp_version 2, which with fsdp_reshard_after_forward: true shards "
    "what ZeRO-3 does"
)


def check_installed() -> None:
    """Refuse a DeepSpeed that is missing or too old, before it is started.

    Raises:
        ImportError: It is.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(int(n) for n in found.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"--use_deepspeed needs deepspeed>={OLDEST[0]}.{OLDEST[1]}: got {found}; pip install "
            "deepspeed, or launch with --use_fsdp --fsdp_version 2"
        )


def check_stage(stage: Any) -> None:
    """Refuse a stage that a run cannot be on.

    Raises:
        ValueError: `stage` is not 2.
    """
    if str(stage) == "2":
        return
    why = ""
    if str(stage) == "3":
        why = (
            ", which gathers weights in the calls of single modules, while the loss reads rows of "
            "the head outside its forward, and ranks without an image call other modules"
        )
    raise ValueError(f"the stage of DeepSpeed's ZeRO must be 2: got {stage}{why}; {_INSTEAD}")


def on_cpus(accelerator: Any) -> None:
    """accelerate has DeepSpeed on accelerators only; it runs on CPUs, where a launch is tried."""
    from accelerate.state import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType

    if accelerator.distributed_type is not DistributedType.MULTI_CPU:
        return
    state, plugin = accelerator.state, DeepSpeedPlugin()
    state.distributed_type = DistributedType.DEEPSPEED
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    state.deepspeed_plugins = {"default": plugin}
    plugin.set_mixed_precision("no")
    plugin.select(_from_accelerator_state=True)


def configure(plugin: Any, config: TrainConfig) -> None:
    """Check a DeepSpeed configuration, and let the loop do what it does on other engines.

    Raises:
        ValueError: It asks for what a run cannot do, or contradicts the settings.
    """
    given = plugin.deepspeed_config
    zero = given["zero_optimization"]
    check_stage(zero.get("stage"))
    unknown = sorted(given.keys() - _KEYS) + sorted(
        f"zero_optimization.{key}"
        for key in zero.keys() - _ZERO_KEYS
        if not key.startswith("stage3_")
    )
    if unknown:
        raise ValueError(
            f"the configuration of DeepSpeed must be of {sorted(_KEYS)} and, of ZeRO, "
            f"{sorted(_ZERO_KEYS)}: got {unknown}; leave them out, or {_INSTEAD}"
        )
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device", "none") not in ("none", None):
            raise ValueError(
                f"{key} must be left out: gradients are measured and divided on the device; "
                f"{_INSTEAD}"
            )
    for key in ("bf16", "fp16"):
        if (given.get(key) or {}).get("enabled") not in (None, False):
            raise ValueError(
                f"{key} of DeepSpeed must not be enabled, as it casts weights and adapters: set "
                "bf16: true in the settings, which computes in bfloat16"
            )
    same = {
        "gradient_clipping": (config.max_grad_norm,),
        "gradient_accumulation_steps": (config.gradient_accumulation_steps, 1),
        "train_micro_batch_size_per_gpu": (config.batch_size,),
    }
    for key, values in same.items():
        if given.get(key, "auto") not in ("auto", None, *values):
            raise ValueError(
                f"{key} of DeepSpeed must be that of the settings, or left out: got {given[key]} "
                f"and {values[0]}"
            )
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # accelerate would ask the loss for its width; DeepSpeed has defaults
    # The loop clips and accumulates.
    given |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


def check_dtypes(parameters: Sequence[Tensor]) -> None:
    """Refuse what DeepSpeed would round, since it keeps its masters in float32.

    Raises:
        ValueError: A trained weight is not float32.
    """
    found = sorted({str(p.dtype) for p in parameters} - {"torch.float32"})
    if found:
        raise ValueError(
            f"trained weights must be float32 with DeepSpeed, which keeps them so: got {found}; "
            "load the model in float32, or use DDP or FSDP2"
        )
