"""DeepAlign: the joint loss, its settings, and what it carries from step to step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastalign.models import VLM, Batch
from fastalign.nn import ModalityClassifier, ShiftDirection
from fastalign.objectives._distillation import distillation
from fastalign.objectives._intervention import intervention
from fastalign.objectives._negatives import MutualShare
from fastalign.objectives._terms import Terms, Totals, anchored, label_loss, report, share


@dataclass(frozen=True)
class DeepAlignConfig:
    """The joint loss of DeepAlign and how its representations are taken.

    Attributes:
        alpha, beta, gamma, mu: Weights of the global, instance, mutual-information and distillation
            terms (appendix A: 1.0 each).
        without: Terms switched off, as in the paper's ablation: "intervention" (global, instance
            and mutual together), "distillation", "global", "instance", "mutual".
        layers: Decoder layers whose states are averaged for the classifier and the directions; the
            first fifth of the decoder when empty. Each step needs them of the base model too, and
            that pass ends after the deepest: all layers would add nearly half of a step with a
            frozen base, the first fifth a fraction of that.
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
        teacher: (batch) -> features of the views (see `VLM.views`), when the batch does not hold
            them as `teacher`: (views, n, C) on a square grid, (views, h, w, C), or a list of
            (h, w, C).
    """

    def __init__(
        self,
        vlm: VLM,
        config: DeepAlignConfig | None = None,
        teacher: Callable[[Batch], Tensor | list[Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config or DeepAlignConfig()
        self.layers = self.config.layers or tuple(range(1, max(1, vlm.num_layers // 5) + 1))
        self.student_layers = self.config.student_layers or (max(1, vlm.num_layers // 2),)
        self.classifier = ModalityClassifier(vlm.hidden_size, self.config.classifier_hidden_dims)
        self.classifier.requires_grad_(False)
        self.direction = ShiftDirection(vlm.hidden_size)
        weight = vlm.head.weight
        self.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        # Not a submodule: a frozen teacher is no part of the checkpoint.
        self._teacher = [teacher]


def deepalign(
    vlm: VLM,
    batch: Batch,
    *,
    state: DeepAlignState,
    totals: Totals | None = None,
    mutual: MutualShare | None = None,
) -> Terms:
    r"""DeepAlign's joint loss (CVPR 2026), for a model with an attached adapter.

    $L = L_{AR} + \alpha L_{global} + \beta L_{instance} + \gamma L_{MI} + \mu L_{visual}$. The base
    model's own representations come from a second pass, up to the deepest of `state.layers`, with
    the adapter switched off and in evaluation mode.

    Args:
        vlm: The model, with an adapter.
        batch: See `VLM`; with `labels`, and `teacher` features unless the state has a teacher.
        state: A fitted `DeepAlignState`. Its global direction is that of all pairs before this
            step; in training mode the pairs of the step are taken in.
        totals: See the module.
        mutual: What `mutual_shares` gave for this micro-batch, in a step of several. Without it the
            pairs of the micro-batch, over all ranks, are the only negatives.

    Returns:
        "loss", its unweighted terms "ce", "global", "instance", "mutual" and "visual" as far as
        they are switched on, "accuracy", and with any of the first three "cos_global" and
        "cos_instance", the mean cosine of the displacement with each direction. A batch without
        pairs or images gives 0 for theirs.

    Raises:
        ValueError: The model has no adapter, or teacher features are missing; or `mutual` comes
            without `totals`.
    """
    config = state.config
    if mutual is not None:
        if totals is None:
            raise ValueError(
                "totals must be those of the step with mutual, which is a share of it: got None"
            )
        if not torch.compiler.is_compiling():
            torch.manual_seed(mutual.seed)
    out = vlm.forward(batch, sorted({*state.layers, *state.student_layers}), labels_only=True)
    result, _ = label_loss(vlm, batch, out, None)
    terms = report(result, totals)
    loss = share(result.loss, "tokens", len(result.per_token), totals)
    shares: Terms = {}
    logs: Terms = {}
    if config.intervenes:
        shares, logs = intervention(vlm, batch, out, state, totals, mutual)
    if config.weight("visual"):
        shares["visual"] = distillation(vlm, batch, out, state, totals)
    for name, value in shares.items():
        loss = loss + config.weight(name) * value
        terms[name] = value.detach()
    return {"loss": anchored(loss, vlm), **terms, **logs}
