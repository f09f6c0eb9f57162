"""Vision and text tokens in the plane, by t-SNE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.diagnostics._figures import COLORS, new_figure
from fastalign.diagnostics._modalities import (
    check_image_tokens,
    check_layers,
    each_state,
    places_of,
    to_model,
)
from fastalign.diagnostics._sklearn import sklearn
from fastalign.models import VLM, Batch, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODALITIES = ("vision", "text")


class _Sample:
    """A sample of the tokens of one modality without replacement: those of the smallest keys.

    A token's key is drawn before the model runs, so that only the states of tokens that are still
    in the sample are kept, and every layer has the same tokens.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows: dict[int, Tensor] = {}
        self.seen = 0

    def draw(self, places: Tensor, generator: torch.Generator) -> None:
        """Take in the tokens at `places` of the next batch."""
        new = torch.rand(len(places), generator=generator, dtype=torch.float64)
        self.seen += len(places)
        held = len(self.keys)
        everything = torch.cat([self.keys, new])
        order = everything.argsort(stable=True)[: self.size].sort().values
        self.keys = everything[order]
        kept = order[order < held]
        self.rows = {k: rows[kept] for k, rows in self.rows.items()}
        self.places = places[(order[order >= held] - held).to(places.device)]

    def take(self, layer: int, flat: Tensor) -> None:
        """Keep the drawn tokens of one layer's output, (b * L, d)."""
        rows = flat[self.places.to(flat.device)].detach().float().cpu()
        before = self.rows.get(layer)
        self.rows[layer] = rows if before is None else torch.cat([before, rows])


def token_embedding(
    vlm: VLM,
    batches: Iterable[Batch],
    layers: Sequence[int] | None = None,
    *,
    tokens: int = 500,
    perplexity: float = 30.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Vision and text tokens in the plane by t-SNE (scikit-learn), layer by layer.

    As many tokens of one modality as of the other are drawn at random over all batches, the same
    ones for every layer; each layer is embedded on its own, so that axes and scales of two layers
    have nothing to do with each other.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batches: Of images and text; tensors are moved to the model's device.
        layers: Decoder layers, 0 for what the decoder is handed; the first, the middle and the last
            by default.
        tokens: Of each modality, at most.
        perplexity: Of t-SNE: about how many neighbours a token has; below the number of tokens.
        seed: Of the draw and of t-SNE.

    Returns:
        {"modality": ["vision" or "text" for each token], "layers": {k: [[x, y] for each token]},
        "own_neighbour": {k: share of tokens whose nearest other, in the layer's own space, is of
        their modality: about 0.5 for clouds that cannot be told apart, 1 for separate ones},
        "tokens": of each modality, "perplexity", "seed"}.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: A layer does not exist, there are fewer than two tokens of a modality,
            `perplexity` is not above 0 and below the number of tokens, or images enter the model by
            cross-attention (Mllama).
    """
    manifold = sklearn("manifold")
    check_image_tokens(vlm)
    if tokens < 2:
        raise ValueError(f"tokens must be at least 2: got {tokens}")
    depth = vlm.num_layers
    chosen = check_layers(vlm, (1, (depth + 1) // 2, depth) if layers is None else layers, first=0)
    samples = _draw(vlm, batches, chosen, tokens, seed)
    count = min(len(sample.keys) for sample in samples)
    if count < 2:
        seen = {m: s.seen for m, s in zip(MODALITIES, samples, strict=True)}
        raise ValueError(f"batches must hold at least 2 tokens of each modality: got {seen}")
    if not 0 < perplexity < 2 * count:
        raise ValueError(
            f"perplexity must be above 0 and below the number of tokens, {2 * count}: got "
            f"{perplexity}; give more batches, or lower it"
        )
    smallest = [sample.keys.argsort(stable=True)[:count] for sample in samples]
    points, own = {}, {}
    for k in chosen:
        rows = torch.cat([s.rows[k][i] for s, i in zip(samples, smallest, strict=True)])
        tsne = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed)
        points[k] = tsne.fit_transform(rows.numpy()).tolist()
        distances = torch.cdist(rows.double(), rows.double()).fill_diagonal_(torch.inf)
        nearest_is_text = distances.argmin(1) >= count
        own[k] = float((nearest_is_text == (torch.arange(2 * count) >= count)).double().mean())
    modality = [name for name in MODALITIES for _ in range(count)]
    about = {"tokens": count, "perplexity": perplexity, "seed": seed}
    return {"modality": modality, "layers": points, "own_neighbour": own, **about}


def _draw(
    vlm: VLM, batches: Iterable[Batch], layers: Sequence[int], tokens: int, seed: int
) -> list[_Sample]:
    """A sample of each modality, with its states at `layers`."""
    generator = torch.Generator().manual_seed(seed)
    samples = [_Sample(tokens) for _ in MODALITIES]

    def visit(k: int, hidden: Tensor) -> None:
        if k in layers:
            for sample in samples:
                sample.take(k, hidden.flatten(0, 1))

    with evaluating(vlm.model):
        for batch in batches:
            inputs = to_model(vlm, batch)
            masks = (vlm.vision_mask(inputs), vlm.text_mask(inputs))
            for sample, mask in zip(samples, masks, strict=True):
                sample.draw(places_of(mask), generator)
            each_state(vlm, inputs, visit)
    return samples


def plot_token_embedding(data: dict[str, Any]) -> Figure:
    """A panel for each layer of a result of `token_embedding`, a colour for each modality."""
    layers = data["layers"]
    figure = new_figure(3.6 * len(layers), 3.8)
    for place, (k, points) in enumerate(layers.items(), start=1):
        axes = figure.add_subplot(1, len(layers), place)
        for i, name in enumerate(MODALITIES):
            mine = [p for p, m in zip(points, data["modality"], strict=True) if m == name]
            x, y = zip(*mine, strict=True)
            axes.scatter(x, y, s=8, color=COLORS[i], label=name, linewidths=0, alpha=0.7)
        axes.set_title("decoder input" if int(k) == 0 else f"layer {k}")
        axes.set_xticks([])
        axes.set_yticks([])
        if place == 1:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(f"t-SNE, {data['tokens']} tokens of each modality")
    return figure
