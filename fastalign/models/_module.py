"""Small things about modules: their parts, their outputs, their modes."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn


def layer_stack(module: nn.Module) -> nn.ModuleList:
    """The layers of a decoder or an encoder: its longest `nn.ModuleList`."""
    stacks = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise TypeError(f"{type(module).__name__} holds no nn.ModuleList of layers")
    return max(stacks, key=len)


def find_decoder(model: Any) -> nn.Module:
    """The layers' module that a vision-language model calls, without an output embedding."""
    decoder: Any = model.get_decoder()
    if decoder is model:
        raise TypeError(f"model must have a decoder of its own: {type(model).__name__} has none")
    if model.config.get_text_config().is_encoder_decoder:
        raise TypeError(
            f"the language model must be decoder-only: {type(model).__name__} holds an "
            "encoder-decoder, whose encoder reads images and text at once"
        )
    while decoder.get_output_embeddings() is not None:  # the Q-Former models hold a whole LM
        decoder = decoder.get_decoder()
    found: nn.Module = decoder
    return found


def first_tensor(output: Any) -> Tensor:
    """The hidden states of a layer's or decoder's output: itself, or what it begins with."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def split_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a layer is called with, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return kwargs["hidden_states"], (), others


_RUNNING: ContextVar[nn.Module | None] = ContextVar("fastalign_running", default=None)


@contextmanager
def forward_of(module: nn.Module) -> Iterator[None]:
    """Say that the code inside is the forward of `module`, so that `call` does not enter it twice.

    An engine's hooks are around it already. A second time they would give its gathered weights
    back before the loss has read the head's.
    """
    token = _RUNNING.set(module)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def call(module: nn.Module, **inputs: Any) -> Any:
    """`module(**inputs)`; without the module's own hooks inside `forward_of(module)`."""
    return module.forward(**inputs) if _RUNNING.get() is module else module(**inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradient, and every module's own mode restored afterwards."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def last_row(head: nn.Module) -> Iterator[list[Tensor]]:
    """Let the output embedding see the last row of each sample: its logits are not wanted.

    The same for models with and without `logits_to_keep`. Gives the list that holds its output.
    """
    outputs: list[Tensor] = []

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][:, -1:],)

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs.append(output.detach())

    handles = [head.register_forward_pre_hook(choose), head.register_forward_hook(keep)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
