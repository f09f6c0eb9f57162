"""hadamard_reweight against plain torch and the copy of what it must move."""

import fastalign as fa
from benchmarks import Benchmark, Inputs, Run, copy_of
from fastalign.ops.hadamard_reweight import HadamardReweightNative
from fastalign.reference.hadamard_reweight import hadamard_reweight


def bound(inputs: Inputs) -> Run:
    """Forward reads h, w and writes y; backward reads dy, h, w and writes dh, dw."""
    h, w = inputs
    return copy_of(5 * h.nbytes + 3 * w.nbytes, h.device)


BENCHMARK = Benchmark(
    op="hadamard_reweight",
    fastalign=fa.ops.hadamard_reweight,
    eager=hadamard_reweight,
    bound=bound,
    portable=hadamard_reweight,
    compiled=HadamardReweightNative.apply,
)
