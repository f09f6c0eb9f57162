"""How much text looks at the image, and where: attention weights from text to image tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastalign.diagnostics._figures import new_figure
from fastalign.diagnostics._modalities import check_image_tokens, to_model
from fastalign.models import IGNORE_INDEX, VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ImageAttention(NamedTuple):
    """Attention of text tokens to the image, by layer and head; on the CPU, float32.

    Attributes:
        layers: Decoder layers that attend, from 1; others (recurrent, convolutional) are absent.
        share: Attention on image tokens, (layers, heads), mean over the queries.
        total: Sum of all weights, (layers, heads): 1, or less where the model has a sink of its own
            beside the tokens.
        uniform: Mean share of image tokens among the tokens up to each query: what attention that
            looks at all of them alike would give.
        queries: Number of text tokens whose attention was taken.
        maps: Attention to each patch, (layers, heads, n), mean over the queries of its sample; NaN
            where there is none. Empty, n = 0, without grids.
        grids: Rows and columns of each view, whose patches lie one after the other in `maps`.
    """

    layers: tuple[int, ...]
    share: Tensor
    total: Tensor
    uniform: float
    queries: int
    maps: Tensor
    grids: tuple[tuple[int, int], ...]

    def map_of(self, view: int = 0) -> Tensor:
        """The maps of one view, (layers, heads, rows, columns)."""
        lengths = [height * width for height, width in self.grids]
        whole = torch.split(self.maps, lengths, dim=2)[view]
        return whole.reshape(*whole.shape[:2], *self.grids[view])


def image_attention(
    vlm: VLM, batch: Batch, *, queries: Tensor | None = None, maps: bool = True
) -> ImageAttention:
    """Share of attention that text tokens put on image tokens, and its maps over the patches.

    The decoder runs with eager attention for the time of the call, whatever it was loaded with, and
    one layer's weights, (b, heads, L, L), exist at a time.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batch: With images; tensors are moved to the model's device.
        queries: The tokens whose attention is taken, (b, L) bool. By default the label tokens
            behind the first image of their sample; of a batch without labels, all text there.
        maps: Also the attention to each patch. The queries of a Q-Former have no grid: False there.

    Raises:
        ValueError: There is no query, or one is no text token or its sample has no image; the
            decoder does not give its attention weights; images enter by cross-attention (Mllama);
            or `maps` is True and image tokens are no patches.
    """
    check_image_tokens(vlm)
    inputs = to_model(vlm, batch)
    image, text = vlm.vision_mask(inputs), vlm.text_mask(inputs)
    chosen = _queries(inputs, image, text) if queries is None else queries.to(image.device)
    if chosen.shape != image.shape or chosen.dtype != torch.bool:
        raise ValueError(
            f"queries must be bool of shape {tuple(image.shape)}, as input_ids: got "
            f"{chosen.dtype} {tuple(chosen.shape)}"
        )
    if not chosen.any() or (chosen & ~(text & image.any(1, keepdim=True))).any():
        raise ValueError(
            "queries must hold at least one token, all of them text of a sample with an image: got "
            f"{int(chosen.sum())}, of which {int((chosen & text).sum())} are text"
        )
    # Before the pass, as it refuses batches without grids.
    patches = vlm.patches(inputs) if maps else None
    places = image.new_empty(0, dtype=torch.long) if patches is None else patches.places
    found = _collect(vlm, inputs, chosen, image, places)
    seen = (image | text).cumsum(1)
    uniform = (image.cumsum(1).double() / seen.clamp_min(1))[chosen].mean()
    share, total, weights = (torch.stack(x) for x in zip(*found.values(), strict=True))
    grids = () if patches is None else patches.grids
    layers, count = tuple(found), int(chosen.sum())
    return ImageAttention(layers, share, total, float(uniform), count, weights, grids)


def _queries(inputs: Batch, image: Tensor, text: Tensor) -> Tensor:
    behind = text & (image.cumsum(1) > 0)
    labels = inputs.get("labels")
    return behind if labels is None else behind & (labels != IGNORE_INDEX)


def _collect(
    vlm: VLM, inputs: Batch, queries: Tensor, image: Tensor, places: Tensor
) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Of each layer that attends: share (h,), total (h,) and maps (h, n), reduced as it runs."""
    length = image.shape[1]
    rows, cols = queries.nonzero(as_tuple=True)
    sample, column = places // length, places % length
    count = torch.bincount(rows, minlength=len(image))
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def reduce(k: int, weights: Tensor) -> None:
        index = rows.to(weights.device)
        # Of the queries only: (m, h, L).
        taken = weights.detach()[index, :, cols.to(weights.device)].float()
        on_image = (taken * image.to(weights.device)[index][:, None]).sum(-1)
        by_sample = taken.new_zeros(len(image), *taken.shape[1:]).index_add(0, index, taken)
        by_sample = by_sample / count.to(weights.device)[:, None, None]  # 0 / 0: NaN, no query
        maps = by_sample[sample.to(weights.device), :, column.to(weights.device)].T
        found[k] = on_image.mean(0).cpu(), taken.sum(-1).mean(0).cpu(), maps.cpu()

    def watch(k: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.shape[2:] == (length, length):
                reduce(k, weights)

        return hook

    with evaluating(vlm.model), eager_attention(vlm), ExitStack() as stack:
        for k, layer in enumerate(vlm.layers, start=1):
            for part in layer.children():
                stack.callback(part.register_forward_hook(watch(k)).remove)
        vlm.forward(inputs)
    if not found:
        raise ValueError(
            f"the decoder must give its attention weights: no layer of {type(vlm.decoder).__name__}"
            " returned any"
        )
    return found


@contextmanager
def eager_attention(vlm: VLM) -> Iterator[None]:
    """Eager attention of the decoder, and afterwards what it had, also after an error.

    Raises:
        ValueError: The decoder cannot change its attention.
    """
    decoder = vlm.decoder
    before: str = decoder.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        decoder.set_attn_implementation("eager")
        if decoder.config._attn_implementation != "eager":
            raise ValueError(
                f"{type(decoder).__name__} cannot change its attention ({before}) once it is "
                'loaded: load the model with attn_implementation="eager"'
            )
        yield
    finally:
        decoder.set_attn_implementation(before)


def plot_image_attention(
    data: ImageAttention, *, view: int = 0, layer: int | None = None, image: Any = None
) -> Figure:
    """The share by layer and head beside the map of one layer, mean over its heads.

    Args:
        data: A result of `image_attention`.
        view: Which picture's map.
        layer: Which layer's map; that with the largest share by default.
        image: The picture, (H, W, 3) or a PIL image, shown below the map.

    Raises:
        ValueError: `layer` or `view` is not in the data.
    """
    from matplotlib.ticker import MaxNLocator

    mean = data.share.mean(1)
    if layer is None:
        layer = data.layers[int(mean.argmax())]
    if layer not in data.layers:
        raise ValueError(f"layer must be one of {list(data.layers)}: got {layer}")
    with_map = bool(data.grids)
    if with_map and not 0 <= view < len(data.grids):
        raise ValueError(f"view must lie in 0..{len(data.grids) - 1}: got {view}")
    figure = new_figure(6.4 + 4.4 * with_map, 4.2)
    axes = figure.add_subplot(1, 1 + with_map, 1)
    shown = axes.imshow(data.share.numpy(), aspect="auto", cmap="cividis", vmin=0)
    figure.colorbar(shown, ax=axes, label="share of attention on image tokens")
    axes.set_xlabel("head")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("decoder layer")
    axes.set_yticks(range(len(data.layers)), [str(k) for k in data.layers])
    axes.set_title(f"mean {float(mean.mean()):.3f}; uniform {data.uniform:.3f}")
    if with_map:
        axes = figure.add_subplot(1, 2, 2)
        values = data.map_of(view)[data.layers.index(layer)].mean(0)
        height, width = values.shape
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        if image is not None:
            axes.imshow(image, extent=extent)
        alpha = 1.0 if image is None else 0.6
        shown = axes.imshow(values.numpy(), cmap="cividis", alpha=alpha, vmin=0, extent=extent)
        figure.colorbar(shown, ax=axes, shrink=0.8, label="attention")
        axes.set_xlabel("patch column")
        axes.set_ylabel("patch row")
        axes.set_title(f"layer {layer}, mean over heads")
    figure.suptitle(f"Attention of {data.queries} text tokens to the image")
    return figure
