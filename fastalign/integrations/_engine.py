"""What the trainers share: options, refusals, calls that an engine sees, and checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastalign import objectives
from fastalign._run.engines import check_parallelism
from fastalign.config import OBJECTIVES, CALConfig
from fastalign.models import forward_of
from fastalign.objectives import DeepAlignState, Terms

# These optimizers step inside the backward, before the summed weights of the step are known.
_EARLY_OPTIMIZERS = ("lomo", "layerwise")


def call_inside(
    wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any
) -> Any:
    """`function(*args)` in place of one forward of `module`, called through its `wrapper`.

    Engines attach to the outermost call: DistributedDataParallel reads its output to find the
    parameters in use, FSDP2 gathers before it and hooks the backward to what leaves it. A loss made
    of submodules alone would pass them by. The forward of `module` is itself again as soon as
    `function` runs.

    Args:
        wrapper: What the engine made of `module`; `module` itself where it wrapped nothing.
        module: Whose forward is replaced, in its instance only, for one call.
        function: Takes the arguments as the engine hands them on.
        args: For `wrapper`.

    Returns:
        What `wrapper(*args)` returns.
    """
    # Mixed precision of accelerate, and TRL, put a forward of their own into the instance.
    own = vars(module).get("forward")

    def restore() -> None:
        if own is not None:
            module.forward = own
        else:
            vars(module).pop("forward", None)

    def forward(*given: Any) -> Any:
        restore()
        with forward_of(module):
            return function(*given)

    module.forward = forward
    try:
        return wrapper(*args)
    finally:
        restore()


def make_objective(
    name: str,
    options: CALConfig | Mapping[str, Any] | None,
    state: DeepAlignState | None,
) -> Callable[..., Terms]:
    """(vlm, batch, totals=) -> terms, of a name and its options.

    Raises:
        ValueError: The name or an option is unknown, or `state` is missing or not for this one.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective must be one of {OBJECTIVES}: got {name!r}")
    if (state is not None) != (name == "deepalign"):
        raise ValueError(
            'state must be a DeepAlignState with objective="deepalign" and None with any other: '
            f"got {type(state).__name__} with {name!r}"
        )
    if name == "cal":
        if not isinstance(options, CALConfig):
            known = [field.name for field in fields(CALConfig)]
            unknown = sorted(set(options or ()) - set(known))
            if unknown:
                raise ValueError(f"objective_options must be of {known}: got {unknown}")
            options = CALConfig(**(options or {}))
        return partial(objectives.cal, **asdict(options))
    if options:
        raise ValueError(
            f"objective_options must be None with objective={name!r}, which has none (DeepAlign's "
            f"are its state's config): got {options!r}"
        )
    return objectives.sft if state is None else partial(objectives.deepalign, state=state)


def check_settings(trainer: Any, late: bool) -> None:
    """Refuse arguments that contradict an objective; `late` says that it divides gradients.

    Raises:
        ValueError: Names the argument.
    """
    args = trainer.args
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor must be 0, since the objective makes the loss: got "
            f"{args.label_smoothing_factor}"
        )
    if callable(trainer.compute_loss_func) or trainer.compute_metrics is not None:
        raise ValueError(
            "compute_loss_func and compute_metrics must be None, since they need the full logits, "
            "which are never formed: choose an objective for the loss, and read eval_ce and "
            "eval_accuracy or evaluate with a plain Trainer"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile must be False: the objective reads inner layers with hooks; compile "
            "layers of the model yourself"
        )
    if late and any(word in str(args.optim).lower() for word in _EARLY_OPTIMIZERS):
        raise ValueError(
            'optim must not step inside the backward with normalize="mean", which divides the '
            f'gradients at the end of the step: got {args.optim}; use normalize="tokens"'
        )


def check_engine(trainer: Any, late: bool, adapted: bool) -> None:
    """Refuse engines that an objective, or an attached adapter, cannot run on.

    Raises:
        ValueError: Names the engine and what to use instead.
    """
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "the Trainer must have one process a GPU, not nn.DataParallel: start it with torchrun "
            f"or accelerate launch; got {trainer.args.n_gpu} GPUs in one process"
        )
    check_parallelism(trainer.accelerator)
    if trainer.is_deepspeed_enabled:
        if late:
            raise ValueError(
                'normalize must not be "mean" with DeepSpeed, which keeps the gradients that are '
                'divided at the end of a step to itself: use "tokens" or "sample", or FSDP2'
            )
        if adapted or trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed must have a ZeRO stage below 3 and no adapter of fastalign: the loss "
                "reads the rows of the head outside the head's forward; use DDP or FSDP2"
            )
    if trainer.is_fsdp_enabled and adapted:
        raise ValueError("adapters of fastalign cannot be sharded: use DDP instead of FSDP")


def load_weights(model: Any, folder: Path) -> None:
    """Load what `save_pretrained` wrote to `folder` into `model`, every tensor.

    The Trainer reads checkpoints by the names of the modules. Files of vision-language models keep
    the names of older versions, so that it would load none of them, with a warning.

    Raises:
        ValueError: The checkpoint lacks tensors of the model.
    """
    dtypes = (p.dtype for p in model.parameters())
    loaded, info = type(model).from_pretrained(
        folder,
        dtype=reduce(torch.promote_types, dtypes),
        local_files_only=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{folder} must hold every tensor of the model: it lacks {missing}")
    model.load_state_dict(loaded.state_dict(), strict=False)  # an adapter has its own file
