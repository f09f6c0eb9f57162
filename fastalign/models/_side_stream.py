"""The image-free forward layer by layer with the forward with the image."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastalign.models._branch import Branch, Layout
from fastalign.models._module import evaluating, first_tensor, split_hidden
from fastalign.models._rows import take_rows


@dataclass
class SideStream:
    """The image-free forward pushed through each layer right after the forward with the image.

    Where an engine gathers the weights of a layer for its forward (FSDP, ZeRO-3), they are gathered
    once for both, and a rank without an image needs no dummy pass: the stream itself gathers
    nothing. The result is that of `Branch.run`.
    """

    branch: Branch
    layout: Layout
    prefix_rows: Tensor | None
    _hidden: Tensor = field(init=False)
    _calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(init=False)
    _handles: list[RemovableHandle] = field(init=False)
    _tuples: bool = field(init=False, default=False)
    _recording: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        """Learn what the decoder hands to each layer, and follow its layers."""
        self._calls = {}
        self._without_layers(self._record)
        self._recording = False
        # Before an engine's own hooks, which give the gathered weights back.
        self._handles = [
            layer.register_forward_hook(self._follow, prepend=True, with_kwargs=True)
            for layer in self._calls
        ]

    def _without_layers(self, call: Any) -> Any:
        """The decoder's forward with `call` in the place of each layer.

        Its other parts run without hooks: those of an engine belong to the forward with the image,
        and what they gather on one rank alone would leave the others waiting.
        """
        decoder = self.branch.decoder
        with (
            evaluating(decoder),
            self.layout.attention(decoder),
            _standing_in(self.branch.layers, call),
            _standing_in(decoder, self._bare),
        ):
            return decoder.forward(**self.layout.inputs)

    def _bare(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A part of the decoder that is no layer, such as its rotary embedding or its final norm.

        While the layers' arguments are recorded, what comes after them need not run.
        """
        return args[0] if self._recording and self._calls else part.forward(*args, **kwargs)

    def _record(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, args, kwargs = split_hidden(args, kwargs)
        if not self._calls:
            self._hidden = hidden
        self._calls[layer] = args, kwargs
        return hidden

    def _follow(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if layer not in self._calls:  # a recomputation of an activation checkpoint
            return
        given = self._calls.pop(layer)
        dtype = first_tensor(output).dtype
        others, named = torch.utils._pytree.tree_map_only(
            Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, given
        )
        states = None
        if self.prefix_rows is not None:
            states = take_rows(split_hidden(args, kwargs)[0].detach(), self.prefix_rows)
        hidden = self.layout.with_prefix(self._hidden.to(dtype), states)
        rows = self.layout.rows_of(layer, last=layer is self.branch.layers[-1])
        with evaluating(layer), self.layout.attention(layer), rows:
            out = layer.forward(hidden, *others, **named)
        self._hidden, self._tuples = first_tensor(out), isinstance(output, tuple)

    def close(self) -> None:
        """Follow the layers no longer."""
        for handle in self._handles:
            handle.remove()

    def finish(self) -> Tensor:
        """Hidden states of the predictors after the decoder's final norm, (active, d).

        Raises:
            RuntimeError: The forward with the image left layers out.
        """
        if self._calls:
            raise RuntimeError(
                f"the contrast cannot follow {self.branch.name}, which left out {len(self._calls)} "
                "layer(s) of its decoder: set layerdrop to 0, or interleave=False"
            )
        output = (self._hidden,) if self._tuples else self._hidden
        out = self._without_layers(lambda layer, args, kwargs: output)
        return take_rows(first_tensor(out), self.layout.predictors)


class _StandIn(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(args, kwargs)


@contextmanager
def _standing_in(parent: nn.Module, call: Any) -> Iterator[None]:
    """Let `call(child, args, kwargs)` answer for each child of `parent` that is no list."""
    own = {n: m for n, m in parent.named_children() if not isinstance(m, nn.ModuleList)}
    try:
        for name, child in own.items():
            stand_in = _StandIn(lambda args, kwargs, child=child: call(child, args, kwargs))
            # What decoders read from a layer beside calling it.
            for read in ("attention_type", "layer_type", "layer_idx"):
                if hasattr(child, read):
                    setattr(stand_in, read, getattr(child, read))
            setattr(parent, name, stand_in)
        yield
    finally:
        for name, child in own.items():
            setattr(parent, name, child)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor that FSDP2 has sharded, gathered: all ranks must call. Any other as it is."""
    maybe: Any = tensor
    whole: Tensor = maybe.full_tensor() if is_part(tensor) else tensor
    return whole


def is_part(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it, as a DTensor, which costs much to import."""
    return hasattr(tensor, "full_tensor")


def is_writer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this rank writes tensors to files: of sharded ones only the first rank does."""
    sharded = any(is_part(tensor) for tensor in tensors.values())
    return not sharded or torch.distributed.get_rank() == 0


def is_sharded(module: nn.Module) -> bool:
    """Whether an engine gathers the weights of the parts of `module` for their forward."""
    from torch.distributed.fsdp import FSDPModule

    return any(
        isinstance(m, FSDPModule) or any(hasattr(p, "ds_id") for p in m.parameters(recurse=False))
        for m in module.modules()
    )
