"""What accelerate's engines wrap and prepare, and which of them a run can be on.

An engine attaches to the call of one module: DDP reads its output to find the parameters in use,
FSDP2 gathers weights before it and hooks the backward to what leaves it. So the whole loss is the
forward of one module, `Step`.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastalign import objectives
from fastalign._run import zero_launch
from fastalign._run.failures import process_group
from fastalign.adapters import NAME
from fastalign.config import TrainConfig
from fastalign.models import VLM, Batch, is_sharded, layer_stack
from fastalign.objectives import DeepAlignState, Terms
from fastalign.objectives._terms import Totals

T = TypeVar("T")

# Kinds of ranks, as accelerate names them, that hold whole copies of a model.
_COPIES = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


class Step(nn.Module):
    """One objective as a module, so that an engine wraps the whole computation of the loss.

    What the objective carries from step to step is no part of it: it is not trained, every rank has
    its own, and an engine would shard it.
    """

    def __init__(self, vlm: VLM, state: DeepAlignState | None, config: TrainConfig) -> None:
        super().__init__()
        self.model = vlm.model
        self._vlm, self._bf16 = [vlm], config.bf16
        # What accelerate's policy of wrapping layers goes by.
        layers = [*vlm.layers, *layer_stack(vlm.vision_tower)]
        self._no_split_modules = sorted({type(layer).__name__ for layer in layers})
        if state is not None:
            self.objective: Callable[..., Terms] = functools.partial(
                objectives.deepalign, state=state
            )
        elif config.objective == "cal":
            self.objective = functools.partial(objectives.cal, **asdict(config.cal))
        else:
            self.objective = objectives.sft
        self._graph: Callable[..., Terms] | None = None
        self._backend = (config.torch_compile_backend or "inductor") if config.torch_compile else ""
        self._open = contextlib.ExitStack()
        if config.gradient_checkpointing:
            set_checkpointing(vlm.model, True)
            self._open.callback(set_checkpointing, vlm.model, False)

    def tie_weights(self) -> None:
        """For accelerate, which unties them where it moves a model to the meta device."""
        self.model.tie_weights()

    def forward(
        self,
        batch: Batch,
        function: Callable[[Batch], Any] | None = None,
        *,
        totals: Totals | None = None,
        **more: Any,
    ) -> Any:
        """The objective's terms; or `function(batch)`, with the weights that an engine gathers.

        Args:
            batch: A micro-batch.
            function: Without gradient. Instead of the objective.
            totals: Of the step.
            more: For the objective.
        """
        if function is not None:
            with self._autocast():
                return function(batch)
        run = self._compiled if self._backend else self._terms
        terms = run(batch, totals=totals, **more)
        if is_sharded(self):
            terms["loss"] = terms["loss"] + self._of_adapter(terms["loss"])
        return terms

    def _terms(self, batch: Batch, **more: Any) -> Terms:
        with self._autocast():
            return self.objective(self._vlm[0], batch, **more)

    def _autocast(self) -> Any:
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16) if self._bf16 else contextlib.nullcontext()

    def _of_adapter(self, like: Tensor) -> Tensor:
        """A zero that gives every parameter of a sharded model's adapter a gradient of zeros.

        Ranks add up the gradients of a group in one message, which must have the same parts on
        each. Of the base all parts run on every rank, but a batch without images leaves out what an
        adapter does to its tokens.
        """
        adapter = getattr(self.model, NAME, None)
        trained = () if adapter is None else [p for p in adapter.parameters() if p.requires_grad]
        return sum((p.flatten()[:0].sum().to(like.dtype) for p in trained), torch.zeros_like(like))

    def _compiled(self, batch: Batch, **inputs: Any) -> Terms:
        """The terms by one whole graph; from the first one that cannot be, as without compiling."""
        import torch._dynamo
        from torch._dynamo.exc import TorchDynamoException

        if self._graph is None:
            self._open.enter_context(self._vlm[0].compilable(batch))
            self._graph = torch.compile(self._terms, fullgraph=True, backend=self._backend)
        # What the models' own forwards need to be one graph.
        flags: dict[str, Any] = dict.fromkeys(
            ("capture_scalar_outputs", "capture_dynamic_output_shape_ops"), True
        )
        try:
            with torch._dynamo.config.patch(**flags):
                terms: Terms = self._graph(batch, **inputs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0][:200]
            warnings.warn(
                f"torch_compile: {type(self.model).__name__} runs without it from here on, as its "
                f"step is no whole graph ({type(error).__name__}: {reason})",
                stacklevel=4,
            )
            self._backend = ""
            return self._terms(batch, **inputs)
        return terms

    def close(self) -> None:
        """Take away what compiling and checkpointing have put on the model."""
        self._open.close()


@torch.no_grad()
def run_whole(step: nn.Module, function: Callable[[], T]) -> T:
    """`function()`, which runs the model but trains nothing of it, on any engine.

    Weights that FSDP2 gathers at the outermost call are there inside, and sharded again afterwards.
    Every rank must call.
    """
    result: T = step({}, lambda _: function())
    if is_sharded(step):
        step.reshard()  # type: ignore[operator]
    return result


def make_accelerator(config: TrainConfig) -> Any:
    """accelerate's engine as the launcher asked for it.

    Raises:
        ValueError: A run cannot be on this engine, or the launcher's settings contradict the run's.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import parse_choice_from_env, parse_flag_from_env

    deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if deepspeed:
        if parse_choice_from_env("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
            zero_launch.check_stage(parse_choice_from_env("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        zero_launch.check_installed()
    precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no" and (precision != "bf16" or not config.bf16):
        raise ValueError(
            f"mixed_precision of the launcher must agree with the settings: got {precision} with "
            f"bf16={config.bf16}; set bf16: true for bfloat16, the only one there is, or launch "
            "with --mixed_precision no"
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else ranks on CPUs do not find each other
        mixed_precision="no",  # autocast is the step's own: weights are gathered as they are kept
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            process_group(config),
        ],
    )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _shard_on_cpus(accelerator)
    if deepspeed:
        zero_launch.on_cpus(accelerator)
    _check(accelerator, config)
    accelerator.gradient_accumulation_steps = 1  # the loop's shares are those of the whole step
    return accelerator


def _shard_on_cpus(accelerator: Any) -> None:
    """accelerate shards on accelerators only; torch does on CPUs too, where a launch is tried."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type is DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _check(accelerator: Any, config: TrainConfig) -> None:
    kind = accelerator.distributed_type.name
    if kind not in ("FSDP", "DEEPSPEED", *_COPIES):
        raise ValueError(f"the engine must be DDP, FSDP2 or DeepSpeed's ZeRO-2: got {kind}")
    check_parallelism(accelerator)
    if accelerator.state.dynamo_plugin.backend.name != "NO":
        raise ValueError(
            "dynamo_backend of the launcher must be no: the step knows what of it can be compiled; "
            "set torch_compile: true"
        )
    steps = accelerator.gradient_accumulation_steps
    if steps not in (1, config.gradient_accumulation_steps):
        raise ValueError(
            "gradient_accumulation_steps of the launcher must be that of the settings, or left "
            f"out: got {steps} and {config.gradient_accumulation_steps}"
        )
    if kind == "FSDP":
        _check_sharding(accelerator.state.fsdp_plugin, config)
    if kind == "DEEPSPEED":
        zero_launch.configure(accelerator.state.deepspeed_plugin, config)


def check_parallelism(accelerator: Any) -> None:
    """Refuse what divides a model otherwise than by sharding its weights.

    Raises:
        ValueError: `accelerator` has a parallelism_config.
    """
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise ValueError(
            "parallelism_config must be None: DDP and FSDP2 are supported; tensor, context and "
            "sequence parallelism are not"
        )


def _check_sharding(plugin: Any, config: TrainConfig) -> None:
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version must be 2: got {plugin.fsdp_version}, which flattens frozen and trained "
            "weights into one; launch with --fsdp_version 2"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing must be false, as its wrappers rename the layers: set "
            "gradient_checkpointing: true"
        )
    if policy is not transformer_auto_wrap_policy:
        raise ValueError(
            "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP: the layers are what the loss "
            f"can gather one by one; got {policy}"
        )
    # accelerate makes a policy of the flag, and torch has a base class for "do not".
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "fsdp_offload_params must be false: gradients are measured and divided on the device"
        )
    if plugin.ignored_modules:
        raise ValueError(
            f"fsdp_ignored_modules must be left out: got {plugin.ignored_modules!r}, whose "
            "gradients no rank would add up"
        )
    if config.torch_compile:
        raise ValueError(
            "torch_compile must be False with FSDP2, whose hooks break every graph: use DDP, or "
            "leave it out"
        )
    if config.gradient_checkpointing and _layers_run_hooks_again():
        import transformers

        raise ValueError(
            "gradient_checkpointing with FSDP2 needs transformers >= 5.23: the layers of "
            f"{transformers.__version__} run FSDP2's hooks again in the backward; use DDP"
        )


def _layers_run_hooks_again() -> bool:
    """Whether a layer that runs again runs from its call on, and not from its forward."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def set_checkpointing(model: Any, enable: bool) -> None:
    """Let the layers that need gradients run again in the backward instead of keeping activations.

    Each layer's switch alone: with `gradient_checkpointing_enable` a frozen model's embeddings may
    be made to require a gradient, so that every layer would keep, and run again.

    Raises:
        ValueError: The model has no such switches.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing needs a model with layers that can run again: "
            f"{type(model).__name__} has none of transformers' GradientCheckpointingLayer"
        )
    again = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    for layer in layers:
        layer.gradient_checkpointing = enable
        layer._gradient_checkpointing_func = again  # type: ignore[assignment]
