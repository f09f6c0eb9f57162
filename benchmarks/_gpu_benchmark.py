"""Every op at its benchmark shapes: the rows of `python -m benchmarks`, one unit a case."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import Benchmark, measure
from benchmarks.__main__ import find, print_table
from benchmarks._gpu_stage import Options, Unit
from fastalign.testing import Case, cases


def units(options: Options) -> Iterator[Unit]:
    for op, benchmark in find().items():
        for case in cases(op, bench=True, quick=options.tiny):
            if options.cuda or not case.large:
                yield Unit(f"{op} {case}", partial(_rows, benchmark, case, options))


def _rows(benchmark: Benchmark, case: Case, options: Options) -> dict[str, Any]:
    rows = measure(benchmark, options.device, options.tiny, case_filter=lambda other: other == case)
    print_table(rows)
    return {"rows": rows}
