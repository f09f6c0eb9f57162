"""Hidden states dealt to ranks, and one rank that measures them.

_mir_ranks.py FOLDER RANK WORLD
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastalign.metrics import ModalityIntegrationRate, _stream

OUTLIERS = ["remove", "median", "keep"]
LAYERS, DIM = 3, 6
# Name: rows of vision and text, and width. The last has fewer inliers than dimensions.
CASES = {"many": ((5000, 5200), DIM), "few": ((30, 37), 40), "mixed": ((1500, 33), 40)}

States = tuple[list[Tensor], list[Tensor]]


def hidden_states(layers: int, rows: tuple[int, int], d: int) -> States:
    """Correlated rows with means apart, and one row in a hundred at eight times the norm."""
    modalities = []
    for shift, n in zip((0.5, -0.25), rows, strict=True):
        x = [torch.randn(n, d) @ torch.randn(d, d) / d**0.5 + shift for _ in range(layers)]
        for layer in x:
            layer[:: max(n // 3, 100)] *= 8
        modalities.append(x)
    return modalities[0], modalities[1]


def shares(world: int, case: str) -> list[States]:
    """What each rank sees: uneven parts, the second's vision in bfloat16.

    The last rank sees no vision in layer 1, and, of four ranks, nothing at all.
    """
    torch.manual_seed(3)
    rows, dim = CASES[case]
    vision, text = hidden_states(LAYERS, rows, dim)
    cuts = {2: ((0.9, 1.0), (0.3, 1.0)), 4: ((0.5, 0.55, 1.0, 1.0), (0.2, 0.6, 1.0, 1.0))}[world]
    dealt: list[States] = []
    for rank in range(world):
        pair = []
        for part, layers in zip(cuts, (vision, text), strict=True):
            ends = [0, *(int(share * len(layers[0])) for share in part)]
            pair.append([x[ends[rank] : ends[rank + 1]] for x in layers])
        dealt.append((pair[0], pair[1]))
    dealt[1] = ([x.bfloat16() for x in dealt[1][0]], dealt[1][1])
    if world == 2:
        empty = dealt[1][0][1]
        dealt[1][0][1] = empty[:0]
    return dealt


def measure(metric: ModalityIntegrationRate) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer rows than dimensions
        return metric.per_layer()


def run(folder: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    results = {}
    for case, (_, dim) in CASES.items():
        for outliers in OUTLIERS:
            metric = ModalityIntegrationRate(LAYERS, dim, outliers=outliers)
            metric.update(*shares(world, case)[rank])
            states = torch.cat(metric.norms_text_0) if metric.norms_text_0 else None
            results[case, outliers] = measure(metric), metric.accepted, states
    # A rank without any update must not stall or spoil the others.
    metric = ModalityIntegrationRate(LAYERS, DIM)
    if rank == 0:
        metric.update(*shares(world, "many")[0])
    results["alone"] = metric.per_layer()
    # Too few rows are an error on every rank, after which more may follow.
    metric = ModalityIntegrationRate(1, DIM)
    if rank == 0:
        metric.update([torch.ones(3, DIM)], [torch.ones(1, DIM)])
    try:
        metric.compute()
    except ValueError as error:
        results["error"] = str(error)
    vision, text = shares(world, "many")[0]
    metric.update(vision[:1], text[:1])
    results["after"] = metric.compute()
    # Stages of a pipeline: each rank sees all rows of its own layers, and holds sums of no other.
    metric = ModalityIntegrationRate(LAYERS, DIM)
    for vision, text in shares(world, "many"):
        for layer in range(rank, LAYERS, world):
            metric.update_layer(layer, vision[layer], text[layer])
    held = [layer for layer in range(LAYERS) if getattr(metric, f"scatter_{layer}")]
    results["stages"] = metric.per_layer(), held
    # Sums in float32, as those of wide layers.
    _stream.FLOAT64_DIM = 0
    metric = ModalityIntegrationRate(LAYERS, DIM)
    metric.update(*shares(world, "many")[rank])
    results["float32"] = metric.per_layer()
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
