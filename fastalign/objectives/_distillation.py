"""DeepAlign's structure-induced distillation: the teacher's patches against the student's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign import losses
from fastalign.models import VLM, Batch, Forward
from fastalign.objectives._terms import Totals, share

if TYPE_CHECKING:
    from fastalign.objectives._deepalign import DeepAlignState

Grid = tuple[int, int]


def distillation(
    vlm: VLM, batch: Batch, out: Forward, state: DeepAlignState, totals: Totals | None
) -> Tensor:
    """Patch similarities of the teacher against those of the student, mean over its layers.

    The student of a view is its image tokens at a layer, the teacher its features brought to their
    grid. The queries of a Q-Former have no grid: the teacher of a query is the mean of the patches
    that it looks at, weighted by the Q-Former's last attention.
    """
    if batch.get("pixel_values") is None:
        return out.hidden.sum() * 0.0
    if out.looks is None:
        patches = vlm.patches(batch)
        teacher = _on_grids(_teacher_maps(state, batch, patches.grids), patches.grids)
    else:
        patches = vlm.queries(batch)
        grids = (vlm.tower_grid,) * len(patches.grids)
        teacher = _seen_by(out.looks, _on_grids(_teacher_maps(state, batch, grids), grids))
    views, lengths = len(patches.grids), patches.lengths
    teacher = teacher.to(patches.places.device)
    same = len(set(lengths)) == 1
    options: dict[str, Any] = {"negatives": state.config.negatives, "reduction": "sum"}
    if same:
        teacher = teacher.view(views, lengths[0], -1)
    else:
        options |= {"cu_seqlens": patches.cu_seqlens, "max_seqlen": max(lengths)}
    values = []
    for k in state.student_layers:
        student = patches.of(out.layers[k])
        if same:
            student = student.view(views, lengths[0], -1)
        values.append(losses.structure_distill(student, teacher, **options))
    return share(torch.stack(values).mean(), "images", views, totals)


def _teacher_maps(
    state: DeepAlignState, batch: Batch, grids: Sequence[Grid]
) -> Tensor | list[Tensor]:
    """The teacher's features of each view, (views, h, w, C) or a list of (h, w, C).

    Raises:
        ValueError: There is no teacher, or its features are not those of the batch's views.
    """
    features = batch.get("teacher")
    if features is None and state._teacher[0] is not None:
        with torch.no_grad():
            features = state._teacher[0](batch)
    if features is None:
        raise ValueError(
            "distillation needs teacher features: give DeepAlignState a teacher, put them into "
            'the batch as "teacher" (images, n, C), or switch it off with '
            'without=("distillation",)'
        )
    if len(features) != len(grids):
        raise ValueError(
            f"the teacher must give features of each of the {len(grids)} views of the batch (see "
            f"VLM.views): got {len(features)}"
        )
    if not isinstance(features, Tensor):
        return list(features)
    if features.dim() == 4:
        maps: Tensor = features
        return maps
    n = features.shape[1]
    fits = len(set(grids)) == 1 and n == grids[0][0] * grids[0][1]
    side = batch.get("teacher_grid", grids[0] if fits else (round(n**0.5),) * 2)
    if side[0] * side[1] != n:
        raise ValueError(
            f"teacher features (views, n, C) must have a square grid, or batch[teacher_grid]: got "
            f"n = {n}; give them as (views, h, w, C)"
        )
    found: Tensor = features.view(len(features), *side, -1)
    return found


def _on_grids(maps: Tensor | list[Tensor], grids: Sequence[Grid]) -> Tensor:
    """Feature maps of the views brought to the student's grids, (sum n, C)."""
    if isinstance(maps, Tensor) and len(set(grids)) == 1:
        source = (maps.shape[1], maps.shape[2])
        return losses.resample_grid(maps.flatten(1, 2), source, grids[0]).flatten(0, 1)
    rows = []
    for features, grid in zip(maps, grids, strict=True):
        source = (features.shape[0], features.shape[1])
        rows.append(losses.resample_grid(features.flatten(0, 1)[None], source, grid)[0])
    return torch.cat(rows)


def _seen_by(looks: Tensor, patches: Tensor) -> Tensor:
    """The mean of the patches that each query looks at, (images * queries, C).

    Args:
        looks: (images, queries, tokens of the tower), those before the patches (CLS) first.
        patches: (images * n, C).
    """
    features = patches.view(len(looks), -1, patches.shape[-1])
    weights = looks[:, :, looks.shape[2] - features.shape[1] :]
    weights = weights / weights.sum(2, keepdim=True)
    seen = weights.to(features.device) @ features.float()
    return seen.flatten(0, 1).to(patches.dtype)
