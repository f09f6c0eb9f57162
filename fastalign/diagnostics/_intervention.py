"""DeepAlign's intervention: which channels tell the modalities apart, and where vision goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastalign.adapters import NAME, disabled
from fastalign.diagnostics._figures import check_curves, finish_axes, line_style, new_figure
from fastalign.models import VLM, Batch
from fastalign.objectives import DeepAlignState
from fastalign.objectives._intervention import TEXT, VISION, representations

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ChannelEnergy(NamedTuple):
    """How the energy of one modality's component w ∘ h lies over the d channels.

    Attributes:
        mean: Each channel's share of a pair's energy, (w h)_i^2 / |w ∘ h|^2, mean over pairs, (d,)
            float64; they add up to 1.
        spread: Standard deviation of that share over pairs, (d,).
        top: The channels with the largest mean, largest first.
        half, ninety: How many channels it takes, by their means, to hold half and 90 % of it.
    """

    mean: Tensor
    spread: Tensor
    top: list[int]
    half: int
    ninety: int


class ModalityChannels(NamedTuple):
    """Channels that are specific to a modality, for the classifier that was trained.

    Attributes:
        text, vision: Each modality's energy.
        overlap: Share of the top channels that both modalities have.
        pairs: Image-text pairs that were looked at.
    """

    text: ChannelEnergy
    vision: ChannelEnergy
    overlap: float
    pairs: int


@torch.no_grad()
def modality_channels(
    state: DeepAlignState, vlm: VLM, batches: Iterable[Batch], *, top: int = 10
) -> ModalityChannels:
    """Which channels the classifier tells text from vision by (DeepAlign, CVPR 2026, section 1.2).

    They are channels of the base model's pooled representations: an attached adapter is switched
    off. Pairs whose component is zero or not finite are left out.

    Args:
        state: With a fitted classifier.
        vlm: The model.
        batches: Batches with image-text pairs.
        top: How many channels to name.

    Raises:
        ValueError: `top` does not lie in 1..d, or there is no pair.
    """
    width = vlm.hidden_size
    if not 1 <= top <= width:
        raise ValueError(f"top must lie in 1..{width}, the channels of the model: got {top}")
    adapted = getattr(vlm.model, NAME, None) is not None
    found: dict[int, list[Tensor]] = {TEXT: [], VISION: []}
    for batch in batches:
        with disabled(vlm.model) if adapted else nullcontext():
            h_v, h_t = representations(vlm, batch, state.layers, state.config.pool)
        for modality, h in ((TEXT, h_t), (VISION, h_v)):
            weights = state.classifier.channel_weights(h, modality)
            energy = (weights.double() * h.double()).square()
            found[modality].append(energy / energy.sum(1, keepdim=True))
    shares = [torch.cat(found[m]).cpu() if found[m] else torch.zeros(0) for m in (TEXT, VISION)]
    kept = [s[s.isfinite().flatten(1).all(1)] for s in shares]
    if not all(map(len, kept)):
        raise ValueError("batches must hold image-text pairs: got none")
    text, vision = (_energy(s, top) for s in kept)
    overlap = len({*text.top} & {*vision.top}) / top
    return ModalityChannels(text, vision, overlap, len(shares[0]))


def _energy(shares: Tensor, top: int) -> ChannelEnergy:
    """Of the shares of each pair, (pairs, d)."""
    mean = shares.mean(0)
    ordered, channels = mean.sort(descending=True)
    held = ordered.cumsum(0)
    # Rounding must not ask for one channel more than hold exactly half.
    half, ninety = (int((held < level - 1e-12).sum()) + 1 for level in (0.5, 0.9))
    return ChannelEnergy(mean, shares.std(0, correction=0), channels[:top].tolist(), half, ninety)


def plot_modality_channels(channels: ModalityChannels) -> Figure:
    """The top channels of each modality with their spread, and how the energy adds up.

    Args:
        channels: From `modality_channels`.
    """
    figure = new_figure(12.0, 3.8)
    sides = {"text": channels.text, "vision": channels.vision}
    for place, (name, energy) in enumerate(sides.items(), start=1):
        axes = figure.add_subplot(1, 3, place)
        ticks = range(len(energy.top))
        color = line_style(place - 1)["color"]
        style = {"color": color, "ecolor": "#333333", "capsize": 2}
        mean, spread = (100 * values[energy.top] for values in (energy.mean, energy.spread))
        # A share is not negative, whatever its spread.
        below = torch.minimum(spread, mean)
        label = "mean and standard deviation over pairs"
        axes.bar(ticks, mean.tolist(), yerr=[below.tolist(), spread.tolist()], label=label, **style)
        axes.set_xticks(ticks, [str(c) for c in energy.top], rotation=60, fontsize=8)
        axes.set_xlabel("channel")
        axes.set_ylabel(f"share of the {name} component's energy (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    axes = figure.add_subplot(1, 3, 3)
    for i, (name, energy) in enumerate(sides.items()):
        held = 100 * energy.mean.sort(descending=True).values.cumsum(0)
        label = f"{name}: half in {energy.half}, 90 % in {energy.ninety} of {len(held)}"
        style = line_style(i) | {"marker": ""}
        axes.plot(range(1, len(held) + 1), held.tolist(), label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("channels, largest first")
    axes.set_ylabel("energy that they hold (%)")
    axes.set_title(f"{channels.overlap:.0%} of the top {len(channels.text.top)} in both")
    finish_axes(axes, integers=False)
    return figure


def plot_shift_alignment(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The cosine of the displacement of vision with both shift directions, against steps.

    Args:
        curves: Names to results of `learning_curve`, of runs of DeepAlign.

    Raises:
        ValueError: A run logged no cosines.
    """
    check_curves(curves)
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.axhline(0.0, color="#999999", linewidth=0.8)
    for i, (name, data) in enumerate(curves.items()):
        for term, dashes in (("cos_global", "-"), ("cos_instance", "--")):
            if term not in data:
                raise ValueError(
                    f"curves must be of runs whose DeepAlign intervenes: {name!r} has no {term}"
                )
            style = line_style(i) | {"marker": "o" if len(data["step"]) < 3 else ""}
            label = f"{name}, {term.removeprefix('cos_')} direction"
            axes.plot(data["step"], data[term], label=label, linestyle=dashes, **style)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cosine of displacement and direction")
    finish_axes(axes, integers=True)
    return figure
