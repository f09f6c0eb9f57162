"""A decoder of transformers run over packed samples: `packed` swaps its attention for a while.

transformers reads packing from jumps of the position ids, and the image-free branch keeps the
position of every text token, so an image that was dropped would look like the border of a sample.
Here the segments are handed over; nothing is detected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models._packed_attention import BACKENDS as BACKENDS
from fastalign.models._packed_attention import attention_backend as attention_backend
from fastalign.models._packed_attention import choose as choose
from fastalign.models._packed_attention import packed_attention as packed_attention
from fastalign.models._packed_limits import LIBRARIES as LIBRARIES
from fastalign.models._packed_limits import obstacle as obstacle
from fastalign.models._segments import Segments as Segments
from fastalign.ops._check import check_one_of

NAME = "fastalign_packed"

# Layers that attend to tokens and do nothing else with them; "sparse" and "dense" name MLPs.
LAYER_TYPES = {"full_attention", "sliding_attention", "sparse", "dense"}
# What an attention module may hand to its attention function that changes the result.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")


@dataclass
class _Run:
    """What the attention of the decoder in force reads, and what is known of its forward."""

    segments: Segments
    backend: str
    calls: int = 0
    masked_windows: set[int] = field(default_factory=set)
    windows: set[int | None] = field(default_factory=set)


_RUNNING: ContextVar[_Run | None] = ContextVar("fastalign_packed", default=None)


@lru_cache(maxsize=1)
def register() -> str:
    """Make packed attention known to transformers, once, and return its name there.

    Models meet it only where `packed` names it in their configuration.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


@contextmanager
def packed(decoder: nn.Module, segments: Segments, backend: str = "auto") -> Iterator[None]:
    """Inside, every attention of `decoder` is `packed_attention` over `segments`.

    The decoder is called with one row, inputs_embeds (1, T, d), with position ids of T tokens, no
    attention mask and no cache. Afterwards its attention is what it was, also after an error.
    Contexts may be nested; the innermost is in force. Not for a forward that a checkpointed
    backward runs again: that would happen outside.

    Args:
        decoder: A decoder of transformers, such as `model.get_decoder()`.
        segments: The samples of the row.
        backend: One of `BACKENDS`.

    Raises:
        TypeError: The decoder holds no configuration of transformers.
        ValueError: `backend` is unknown, or a layer mixes tokens otherwise than by attention.
        RuntimeError: The decoder ran without calling packed attention once.
    """
    check_one_of("backend", backend, BACKENDS)
    configs = _configs(decoder)
    _check_packable(decoder, configs)
    name = register()
    run = _Run(segments, backend)
    before = [(config, config._attn_implementation) for config in configs]
    handle = decoder.register_forward_hook(lambda module, args, output: _check_ran(module, run))
    token = _RUNNING.set(run)
    try:
        # `set_attn_implementation` could not be undone: it maps None to sdpa, checks each name
        # again, and skips modules that are no PreTrainedModel. The key "" spares the
        # sub-configurations: those that no module of the decoder holds are not its own.
        for config, _ in before:
            config._attn_implementation = {"": name}
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = {"": implementation}
        _RUNNING.reset(token)
        handle.remove()


def _configs(decoder: nn.Module) -> list[Any]:
    """Each configuration that a module of the decoder holds, once."""
    held = (getattr(module, "config", None) for module in decoder.modules())
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation")}
    if not configs:
        raise TypeError(
            f"decoder must be a decoder of transformers, such as model.get_decoder(): "
            f"{type(decoder).__name__} holds no configuration with an attention implementation"
        )
    return list(configs.values())


def _check_packable(decoder: nn.Module, configs: list[Any]) -> None:
    kinds = {kind for c in configs for kind in getattr(c, "layer_types", None) or ()}
    found = sorted(kinds - LAYER_TYPES)
    found += sorted({type(m).__name__ for m in decoder.modules() if isinstance(m, nn.Conv1d)})
    if found:
        raise ValueError(
            f"{type(decoder).__name__} cannot run packed: {', '.join(found)} would carry one "
            f"sample into the next; run it on right-padded rows"
        )


def _check_ran(decoder: nn.Module, run: _Run) -> None:
    if _RUNNING.get() is not run:  # a context inside this one was in force
        return
    if not run.calls:
        raise RuntimeError(
            f"{type(decoder).__name__} ran without packed attention: its attention does not go "
            f"through transformers' AttentionInterface; run it on right-padded rows"
        )
    unseen = {w for w in run.masked_windows if w < run.segments.span} - run.windows
    if unseen:
        raise RuntimeError(
            f"{type(decoder).__name__} puts a sliding window of {sorted(unseen)} into its mask "
            f"and does not pass it to its attention; run it on right-padded rows"
        )


def _no_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> None:
    """The mask that transformers makes for packed attention: none, the segments say it all."""
    if attention_mask is not None or use_vmap:
        what = "attention_mask" if attention_mask is not None else "mask function of its own"
        raise ValueError(
            f"a packed decoder takes no {what}, as its segments say what is seen: "
            f"leave it out, or run the decoder on right-padded rows"
        )
    run = _RUNNING.get()
    types = getattr(config, "layer_types", None)
    # Some decoders make the mask of sliding layers though they have none.
    if run and local_size is not None and (types is None or "sliding_attention" in types):
        run.masked_windows.add(local_size)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` in the form of transformers' attention functions.

    Returns:
        Output (1, T, h, dv), and None for the attention weights.
    """
    run = _RUNNING.get()
    if run is None:
        raise RuntimeError(
            f"{type(module).__name__} has packed attention outside of `packed`, in another thread "
            f"or in a backward that runs the forward again: enter the context there"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unmet = {
        "an attention_mask": attention_mask is not None,
        "dropout": dropout != 0.0,
        "attention that is not causal": not causal,
        "cross-attention or a cache": key.shape[2] != query.shape[2],
    }
    reasons = [what for what, met in unmet.items() if met]
    reasons += [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if reasons:
        raise ValueError(
            f"{type(module).__name__} cannot run packed, as it asks for {', '.join(reasons)}; "
            f"leave it out, or run the decoder on right-padded rows"
        )
    kind = query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        # Rotary embeddings in float32 widen query and key, not value; sdpa would cast all three.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    run.calls += 1
    run.windows.add(sliding_window)
    out = packed_attention(
        *(query, key, value, run.segments),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
        backend=run.backend,
    )
    return out.transpose(1, 2).contiguous(), None
