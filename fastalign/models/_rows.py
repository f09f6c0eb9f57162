"""The last decoder layer on the rows that a loss reads.

Every row of the last layer gives keys and values, but only the rows that predict a label need its
queries, its output projection and its MLP. Those parts work row by row, so hooks hand them the
chosen rows and put the results back where they belong: values and gradients of the chosen rows are
exact, and the other rows of the layer's output mean nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Names that the decoders of transformers give to the parts that work row by row.
_ATTENTION_PARTS = ("q_proj", "o_proj", "out_proj")
# Above this share of rows the copies cost as much as they save.
_WORTH = 0.9


def take_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows (m, d) of (b, L, d) by their place in the flattened batch, (m,)."""
    return hidden.flatten(0, 1).index_select(0, rows)


def row_parts(layer: nn.Module) -> list[nn.Module]:
    """The parts of a decoder layer that may run on chosen rows; none of a wrapped layer.

    A checkpointing or compiling wrapper runs the layer again, or elsewhere, without the hooks.
    """
    own = dict(layer.named_children())
    if layer._compiled_call_impl is not None:
        return []
    attention = dict(own["self_attn"].named_children()) if "self_attn" in own else {}
    parts = [attention[name] for name in _ATTENTION_PARTS if name in attention]
    return parts + ([own["mlp"]] if "mlp" in own else [])


@contextmanager
def only_rows(layer: nn.Module, rows: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Run the row-wise parts of `layer` on chosen rows of its (b, L, d) input.

    Args:
        layer: A decoder layer. Its gradient checkpointing is off inside: its recomputation would
            come after the hooks are gone, and its activations are few and needed at once.
        rows: Places of the chosen rows in the flattened batch, (m,), none twice.
        shape: (b, L).
    """
    parts = row_parts(layer)
    if len(rows) > _WORTH * shape[0] * shape[1] or not parts:
        yield
        return
    handles = [handle for part in parts for handle in _hooks(part, rows, shape)]
    checkpointed = getattr(layer, "gradient_checkpointing", False)
    try:
        if checkpointed:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        if checkpointed:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        for handle in handles:
            handle.remove()


def _hooks(part: nn.Module, rows: Tensor, shape: tuple[int, int]) -> list[RemovableHandle]:
    """Hooks that hand `part` the chosen rows, (1, m, d), and put its output back, (b, L, d')."""
    chosen = False

    def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal chosen
        hidden, *others = args
        chosen = tuple(hidden.shape[:-1]) == shape
        return (take_rows(hidden, rows)[None], *others) if chosen else None

    def put_back(module: nn.Module, args: Any, output: Any) -> Any:
        if not chosen:
            return None
        values, *others = output if isinstance(output, tuple) else (output,)
        full = values.new_zeros(shape[0] * shape[1], values.shape[-1])
        full = full.index_copy(0, rows, values[0]).view(*shape, -1)
        return (full, *others) if isinstance(output, tuple) else full

    # Before other hooks, which expect the output that belongs to the whole input.
    put = part.register_forward_hook(put_back, prepend=True)
    return [part.register_forward_pre_hook(choose), put]
