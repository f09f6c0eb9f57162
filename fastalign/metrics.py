"""Modality integration rate (MIR) and the Frechet distance beneath it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from fastalign.linalg import newton_schulz_nuclear_norm, trace_sqrtm_product
from fastalign.ops._check import check_floating, check_one_of, check_positive, check_same
from fastalign.reference import frechet as _ref
from fastalign.reference.psd import psd_factor, singular_value_sum

__all__ = ["ModalityIntegrationRate", "frechet_distance", "modality_integration_rate"]

_MODALITIES = ("vision", "text")
_METHODS = ("newton_schulz", "eigh", "official_fast")
_OUTLIERS = ("remove", "median", "keep")

_WARMUP = 1024  # rows before a running median and deviation are trusted
_SAMPLE = 4096  # rows of a layer and modality that give the median row of many


class _Moments(NamedTuple):
    mean: Tensor  # (d,) float64
    cov: Tensor  # (d, d) float64
    rank: int  # upper bound of the rank of cov: rows - 1, at most d


def frechet_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> Tensor:
    r"""Squared Frechet (2-Wasserstein) distance of Gaussians (Dowson and Landau 1982).

    $|\mu_x - \mu_y|^2 + \mathrm{Tr}(C_x + C_y - 2 (C_x C_y)^{1/2})$, computed in float64. At a
    singular covariance the gradient is that along its range: see
    `fastalign.linalg.trace_sqrtm_product`.

    Args:
        mean_x: (..., d), any floating dtype.
        cov_x: Symmetric positive semi-definite, (..., d, d).
        mean_y: The shape of `mean_x`.
        cov_y: The shape of `cov_x`.

    Returns:
        (...), at least 0, float32, or float64 for float64 input; NaN where a covariance is not
        semi-definite. Differentiable once in all four.

    Raises:
        TypeError: An argument is not of a floating-point dtype.
        ValueError: The shapes do not fit, or dtypes or devices differ.
    """
    check_floating(mean_x=mean_x, cov_x=cov_x, mean_y=mean_y, cov_y=cov_y)
    check_same(mean_x=mean_x, mean_y=mean_y)
    check_same(cov_x=cov_x, cov_y=cov_y)
    check_same("dtype", "device", mean_x=mean_x, cov_x=cov_x)
    if mean_x.dim() == 0 or cov_x.shape != (*mean_x.shape, mean_x.shape[-1]):
        raise ValueError(
            "cov_x must be (..., d, d) for mean_x (..., d): "
            f"got {tuple(cov_x.shape)} and {tuple(mean_x.shape)}"
        )
    mx, cx, my, cy = (t.double() for t in (mean_x, cov_x, mean_y, cov_y))
    distance = _ref.frechet_distance(mx, cx, my, cy, trace_sqrtm_product(cx, cy))
    return distance.clamp_min(0).to(torch.promote_types(mean_x.dtype, torch.float32))


class ModalityIntegrationRate(Metric):
    r"""Modality integration rate, $\log_{10} \sum_k \mathrm{FID}_k$ (Huang et al. 2025, eq. 3).

    For each layer k, both modalities are scaled by $1 / \mathrm{mean} |text|_2$ over all text rows;
    rows whose norm is further than three standard deviations from the median norm of their modality
    are outliers; $\mathrm{FID}_k$ is the Frechet distance of the rest, covariances over n - 1.

    One pass: a row whose norm is within two deviations of the running median joins the sums
    of its layer, in float64; the others, and the first 1,024, are held until the median of all
    norms is known, so the order and the grouping of the updates do not matter. Only when norms
    drift so far that an accepted row ends up an outlier does `compute` say so in a warning: then
    shuffle the samples. Memory is 16 d^2 bytes a layer, 8 bytes a row and layer for its norm, and
    the held rows (in text and images a few per cent). Ranks are joined by one all-reduce of the
    sums and a gather of the rest, in `compute`, which every rank must call.

    A NaN or inf in a row makes that layer's distance, and MIR, NaN, with a warning that names layer
    and modality. With fewer rows than dimensions the covariances are singular: the distance of the
    sample is still exact, but depends on the number of rows; a warning says so once.

    Args:
        num_layers: Number of layers of the language model that are given to `update`.
        dim: Their width d.
        method: "newton_schulz" is a polar iteration, matrix products only, with a relative error of
            the trace below 1e-5 on full-rank covariances; "eigh" decomposes in float64;
            "official_fast" puts $\mathrm{Tr}(S_v S_t)$ in place of the root, which is what the
            released code's fast mode computes. It is no distance, and may be negative (MIR NaN).
        outliers: "remove" as in the paper; "median" puts the per-dimension median row of all rows
            in their place, as the released code does, the median being taken over all rows up to
            8,192 a rank, and over 4,096 drawn at random beyond (MIR then changes by about 1e-5);
            "keep" keeps them.
        kwargs: Settings of `torchmetrics.Metric`, such as `process_group`.

    Raises:
        ValueError: A setting is not one of the above.

    Example:
        >>> metric = ModalityIntegrationRate(num_layers=2, dim=4)
        >>> metric.update([torch.randn(9, 4)] * 2, [torch.randn(7, 4)] * 2)
        >>> metric.compute(), metric.per_layer()  # scalar, (2,)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    gram: Tensor
    total: Tensor
    accepted: Tensor

    def __init__(
        self,
        num_layers: int,
        dim: int,
        *,
        method: Literal["newton_schulz", "eigh", "official_fast"] = "newton_schulz",
        outliers: Literal["remove", "median", "keep"] = "remove",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive("num_layers", num_layers)
        check_positive("dim", dim)
        check_one_of("method", method, _METHODS)
        check_one_of("outliers", outliers, _OUTLIERS)
        self.num_layers, self.dim = num_layers, dim
        self.method, self.outliers = method, outliers
        self._distances: Tensor | None = None
        self._warned_rank = False

        for name, shape in (("gram", (dim, dim)), ("total", (dim,)), ("accepted", ())):
            self.add_state(name, torch.zeros(2, num_layers, *shape, dtype=torch.float64), "sum")
        kinds = ("norms", "held", "sample", "key") if outliers == "median" else ("norms", "held")
        self._lists = {
            f"{kind}_{modality}_{layer}": (0, dim) if kind in ("held", "sample") else (0,)
            for kind in kinds
            for modality in _MODALITIES
            for layer in range(num_layers)
        }
        for name in self._lists:
            self.add_state(name, [], "cat")

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
        for name, layers in zip(_MODALITIES, (vision, text), strict=True):
            self._check(name, layers)
        for modality, layers in enumerate((vision, text)):
            for layer, rows in enumerate(layers):
                if rows.shape[0]:
                    self._add(modality, layer, rows.detach().to(self.gram.device, copy=True))

    def compute(self) -> Tensor:
        """MIR of all rows seen, a float64 scalar; -inf when the modalities coincide exactly.

        Raises:
            ValueError: A layer has fewer than two rows of one modality.
        """
        self._check_counts()
        with torch.no_grad():
            distances = [self._distance(layer) for layer in range(self.num_layers)]
        self._distances = torch.stack(distances)
        return self._distances.sum().log10()

    def per_layer(self) -> Tensor:
        """The Frechet distance of each layer, (num_layers,) float64; raises as `compute` does."""
        self.compute()
        assert self._distances is not None
        return self._distances.clone()

    def _check(self, name: str, layers: Sequence[Tensor]) -> None:
        if len(layers) != self.num_layers:
            raise ValueError(
                f"{name} must hold one tensor for each of {self.num_layers} layers: "
                f"got {len(layers)}"
            )
        for layer, rows in enumerate(layers):
            check_floating(**{f"{name}[{layer}]": rows})
            if rows.dim() != 2 or rows.shape[1] != self.dim:
                raise ValueError(
                    f"{name}[{layer}] must have the shape (tokens, {self.dim}): "
                    f"got {tuple(rows.shape)}"
                )

    def _state(self, kind: str, modality: int, layer: int) -> list[Tensor] | Tensor:
        state: list[Tensor] | Tensor = getattr(self, f"{kind}_{_MODALITIES[modality]}_{layer}")
        return state

    def _joined(self, kind: str, modality: int, layer: int) -> Tensor:
        """The list state as one tensor; after a synchronisation it is one already."""
        state = self._state(kind, modality, layer)
        name = f"{kind}_{_MODALITIES[modality]}_{layer}"
        if isinstance(state, list):
            state = torch.cat(state) if state else self.gram.new_zeros(self._lists[name])
        return state.to(self.gram.device)

    def _add(self, modality: int, layer: int, rows: Tensor) -> None:
        """Buffer rows (n, d); after every `_WARMUP` new ones, move those near the median on."""
        norms, held = self._state("norms", modality, layer), self._state("held", modality, layer)
        assert isinstance(norms, list) and isinstance(held, list)
        new_norms = _ref.row_norms(rows)
        if self.outliers == "median":
            self._subsample(modality, layer, rows, new_norms)
        if not norms:
            # Entry 0 is what earlier drains left; the entries after it are new.
            norms.append(self.gram.new_zeros(0))
            held.append(rows[:0])
        norms.append(new_norms)
        held.append(rows)
        if sum(len(new) for new in norms[1:]) < _WARMUP:
            return
        all_norms, waiting = torch.cat(norms), torch.cat(held)
        near = self._within(_ref.row_norms(waiting), all_norms, 2.0)
        sums = _ref.row_sums(waiting[near])
        for state, value in zip((self.total, self.gram, self.accepted), sums, strict=True):
            state[modality, layer] += value
        norms[:], held[:] = [all_norms], [waiting[~near]]

    def _subsample(self, modality: int, layer: int, rows: Tensor, new_norms: Tensor) -> None:
        """Keep the rows with the smallest keys, between `_SAMPLE` and twice as many of them."""
        samples, keys = self._state("sample", modality, layer), self._state("key", modality, layer)
        assert isinstance(samples, list) and isinstance(keys, list)
        samples.append(rows)
        keys.append(_ref.row_keys(new_norms))
        if sum(len(key) for key in keys) > 2 * _SAMPLE:
            key = torch.cat(keys)
            chosen = key.topk(_SAMPLE, largest=False).indices
            samples[:], keys[:] = [torch.cat(samples)[chosen]], [key[chosen]]

    def _within(self, norms: Tensor, reference: Tensor, sigmas: float) -> Tensor:
        if self.outliers == "keep":
            return torch.ones_like(norms, dtype=torch.bool)
        return _ref.within_sigma(norms, reference, sigmas)

    def _check_counts(self) -> None:
        for layer in range(self.num_layers):
            for modality, name in enumerate(_MODALITIES):
                count = len(self._joined("norms", modality, layer))
                if count < 2:
                    raise ValueError(
                        f"{name} must have at least 2 rows in layer {layer} for a covariance: "
                        f"got {count}; call update with samples that hold {name} tokens first"
                    )

    def _distance(self, layer: int) -> Tensor:
        norms = [self._joined("norms", modality, layer) for modality in range(2)]
        for values, name in zip(norms, _MODALITIES, strict=True):
            broken = int((~values.isfinite()).sum())
            if broken:
                _warn(f"MIR is NaN: {broken} {name} row(s) of layer {layer} hold NaN or inf")
                return self.gram.new_full((), torch.nan)
        if not bool(norms[1].any()):
            _warn(f"MIR is NaN: every text row of layer {layer} is zero, and sets the scale")
            return self.gram.new_full((), torch.nan)
        scale = norms[1].mean().reciprocal()
        x, y = (self._moments(modality, layer, norms[modality], scale) for modality in range(2))
        trace = self._trace_root(x, y)
        distance = _ref.frechet_distance(x.mean, x.cov, y.mean, y.cov, trace)
        return distance if self.method == "official_fast" else distance.clamp_min(0)

    def _moments(self, modality: int, layer: int, norms: Tensor, scale: Tensor) -> _Moments:
        held = self._joined("held", modality, layer)
        inside = self._within(_ref.row_norms(held), norms, 3.0)
        sums = _ref.row_sums(held[inside])
        total, gram, count = (
            state[modality, layer] + value
            for state, value in zip((self.total, self.gram, self.accepted), sums, strict=True)
        )
        mistaken = int((~self._within(norms, norms, 3.0)).sum() - (~inside).sum())
        if mistaken:
            _warn(
                f"{mistaken} of {len(norms)} {_MODALITIES[modality]} rows of layer {layer} were "
                "accepted before norms drifted and are outliers now: shuffle the samples"
            )
        mean, cov = _ref.moments(total, gram, count, scale)
        removed = len(norms) - count
        if self.outliers == "median" and bool(removed > 0):
            row = scale * self._median_row(modality, layer, len(norms))
            mean, cov = _ref.add_replaced_rows(mean, cov, count, row, removed)
            count = count + 1
        rank = min(self.dim, int(count) - 1)
        if rank < self.dim and not self._warned_rank:
            self._warned_rank = True
            _warn(
                f"{int(count)} {_MODALITIES[modality]} rows in layer {layer} for {self.dim} "
                "dimensions: the covariance is singular and MIR depends on the number of rows; "
                f"give more than {self.dim} rows for a value that compares with others"
            )
        return _Moments(mean, cov, rank)

    def _median_row(self, modality: int, layer: int, count: int) -> Tensor:
        """Median of each dimension over the `count` rows seen, or over a sample of them."""
        sample = self._joined("sample", modality, layer)
        if len(sample) < count:
            key = self._joined("key", modality, layer)
            sample = sample[key.topk(min(_SAMPLE, len(key)), largest=False).indices]
        return sample.double().median(dim=0).values

    def _trace_root(self, x: _Moments, y: _Moments) -> Tensor:
        if self.method == "official_fast":
            return _ref.official_fast_trace(x.cov, y.cov)
        factors = None
        if self.method == "newton_schulz" and x.rank == y.rank == self.dim:
            factors = _ref.ordered_cholesky(x.cov, y.cov)
        if factors is None:
            factors = psd_factor(x.cov, x.rank), psd_factor(y.cov, y.rank)
        product = factors[0].mT @ factors[1]
        if self.method == "newton_schulz":
            return newton_schulz_nuclear_norm(product)
        return singular_value_sum(product)

    def _sync_dist(self, dist_sync_fn: Any = gather_all_tensors, process_group: Any = None) -> None:
        """Join the ranks; the sums by an all-reduce, where a gather would hold every rank's."""
        for name in self._lists:
            # One dtype and rank of tensor everywhere, on a rank without rows too.
            kind, modality, layer = name.split("_")
            joined = self._joined(kind, _MODALITIES.index(modality), int(layer))
            setattr(self, name, [joined.double()])
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
            return
        for state in (self.gram, self.total, self.accepted):
            torch.distributed.all_reduce(state, group=process_group or self.process_group)
        reductions = self._reductions
        self._reductions = {name: reductions[name] for name in self._lists}
        try:
            super()._sync_dist(dist_sync_fn, process_group)
        finally:
            self._reductions = reductions


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
