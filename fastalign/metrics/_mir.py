"""The modality integration rate as a metric that streams."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from fastalign.metrics._join import Join
from fastalign.metrics._ranks import Ranks
from fastalign.metrics._stream import MODALITIES, Stream, joined, memory_bound, sum_dtype
from fastalign.ops._autocast import no_autocast
from fastalign.ops._check import check_floating, check_one_of, check_positive

Method = Literal["newton_schulz", "eigh", "official_fast"]
Outliers = Literal["remove", "median", "keep"]

_OF_ROWS = ("norms", "held", "dropped", "sample", "key")  # a modality of a layer
_OF_SUMS = ("moments", "scatter")  # a layer


class ModalityIntegrationRate(Metric):
    r"""Modality integration rate, $\log_{10} \sum_k \mathrm{FID}_k$ (Huang et al. 2025, eq. 3).

    For each layer k, both modalities are scaled by $1 / \mathrm{mean} |text|_2$ over all text rows;
    rows whose norm is further than three standard deviations from the median norm of their modality
    are outliers; $\mathrm{FID}_k$ is the Frechet distance of the rest, covariances over n - 1.

    One pass: a row whose norm is within two deviations of the running median joins the sums of its
    layer; the others, and the first 1,024, are held until the median of all norms is known, so the
    order and the grouping of the updates do not matter. Of more than 1,024 doubtful rows those
    nearest to three deviations stay; the others are settled. Only when norms drift so far that a
    row was judged wrongly does `compute` say so in a warning: then shuffle the samples.

    A layer takes memory with its first rows: up to d rows of a modality are kept, beyond that the
    Gram matrices of both, 4 d (d + 1) bytes a layer (8 d (d + 1) up to d = 1,024), and up to 3,072
    rows, or 2,048 of float32. `memory_bound` says how much that is: for 32 layers of 4,096 in half
    precision 4.1 GB, or 4.5 GB with "median", which keeps a sample of rows.

    Ranks may each see any samples, or any layers: a stage of a pipeline calls `update_layer` for
    its own. `compute`, which every rank must call, gathers norms, sums each layer at one rank, and
    finishes as many layers at a time as there are ranks. No rank holds more than its own state and
    one layer.

    A NaN or inf in a row makes that layer's distance, and MIR, NaN, with a warning that names layer
    and modality. With fewer rows than dimensions the covariances are singular: the distance of the
    sample is still exact, but depends on the number of rows; a warning says so once.

    Args:
        num_layers: Number of layers of the language model that are given to `update`.
        dim: Their width d.
        method: "newton_schulz" is, on a GPU, a polar iteration in float16 products, with a relative
            error of the trace of at most 2e-5 on full-rank covariances; on a CPU, where they are
            faster, it takes decompositions too. "eigh" decomposes in float64 everywhere;
            "official_fast" puts $\mathrm{Tr}(S_v S_t)$ in place of the root, which is what the
            released code's fast mode computes. It is no distance, and may be negative (MIR NaN).
        outliers: "remove" as in the paper; "median" puts the per-dimension median row of all rows
            in their place, as the released code does; beyond 4,096 rows (1,024 where d is 4,096 or
            more) the median of a random sample of so many, which moves MIR by about 1e-5; "keep"
            keeps them.
        kwargs: Settings of `torchmetrics.Metric`, such as `process_group`.

    Raises:
        ValueError: A setting is not one of the above.

    Examples:
        >>> metric = ModalityIntegrationRate(num_layers=2, dim=4)
        >>> metric.update([torch.randn(9, 4)] * 2, [torch.randn(7, 4)] * 2)
        >>> metric.compute(), metric.per_layer()  # scalar, (2,)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        num_layers: int,
        dim: int,
        *,
        method: Method = "newton_schulz",
        outliers: Outliers = "remove",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive("num_layers", num_layers)
        check_positive("dim", dim)
        check_one_of("method", method, get_args(Method))
        check_one_of("outliers", outliers, get_args(Outliers))
        if self.compute_on_cpu:
            raise ValueError(
                "compute_on_cpu must be False: put the metric on the CPU, update takes any device"
            )
        self.num_layers, self.dim = num_layers, dim
        self.method: Method = method
        self.outliers: Outliers = outliers
        self._distances: Tensor | None = None
        self._warned_rank = False
        self._shares = False
        self._ranks: Ranks | None = None
        for layer in range(num_layers):
            names = [f"{kind}_{name}_{layer}" for kind in _OF_ROWS for name in MODALITIES]
            for name in [*names, *(f"{kind}_{layer}" for kind in _OF_SUMS)]:
                self.add_state(name, [], "cat")

    @property
    def accepted(self) -> Tensor:
        """Number of rows in the sums of this process, (2, num_layers) float64."""
        counts = torch.zeros(2, self.num_layers, dtype=torch.float64, device=self.device)
        for layer in range(self.num_layers):
            for part in getattr(self, f"moments_{layer}"):
                counts[:, layer] += part[..., -1].reshape(-1, 2).sum(0)
        return counts

    def memory_bound(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the states between updates at most, but for the norms: 8 a row and layer.

        Args:
            dtype: Of the hidden states.
        """
        return memory_bound(self.num_layers, self.dim, dtype, self.outliers)

    def update(self, vision: Sequence[Tensor], text: Sequence[Tensor]) -> None:
        """Add the hidden states of some samples.

        Args:
            vision: One tensor a layer, (tokens, dim), any floating dtype and device; the number of
                tokens may be 0 and may differ between layers. Rows are copied, never written.
            text: The same for text tokens.

        Raises:
            TypeError: A layer is not a tensor of a floating-point dtype.
            ValueError: The number of layers or the shape of one is wrong; nothing is added then.
        """
        for name, layers in zip(MODALITIES, (vision, text), strict=True):
            if len(layers) != self.num_layers:
                raise ValueError(
                    f"{name} must hold one tensor for each of {self.num_layers} layers: "
                    f"got {len(layers)}"
                )
            for layer, rows in enumerate(layers):
                self._check_rows(f"{name}[{layer}]", rows)
        for modality, layers in enumerate((vision, text)):
            for layer, rows in enumerate(layers):
                self._add(modality, layer, rows)

    def update_layer(self, layer: int, vision: Tensor, text: Tensor) -> None:
        """Add the hidden states of one layer, for example from a hook while a model runs.

        Args:
            layer: From 0 to num_layers - 1.
            vision: (tokens, dim), as in `update`.
            text: The same for text tokens.

        Raises:
            TypeError: An argument is not a tensor of a floating-point dtype.
            ValueError: The layer does not exist or a shape is wrong; nothing is added then.
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must lie in 0..{self.num_layers - 1}: got {layer}")
        self._check_rows("vision", vision)
        self._check_rows("text", text)
        if self._is_synced:
            raise RuntimeError("the metric is synchronised: call unsync before update_layer")
        self._computed = None
        self._update_count += 1
        for modality, rows in enumerate((vision, text)):
            self._add(modality, layer, rows)

    def compute(self) -> Tensor:
        """MIR of all rows seen, a float64 scalar; -inf when the modalities coincide exactly.

        Raises:
            ValueError: A layer has fewer than two rows of one modality.
        """
        ranks = self._ranks if self._is_synced else None
        layers = [(self._stream(0, k), self._stream(1, k)) for k in range(self.num_layers)]
        with torch.inference_mode(False), torch.no_grad(), self._full_precision():
            try:
                join = Join(
                    layers,
                    self.dim,
                    self.device,
                    ranks or Ranks(alone=True),
                    self.method,
                    self.outliers,
                )
            except ValueError:  # on every rank; more rows may follow
                if self._is_synced:
                    self.unsync()
                raise
            self._distances = join.distances()
        for message in join.warnings:
            _warn(message)
        if join.low_rank and not self._warned_rank:
            self._warned_rank = True
            _warn(join.low_rank[0])
        return self._distances.sum().log10()

    def per_layer(self) -> Tensor:
        """The Frechet distance of each layer, (num_layers,) float64; raises as `compute` does."""
        self.compute()
        assert self._distances is not None
        return self._distances.clone()

    def joined_with(self, *others: ModalityIntegrationRate) -> ModalityIntegrationRate:
        """A metric of the rows of this one and of others, for `compute` only.

        Its states are those of the others, not copies, and it takes no memory of its own.

        Args:
            others: Metrics with the layers, the width and the rule for outliers of this one.

        Raises:
            ValueError: They differ in these.
        """
        settings = [(m.num_layers, m.dim, m.outliers) for m in (self, *others)]
        if len(set(settings)) > 1:
            raise ValueError(f"metrics must agree in (num_layers, dim, outliers): got {settings}")
        whole = ModalityIntegrationRate(
            self.num_layers,
            self.dim,
            method=self.method,
            outliers=self.outliers,
            process_group=self.process_group,
            sync_on_compute=self.sync_on_compute,
        ).to(self.device)
        for metric in (self, *others):
            whole._reduce_states(metric._copy_state_dict())
            whole._update_count += metric._update_count
        whole._shares = True
        return whole

    def _check_rows(self, name: str, rows: Tensor) -> None:
        check_floating(**{name: rows})
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(
                f"{name} must have the shape (tokens, {self.dim}): got {tuple(rows.shape)}"
            )

    def _stream(self, modality: int, layer: int) -> Stream:
        rows = {kind: getattr(self, f"{kind}_{MODALITIES[modality]}_{layer}") for kind in _OF_ROWS}
        sums = {kind: getattr(self, f"{kind}_{layer}") for kind in _OF_SUMS}
        return Stream(modality, self.outliers, **rows, **sums)

    def _add(self, modality: int, layer: int, rows: Tensor) -> None:
        if self._shares:
            raise RuntimeError("a metric of joined_with takes no rows: update what it is made of")
        if rows.shape[0] == 0:
            return
        # Sums that began under inference mode could not grow outside of it.
        with torch.inference_mode(False), torch.no_grad(), self._full_precision():
            copy = rows.detach().to(self.device, copy=True)
            self._stream(modality, layer).add(copy)

    def _full_precision(self) -> Any:
        return no_autocast(torch.empty(0, device=self.device))

    # How torchmetrics joins and restores states

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        """Let `compute` join the ranks; a gather of the caller's own gathers the states instead."""
        if dist_sync_fn is gather_all_tensors:
            self._ranks = Ranks(process_group or self.process_group)
            return
        for name in self._reductions:
            # One dtype and rank of tensor everywhere, on a rank without rows too.
            kind = name.split("_")[0]
            shape = {
                "held": (0, self.dim),
                "sample": (0, self.dim),
                "moments": (0, 2, 2 * self.dim + 1),
                "scatter": (0, self.dim + 1, self.dim),
            }
            dtype = sum_dtype(self.dim) if kind == "scatter" else torch.float64
            none = torch.zeros(shape.get(kind, (0,)), dtype=dtype, device=self.device)
            setattr(self, name, [joined(getattr(self, name), none).to(dtype)])
        self._ranks = Ranks(alone=True)
        super()._sync_dist(dist_sync_fn, process_group)

    def unsync(self, should_unsync: bool = True) -> None:
        """See `torchmetrics.Metric`."""
        super().unsync(should_unsync)
        if not self._is_synced:
            self._ranks = None

    def _copy_state_dict(self) -> dict[str, Any]:
        """Lists of the same tensors: none is written while such a copy lives."""
        return {name: list(getattr(self, name)) for name in self._defaults}

    def merge_state(self, incoming_state: Any) -> None:
        """See `torchmetrics.Metric`; the tensors of the other state are copied."""
        if isinstance(incoming_state, ModalityIntegrationRate):
            state = incoming_state.metric_state
            incoming_state = {k: [part.clone() for part in v] for k, v in state.items()}
        super().merge_state(incoming_state)


def modality_integration_rate(
    vision: Sequence[Tensor], text: Sequence[Tensor], **options: Any
) -> Tensor:
    """MIR of hidden states that are all at hand, a float64 scalar; of this process alone.

    Args:
        vision: One tensor a layer, (tokens, d), any floating dtype.
        text: The same for text tokens.
        options: `method` and `outliers` of `ModalityIntegrationRate`.

    Raises:
        TypeError: A layer is not a tensor of a floating-point dtype.
        ValueError: The shapes do not fit, or a layer has fewer than two rows of one modality.
    """
    if len(vision) == 0:
        raise ValueError("vision must hold one tensor for each layer: got no layer")
    check_floating(**{"vision[0]": vision[0]})
    dim = vision[0].shape[-1] if vision[0].dim() else 0
    options = {"sync_on_compute": False, **options}
    metric = ModalityIntegrationRate(len(vision), dim, **options).to(vision[0].device)
    metric.update(vision, text)
    mir: Tensor = metric.compute()
    return mir


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=2)
