"""The similarity of patches, in a student and in its teacher."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastalign.diagnostics._figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class PatchSimilarity(NamedTuple):
    """Cosines of all pairs of patches, (n, n) float32, and how far the two sets of them agree."""

    student: Tensor
    teacher: Tensor
    correlation: float


def patch_similarity(student: Tensor, teacher: Tensor) -> PatchSimilarity:
    """Cosines between all patches of one image, in the student and in the teacher.

    Args:
        student: Patch features, (n, d), any floating dtype.
        teacher: Patch features of the same patches, (n, dt).

    Returns:
        Both matrices, and the Pearson correlation between their entries off the diagonal; it is
        NaN where one of them is constant. A zero row has similarity 0 with everything.

    Raises:
        ValueError: They are no matrices with the same number of rows, at least 3.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 3:
        raise ValueError(
            "student and teacher must be (n, d) and (n, dt) with the same n >= 3: got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    rows = [torch.nn.functional.normalize(x.detach().double(), dim=1) for x in (student, teacher)]
    first, second = (x @ x.T for x in rows)
    above = torch.ones_like(first, dtype=torch.bool).triu(1)
    pairs = torch.stack([first[above], second.to(first.device)[above]])
    pairs = pairs - pairs.mean(1, keepdim=True)
    norms = pairs.norm(dim=1)
    # Rounding leaves a constant matrix with a spread near 1e-16, which correlates with anything.
    flat = bool((norms <= 1e-12 * pairs.shape[1] ** 0.5).any())
    correlation = math.nan if flat else float(pairs[0] @ pairs[1] / norms.prod())
    return PatchSimilarity(first.float().cpu(), second.float().cpu(), correlation)


def plot_patch_similarity(
    before: PatchSimilarity,
    after: PatchSimilarity | None = None,
    *,
    grid: tuple[int, int],
    query: tuple[int, int] | None = None,
) -> Figure:
    """Teacher and student side by side: one patch against all (above), and all pairs (below).

    Each panel has its own colour range, from the 1st to the 99th percentile off the diagonal, as
    the correlation in the titles does not depend on it either.

    Args:
        before: The student before alignment, with its teacher.
        after: The student after it, shown beside it.
        grid: Rows and columns of patches.
        query: Row and column of the patch above; the middle one by default.

    Raises:
        ValueError: `grid` has another number of patches, or `query` lies outside it.
    """
    height, width = grid
    if height * width != len(before.student):
        raise ValueError(
            f"grid must have one place for each of {len(before.student)} patches: got {grid}"
        )
    row, column = (height // 2, width // 2) if query is None else query
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"query must lie in the {height} x {width} grid: got {query}")
    panels = [("teacher", before.teacher), _panel("student before", before)]
    if after is None:
        panels[1] = _panel("student", before)
    else:
        panels.append(_panel("student after", after))
    figure = new_figure(3.3 * len(panels), 6.2)
    for i, (name, cosines) in enumerate(panels):
        off = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
        low, high = (float(torch.quantile(off[: 2**24], q)) for q in (0.01, 0.99))
        whole = (("patch", cosines), ("map", cosines[row * width + column].view(height, width)))
        for kind, values in whole:
            axes = figure.add_subplot(
                2, len(panels), i + 1 + (len(panels) if kind == "patch" else 0)
            )
            image = axes.imshow(values.numpy(), cmap="cividis", vmin=low, vmax=high)
            figure.colorbar(image, ax=axes, shrink=0.8, label="cosine")
            if kind == "map":
                axes.plot(
                    column, row, marker="s", color="white", markerfacecolor="none", ms=9, mew=2
                )
                axes.set_title(name)
                axes.set_xlabel("patch column")
                axes.set_ylabel("patch row")
            else:
                axes.set_xlabel("patch")
                axes.set_ylabel("patch")
    figure.suptitle(f"Cosine to patch ({row}, {column}), marked, and of all pairs of patches")
    return figure


def _panel(name: str, similarity: PatchSimilarity) -> tuple[str, Tensor]:
    return f"{name}\n(correlation {similarity.correlation:.3f})", similarity.student
