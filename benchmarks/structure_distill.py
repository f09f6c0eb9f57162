"""structure_distill against the Gram loss in plain torch and the products that it must do."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastalign as fa
from benchmarks import Benchmark, Function, Inputs, Peer, Run
from fastalign.ops.structure_distill import StructureDistillPortable, compute


def distill(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return fa.losses.structure_distill(student, teacher, cu_seqlens=cu_seqlens)


def portable(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return compute(StructureDistillPortable, student, teacher, cu_seqlens)


def each_image(
    loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Mean of `loss`, a mean over dense images, over packed images that have patches."""
    if cu_seqlens is None:
        return loss(student, teacher)
    lengths = cu_seqlens.diff().tolist()
    images = zip(student.split(lengths), teacher.split(lengths), strict=True)
    return torch.stack([loss(h[None], g[None]) for h, g in images if len(h)]).mean()


def gram_loss(
    student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """Mean squared difference of the two Gram matrices of unit rows.

    Args:
        student: (b, n, d), or packed (sum n, d).
        teacher: (b, n, dt), or packed (sum n, dt).
        cu_seqlens: Offsets of packed images, (b + 1,), read on the host; None when dense.
        dtype: Of everything; None is float32, or that of wider inputs.
    """

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        wide = dtype or torch.promote_types(student.dtype, torch.float32)
        h, g = (F.normalize(x.to(wide), dim=-1) for x in (student, teacher))
        return F.mse_loss(h @ h.mT, g @ g.mT)

    return each_image(loss, student, teacher, cu_seqlens)


def dinov3() -> Function:
    """DINOv3's own loss, with the similarities as they are."""
    from dinov3.loss.gram_loss import GramLoss

    return partial(each_image, GramLoss(apply_norm=True, remove_neg=False))


def products(n: int, d: int, dt: int) -> list[tuple[int, int, int]]:
    """Sizes (m, k, p) of the products (m, k) x (k, p) that one image at least costs.

    Over the patches: the upper triangles of both Gram matrices, n^2 (d + dt) FLOPs (a multiply-add
    is 2), as one product of half the inner size, (n, (d + dt) / 2) x ((d + dt) / 2, n); and the
    gradient, (n, n) x (n, d). Together n^2 (3 d + dt).

    Where n > c = d + dt it takes less over the features, with |H^T H|^2 + |G^T G|^2 - 2 |G^T H|^2:
    the upper triangles of the three are those of [H G]^T [H G], n c^2 FLOPs, as one product
    (c, n / 2) x (n / 2, c); and the gradient, (n, c) x (c, d). Together n c (3 d + dt).

    Odd sizes are halved downwards. Norms, element-wise work and memory traffic count nothing.
    """
    c = d + dt
    if n <= c:
        return [(n, c // 2, n), (n, n, d)]
    return [(c, n // 2, c), (n, c, d)]


def bound(inputs: Inputs) -> Run:
    """The products of every image, in the dtype of the student.

    Dense images are multiplied in one batch, packed ones in turn. A CPU that multiplies bfloat16
    slower than float32 can beat it.
    """
    student, teacher, cu_seqlens = inputs
    d, dt = student.shape[-1], teacher.shape[-1]
    if cu_seqlens is None:
        groups = [student.shape[:2]]
    else:
        groups = [(1, n) for n in cu_seqlens.diff().tolist()]
    like = {"dtype": student.dtype, "device": student.device}
    operands = [
        (torch.randn(b, m, k, **like), torch.randn(b, k, p, **like), torch.empty(b, m, p, **like))
        for b, n in groups
        for m, k, p in products(n, d, dt)
    ]

    def run() -> None:
        for x, y, out in operands:
            torch.bmm(x, y, out=out)

    return run


BENCHMARK = Benchmark(
    op="structure_distill",
    fastalign=distill,
    eager=gram_loss,
    bound=bound,
    bfloat16=partial(gram_loss, dtype=torch.bfloat16),
    peers={"dinov3": Peer("dinov3", dinov3)},
    differentiate=(0,),
    portable=portable,
)
