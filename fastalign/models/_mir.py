"""The modality integration rate of a model over batches, layer by layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastalign.models._contrast import Batch
from fastalign.models._module import evaluating
from fastalign.models._vlm import VLM

if TYPE_CHECKING:
    from fastalign.metrics import ModalityIntegrationRate


def check_image_tokens(vlm: VLM) -> None:
    """Refuse a model in which images are no rows of the decoder's hidden states.

    Raises:
        ValueError: Images enter by cross-attention (Mllama).
    """
    if getattr(vlm.config.get_text_config(), "cross_attention_layers", None):
        raise ValueError(
            f"model must hold images as tokens among the text: {type(vlm.model).__name__} reads "
            "them by cross-attention, so its layers have no image rows to compare (the token that "
            "marks an image is embedded as text)"
        )


def mir_per_layer(metric: ModalityIntegrationRate) -> dict[str, Any]:
    """The state of a metric as data: {"mir": float, "layer": [1, ..., K], "fid": [K floats]}."""
    fid = metric.per_layer().tolist()
    return {"mir": float(metric.compute()), "layer": list(range(1, len(fid) + 1)), "fid": fid}


def measure_mir(
    vlm: VLM,
    batches: Iterable[Batch],
    *,
    method: Literal["newton_schulz", "eigh", "official_fast"] = "newton_schulz",
    outliers: Literal["remove", "median", "keep"] = "remove",
    text: Literal["all", "after"] = "all",
    resamples: int = 0,
) -> dict[str, Any]:
    """Modality integration rate of a model over batches, which are taken in one by one.

    Each layer's output goes to the metric while the model runs; no list of hidden states is built.
    Where torch.distributed is initialised, every rank calls this with batches of its own.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        batches: Of images and text; tensors are moved to the model's device.
        method, outliers: See `ModalityIntegrationRate`.
        text: "all" text tokens that are no padding; "after" only those after the last image, as
            the released code has it.
        resamples: Number of groups for a standard error of MIR, from 2 on; 0 for none. Samples are
            dealt into so many groups, and MIR is taken without each of them in turn (jackknife).
            That costs one pass over the batches all the same, but the memory of so many metrics
            and the finish of all layers as many times again. 10 are usual.

    Returns:
        `mir_per_layer` of the metric, with "vision_tokens" and "text_tokens", the tokens seen, and
        with "mir_standard_error" where `resamples` is not 0.

    Raises:
        ValueError: `text` is neither; the batches held no image tokens, or no text; `resamples` is
            1, negative, above the number of samples, or takes more memory than is free; images
            enter the model by cross-attention (Mllama) and are no tokens.
    """
    from fastalign.metrics import ModalityIntegrationRate

    if text not in ("all", "after"):
        raise ValueError(f'text must be "all" or "after": got {text!r}')
    if resamples < 0 or resamples == 1:
        raise ValueError(f"resamples must be 0, or at least 2: got {resamples}")
    check_image_tokens(vlm)
    parameter = next(vlm.model.parameters())
    metrics = [
        ModalityIntegrationRate(vlm.num_layers, vlm.hidden_size, method=method, outliers=outliers)
        for _ in range(max(resamples, 1))
    ]
    if resamples:
        _check_memory(resamples, metrics[0].memory_bound(parameter.dtype), parameter.device)
    for metric in metrics:
        metric.to(parameter.device)
    counts, samples = _take_in(vlm, batches, metrics, after=text == "after")
    if not all(counts.values()):
        raise ValueError(f"batches must hold image tokens and text tokens: got {counts}")
    whole = metrics[0].joined_with(*metrics[1:])
    result = mir_per_layer(whole) | counts
    if resamples:
        if not all(samples):
            raise ValueError(
                "resamples must be at most the number of samples: "
                f"got {resamples} and {sum(samples)}"
            )
        result["mir_standard_error"] = _jackknife_error(metrics)
    return result


def _take_in(
    vlm: VLM,
    batches: Iterable[Batch],
    metrics: Sequence[ModalityIntegrationRate],
    *,
    after: bool,
) -> tuple[dict[str, int], list[int]]:
    """Run the model over the batches and deal their samples to the metrics, one after another.

    Returns:
        Tokens seen, by modality, and the number of samples of each metric, of all ranks.
    """

    def places_of(mask: Tensor) -> Tensor:
        return mask.flatten().nonzero()[:, 0]

    device = next(vlm.model.parameters()).device
    counts = {"vision_tokens": 0, "text_tokens": 0}
    samples = torch.zeros(len(metrics), dtype=torch.int64, device=device)
    seen = 0
    with evaluating(vlm.model):
        for batch in batches:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            vision, words = vlm.vision_mask(batch), vlm.text_mask(batch)
            if after:
                passed = vision.cumsum(1)
                words = words & (passed > 0) & (passed == passed[:, -1:])
            turn = (seen + torch.arange(len(vision), device=device)) % len(metrics)
            seen += len(vision)
            samples += turn.bincount(minlength=len(metrics))
            places = [
                [places_of(mask & (turn == i)[:, None]) for mask in (vision, words)]
                for i in range(min(seen, len(metrics)))
            ]

            def visit(k: int, hidden: Tensor, places: list[list[Tensor]] = places) -> None:
                rows = hidden.flatten(0, 1)
                for metric, (image, word) in zip(metrics, places, strict=False):
                    metric.update_layer(
                        k - 1, rows[image.to(rows.device)], rows[word.to(rows.device)]
                    )

            vlm.each_layer(batch, visit)
            counts["vision_tokens"] += int(vision.sum())
            counts["text_tokens"] += int(words.sum())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        totals = samples.new_tensor([*samples.tolist(), *counts.values()])
        torch.distributed.all_reduce(totals)
        samples = totals[: len(metrics)]
        counts = dict(zip(counts, totals[len(metrics) :].tolist(), strict=True))
    return counts, samples.tolist()


def _jackknife_error(metrics: Sequence[ModalityIntegrationRate]) -> float:
    """Standard error of MIR from its values without each group: sqrt((g - 1) / g sum (x - m)^2)."""
    groups = len(metrics)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole has said what there is to say
        for left_out in range(groups):
            rest = [metric for i, metric in enumerate(metrics) if i != left_out]
            values.append(rest[0].joined_with(*rest[1:]).compute())
    return float((torch.stack(values).var(correction=0) * (groups - 1)).sqrt())


def _check_memory(groups: int, each: int, device: torch.device) -> None:
    """Raise where so many metrics may outgrow the free memory of the device."""
    free = free_memory(device)
    if free is not None and groups * each > free:
        raise ValueError(
            f"resamples = {groups} may take {groups * each / 1e9:.1f} GB on {device}, of which "
            f"{free / 1e9:.1f} GB are free: take fewer resamples, or none"
        )


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    named = dict(line.split(":") for line in lines)
    return int(named["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in named else None
