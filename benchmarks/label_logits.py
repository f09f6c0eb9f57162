"""label_logits against the gathered rows in plain torch and the copy of what it must move."""

import fastalign as fa
from benchmarks import Benchmark, Inputs, Run, copy_of
from fastalign.reference.label_logits import label_logits


def bound(inputs: Inputs) -> Run:
    """Forward reads t rows of hidden and of weight, as does backward, which writes both gradients.

    The gradient of weight is dense: all its rows are written.
    """
    hidden, weight, _, _ = inputs
    return copy_of(5 * hidden.nbytes + weight.nbytes, hidden.device)


BENCHMARK = Benchmark(
    op="label_logits",
    fastalign=fa.ops.label_logits,
    eager=label_logits,
    bound=bound,
    portable=label_logits,
)
