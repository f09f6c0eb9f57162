"""Hooks that stay, for steps that are compiled.

A pass registers hooks, runs the model and removes them. Inside a compiled graph that breaks the
graph; hooks that are there before it is traced do not. Theirs is the same work, switched on for the
time of a pass.
"""

import functools
from typing import Any

from torch import Tensor, nn

from fastalign.models._module import first_tensor


class Taps:
    """What passes read of a model, by hooks that are registered once.

    Args:
        layers: Of the decoder.
        decoder: Its own output is that of the last layer, after the final norm.
        head: Sees the last row of each sample while a pass runs: its logits are not wanted.

    Attributes:
        kept: Outputs of the layers of the last pass that it asked for, and of the decoder, by k.
        seen: The keyword arguments that the decoder was handed.
    """

    def __init__(self, layers: nn.ModuleList, decoder: nn.Module, head: nn.Module) -> None:
        self.depth = len(layers)
        self._wanted: tuple[int, ...] = ()
        self.kept: dict[int, Tensor] = {}
        self.seen: dict[str, Any] = {}
        self._handles = [
            layer.register_forward_hook(functools.partial(self._keep, k))
            for k, layer in enumerate(layers[:-1], 1)
        ]
        self._handles += [
            decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            decoder.register_forward_hook(functools.partial(self._keep, self.depth)),
            head.register_forward_pre_hook(self._last_row),
        ]

    def start(self, layers: tuple[int, ...]) -> None:
        """Begin a pass that keeps these layers, and the decoder's output."""
        self._wanted, self.kept, self.seen = (*layers, self.depth), {}, {}

    def stop(self) -> None:
        """End it: the model runs as if there were no hooks."""
        self._wanted = ()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, k: int, module: nn.Module, args: Any, output: Any) -> None:
        if k in self._wanted:
            self.kept[k] = first_tensor(output)

    def _enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._wanted:
            self.seen = dict(kwargs)

    def _last_row(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0][:, -1:],) if self._wanted else None
