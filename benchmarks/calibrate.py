"""calibrate against plain torch and the copy of what it must move."""

import fastalign as fa
from benchmarks import Benchmark, Inputs, Run, copy_of
from fastalign.reference.calibrate import calibrate


def bound(inputs: Inputs) -> Run:
    """Forward reads x and writes y; backward reads dy and the vision rows of x, and writes dx."""
    x, vision_mask, _, _ = inputs
    vision = float(vision_mask.float().mean())
    return copy_of(int((4 + vision) * x.nbytes), x.device)


BENCHMARK = Benchmark(
    op="calibrate",
    fastalign=fa.ops.calibrate,
    eager=calibrate,
    bound=bound,
    portable=calibrate,
)
