"""contrast_weights against the windows in plain torch and the copy of what it must move."""

import fastalign as fa
from benchmarks import Benchmark, Inputs, Run, copy_of
from fastalign.reference.contrast_weights import contrast_weights


def bound(inputs: Inputs) -> Run:
    """delta is read and the weights, float32, are written once; so are the offsets read."""
    delta, cu_seqlens = inputs
    offsets = 0 if cu_seqlens is None else cu_seqlens.nbytes
    return copy_of(delta.nbytes + 4 * delta.numel() + offsets, delta.device)


BENCHMARK = Benchmark(
    op="contrast_weights",
    fastalign=fa.losses.contrast_weights,
    eager=contrast_weights,
    bound=bound,
    differentiate=(),
)
