"""DeepAlign: the joint loss, what it carries from step to step, and its classifier's training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import losses, ops
from fastalign.adapters import NAME, disabled
from fastalign.models import VLM, Batch, Forward
from fastalign.nn import ModalityClassifier, ShiftDirection
from fastalign.objectives._terms import Terms, Totals, label_loss, pair_rows, report, share

TEXT, VISION = 0, 1


@dataclass(frozen=True)
class DeepAlignConfig:
    """The joint loss of DeepAlign and how its representations are taken.

    Attributes:
        alpha, beta, gamma, mu: Weights of the global, instance, mutual-information and distillation
            terms (appendix A: 1.0 each).
        without: Terms switched off, as in the paper's ablation: "intervention" (global, instance
            and mutual together), "distillation", "global", "instance", "mutual".
        layers: Decoder layers whose states are averaged for the classifier; every layer when empty.
        pool: "last" token of each modality, or the "mean" of its tokens.
        student_layers: Decoder layers whose image tokens are distilled; the middle one when empty.
        kind: "cosine" or "mse", of the shift losses.
        estimator: "infonce" or "gaussian", of the mutual information.
        temperature: Of InfoNCE.
        negatives: See `losses.structure_distill`.
        classifier_hidden_dims, classifier_steps, classifier_lr, classifier_pairs: The classifier,
            its training and the number of image-text pairs it is trained and judged on.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    mu: float = 1.0
    without: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    pool: str = "last"
    student_layers: tuple[int, ...] = ()
    kind: str = "cosine"
    estimator: str = "infonce"
    temperature: float = 0.07
    negatives: str = "keep"
    classifier_hidden_dims: tuple[int, ...] = (512,)
    classifier_steps: int = 200
    classifier_lr: float = 1e-3
    classifier_pairs: int = 512

    def __post_init__(self) -> None:
        names = ("intervention", "distillation", "global", "instance", "mutual")
        for name in self.without:
            if name not in names:
                raise ValueError(f"without must name terms of {names}: got {name!r}")
        if self.pool not in ("last", "mean"):
            raise ValueError(f'pool must be "last" or "mean": got {self.pool!r}')

    def weight(self, term: str) -> float:
        """The weight of "global", "instance", "mutual" or "visual"; 0 when switched off."""
        group = "distillation" if term == "visual" else "intervention"
        if term in self.without or group in self.without:
            return 0.0
        named = {"global": self.alpha, "instance": self.beta, "mutual": self.gamma}
        return named.get(term, self.mu)

    @property
    def intervenes(self) -> bool:
        """Whether any term needs the classifier."""
        return any(self.weight(term) for term in ("global", "instance", "mutual"))


class DeepAlignState(nn.Module):
    """What DeepAlign carries from step to step: the classifier and the global direction.

    Args:
        vlm: The model.
        config: See `DeepAlignConfig`.
        teacher: (batch) -> patch features (images, n, C) or with their grid, when the batch does
            not hold them as `teacher`.
    """

    def __init__(
        self,
        vlm: VLM,
        config: DeepAlignConfig | None = None,
        teacher: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.config = config or DeepAlignConfig()
        self.layers = self.config.layers or tuple(range(1, vlm.num_layers + 1))
        self.student_layers = self.config.student_layers or (max(1, vlm.num_layers // 2),)
        self.classifier = ModalityClassifier(vlm.hidden_size, self.config.classifier_hidden_dims)
        self.classifier.requires_grad_(False)
        self.direction = ShiftDirection(vlm.hidden_size)
        self.to(vlm.head.weight.device)
        # Not a submodule: a frozen teacher is no part of the checkpoint.
        self._teacher = [teacher]

    def teacher_features(self, vlm: VLM, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """Teacher patches (images, h * w, C) on the student's grid, without gradient."""
        features = batch.get("teacher")
        if features is None and self._teacher[0] is not None:
            with torch.no_grad():
                features = self._teacher[0](batch)
        if features is None:
            raise ValueError(
                "distillation needs teacher features: give DeepAlignState a teacher, put them into "
                'the batch as "teacher" (images, n, C), or switch it off with '
                'without=("distillation",)'
            )
        height, width = grid
        n = features.shape[1]
        if n == height * width:
            found: Tensor = features
            return found
        side = round(n**0.5)
        source = batch.get("teacher_grid", (side, side))
        return losses.resample_grid(features, source, grid)


def pooled(hidden: list[Tensor], mask: Tensor, pool: str) -> Tensor:
    """One vector per sample, averaged over layers (appendix A: cross-layer pooled).

    Args:
        hidden: Layers, each (b, L, d).
        mask: The modality's tokens, (b, L), at least one per sample.
        pool: "last" or "mean".

    Returns:
        (b, d) float32.
    """
    if pool == "last":
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.uint8).argmax(1)
        samples = torch.arange(len(mask), device=mask.device)
        return torch.stack([h[samples, last].float() for h in hidden]).mean(0)
    share = mask.float() / mask.sum(1, keepdim=True)
    return torch.stack([torch.einsum("bl,bld->bd", share, h.float()) for h in hidden]).mean(0)


def representations(
    vlm: VLM, batch: Batch, layers: Iterable[int], pool: str
) -> tuple[Tensor, Tensor]:
    """Vision and text vectors of the pairs of a batch, (m, d) float32 each."""
    rows, (vision, text) = pair_rows(vlm, batch)
    hidden = [h[rows] for h in vlm.hidden_states(batch, list(layers))]
    return pooled(hidden, vision[rows], pool), pooled(hidden, text[rows], pool)


def deepalign(
    vlm: VLM, batch: Batch, *, state: DeepAlignState, totals: Totals | None = None
) -> Terms:
    r"""DeepAlign's joint loss (CVPR 2026), for a model with an attached adapter.

    $L = L_{AR} + \alpha L_{global} + \beta L_{instance} + \gamma L_{MI} + \mu L_{visual}$. The base
    model's own representations come from a second pass with the adapter switched off.

    Args:
        vlm: The model, with an adapter.
        batch: See `VLM`; with `labels`, and `teacher` features unless the state has a teacher.
        state: A fitted `DeepAlignState`; its global direction is updated in training mode.
        totals: See the module.

    Returns:
        "loss", its unweighted terms "ce", "global", "instance", "mutual" and "visual" as far as
        they are switched on, and "accuracy". A batch without pairs or images gives 0 for theirs.

    Raises:
        ValueError: The model has no adapter, or teacher features are missing.
    """
    config = state.config
    out = vlm.forward(batch, sorted({*state.layers, *state.student_layers}))
    result, _ = label_loss(vlm, batch, out, None)
    terms = report(result, totals)
    loss = share(result.loss, "tokens", len(result.per_token), totals)
    shares: Terms = {}
    if config.intervenes:
        shares |= _intervention(vlm, batch, out, state, totals)
    if config.weight("visual"):
        shares["visual"] = _distillation(vlm, batch, out, state, totals)
    for name, value in shares.items():
        loss = loss + config.weight(name) * value
        terms[name] = value.detach()
    return {"loss": loss, **terms}


def _intervention(
    vlm: VLM, batch: Batch, out: Forward, state: DeepAlignState, totals: Totals | None
) -> Terms:
    """The terms of sections 1.2 to 1.4 that push vision along the shift direction."""
    config = state.config
    rows, (vision, text) = pair_rows(vlm, batch)
    names = [name for name in ("global", "instance", "mutual") if config.weight(name)]
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    # A rank without pairs still takes part in the mean and in the exchange of negatives.
    if not len(rows) and not (ranks and totals is not None and totals["pairs"] > 0):
        return {name: out.hidden.sum() * 0.0 for name in names}
    with torch.no_grad(), disabled(vlm.model):
        h_v, h_t = representations(vlm, batch, state.layers, config.pool)
        instance = instance_direction(state.classifier, h_v, h_t)
        if vlm.model.training:
            state.direction.update(instance)
    shifted = pooled([out.layers[k][rows] for k in state.layers], vision[rows], config.pool)
    shares = {}
    for name, direction in (("global", state.direction.value), ("instance", instance)):
        if name in names:
            total = losses.shift_align(h_v, shifted, direction, kind=config.kind, reduction="sum")
            shares[name] = share(total, "pairs", len(rows), totals)
    if "mutual" in names:
        options: dict[str, Any] = {"estimator": config.estimator, "gather": ranks}
        if config.estimator == "infonce":
            options["temperature"] = config.temperature
        information = losses.mutual_information
        gain = information(shifted, h_t, **options) - information(h_v, h_t, **options)
        shares["mutual"] = share(-gain * len(rows), "pairs", len(rows), totals)
    return shares


@torch.no_grad()
def instance_direction(classifier: ModalityClassifier, h_v: Tensor, h_t: Tensor) -> Tensor:
    """Modality-specific text minus modality-specific vision, per pair, (m, d)."""
    text = ops.hadamard_reweight(h_t, classifier.channel_weights(h_t, TEXT))
    return text - ops.hadamard_reweight(h_v, classifier.channel_weights(h_v, VISION))


def _distillation(
    vlm: VLM, batch: Batch, out: Forward, state: DeepAlignState, totals: Totals | None
) -> Tensor:
    """Patch similarities of the teacher against those of the student, mean over its layers."""
    if batch.get("pixel_values") is None:
        return out.hidden.sum() * 0.0
    grid = vlm.patch_grid(batch)
    teacher = state.teacher_features(vlm, batch, grid)
    values = [
        losses.structure_distill(
            vlm.image_patches(out.layers[k], batch),
            teacher,
            negatives=state.config.negatives,
            reduction="sum",
        )
        for k in state.student_layers
    ]
    return share(torch.stack(values).mean(), "images", len(teacher), totals)


@dataclass
class ClassifierReport:
    """How well the modality classifier separates pairs it was not trained on."""

    accuracy: float
    train_pairs: int
    heldout_pairs: int
    warning: str | None = None


def fit_classifier(
    state: DeepAlignState, vlm: VLM, batches: Iterable[Batch], *, heldout: float = 0.2
) -> ClassifierReport:
    """Train the modality classifier on the base model's representations (appendix A).

    Text is class 0 and vision class 1. The last `heldout` of the pairs are kept for judging.

    Args:
        state: Its classifier is trained in place and left frozen.
        vlm: The model; an attached adapter is switched off for the passes.
        batches: Batches with image-text pairs.
        heldout: Fraction of the pairs.

    Returns:
        Held-out accuracy, with a warning below 0.9: the shift direction is then noise.

    Raises:
        ValueError: Fewer than 5 pairs.
    """
    config = state.config
    vectors = _collect(state, vlm, batches)
    pairs = vectors.shape[1]
    if pairs < 5:
        raise ValueError(f"the classifier needs at least 5 image-text pairs: got {pairs}")
    cut = pairs - max(1, round(heldout * pairs))
    labels = torch.arange(2, device=vectors.device)[:, None].expand(2, pairs)
    classifier = state.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.classifier_lr)
    for _ in range(config.classifier_steps):
        logits = classifier(vectors[:, :cut])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, :cut].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    classifier.requires_grad_(False)
    with torch.no_grad():
        hits = classifier(vectors[:, cut:]).argmax(-1) == labels[:, cut:]
    accuracy = float(hits.float().mean())
    warning = None
    if accuracy < 0.9:
        warning = (
            f"the modality classifier is right on {accuracy:.0%} of held-out pairs, below 90 %: "
            "its shift direction is mostly noise; give it more pairs, steps or layers"
        )
    return ClassifierReport(accuracy, cut, pairs - cut, warning)


@torch.no_grad()
def _collect(state: DeepAlignState, vlm: VLM, batches: Iterable[Batch]) -> Tensor:
    """Text and vision vectors of pairs, (2, pairs, d)."""
    text, vision, found = [], [], 0
    adapted = getattr(vlm.model, NAME, None) is not None
    for batch in batches:
        if adapted:
            with disabled(vlm.model):
                h_v, h_t = representations(vlm, batch, state.layers, state.config.pool)
        else:
            h_v, h_t = representations(vlm, batch, state.layers, state.config.pool)
        vision.append(h_v)
        text.append(h_t)
        found += len(h_v)
        if found >= state.config.classifier_pairs:
            break
    if not found:
        raise ValueError("the classifier needs image-text pairs: got none")
    return torch.stack([torch.cat(text), torch.cat(vision)])
