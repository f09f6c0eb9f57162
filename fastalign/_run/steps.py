"""The end of a step: gradients of all ranks, their norm, and the optimizer that takes them."""

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models._side_stream import whole_tensor


class Steps:
    """On one process, DDP and FSDP2: gradients lie in the parameters when the backward is over.

    Args:
        accelerator: Of the run.
        module: What the engine made of the loss.
        optimizer: As the engine prepared it.
        parameters: The trained ones, as the engine left them.

    Attributes:
        module: What a micro-batch is run through.
        optimizer: What a checkpoint is loaded into.
    """

    local = True  # a rank's own gradients can be had, where its weights are not sharded

    def __init__(
        self, accelerator: Any, module: nn.Module, optimizer: Any, parameters: Sequence[Tensor]
    ) -> None:
        self.accelerator, self.module, self.optimizer = accelerator, module, optimizer
        self.parameters = parameters

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around the forward and the backward of a micro-batch; ranks exchange after the last."""
        if last:
            return contextlib.nullcontext()
        quiet: AbstractContextManager[Any] = self.accelerator.no_sync(self.module)
        return quiet

    def backward(self, share: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch's share of the loss; of all ranks after the last."""
        # Gradients are averaged over ranks, and shares are to be added.
        self.accelerator.backward(share * self.accelerator.num_processes)

    def divide(self, whole: Tensor) -> None:
        """Divide the gradients of the step."""
        for gradient in self._gradients():
            gradient.div_(whole)

    def norm(self) -> Tensor:
        """Of all gradients together; every rank must call."""
        return whole_tensor(nn.utils.get_total_norm(self._gradients()))

    def take(self, norm: Tensor, limit: float) -> None:
        """Scale gradients of norm `norm` down to `limit`, 0 for never, and let the optimizer step.

        What is left of the step is for `clear`.
        """
        if limit:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        self.optimizer.step()

    def clear(self) -> None:
        """Forget the gradients, whether a step has been made of them or not."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Of the step, summed over the ranks; every rank must call."""
        return parameter.grad

    def moments(self) -> Any:
        """An optimizer whose state can be written: every rank must call."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters if p.grad is not None]


def steps_of(
    accelerator: Any,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
) -> tuple[Steps, Any]:
    """The steps of a run on the launcher's engine, and its optimizer, whose rates are set.

    Args:
        accelerator: Of the run.
        loss: An `engines.Step`.
        optimizer: Of the trained parameters.
        parameters: These, before an engine has seen them.
    """
    if accelerator.distributed_type.name == "DEEPSPEED":
        from fastalign._run.zero import Handover, ZeroSteps
        from fastalign._run.zero_launch import check_dtypes

        check_dtypes(parameters)
        groups = [dict(group) for group in optimizer.param_groups]
        engine, optimizer = accelerator.prepare(Handover(loss, parameters), optimizer)
        return ZeroSteps(accelerator, loss, engine, parameters, groups), optimizer
    module, optimizer = accelerator.prepare(loss, optimizer)
    model: Any = loss.model
    own = [p for p in model.parameters() if p.requires_grad]  # an engine's own by now
    return Steps(accelerator, module, optimizer, own), optimizer
