"""Time every op, or one, on CUDA where there is a GPU and on the CPU where there is none.

    python -m benchmarks --json FILE [--op NAME] [--quick]

Rows of one case: fastalign, plain torch (eager), torch.compile of it, peers, and the copy or
product that bounds it. Times are medians over interleaved runs of the value with all gradients;
max_error is relative to the largest magnitude of the exact result, computed in float64.
"""

import argparse
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks import FIELDS, Benchmark, measure


def find() -> dict[str, Benchmark]:
    """The benchmarks by op: the modules of this package that define BENCHMARK."""
    names = sorted(info.name for info in pkgutil.iter_modules(benchmarks.__path__))
    paths = {name: Path(benchmarks.__path__[0]) / f"{name}.py" for name in names}
    holding = [n for n, p in paths.items() if p.is_file() and "\nBENCHMARK = " in p.read_text()]
    return {name: importlib.import_module(f"benchmarks.{name}").BENCHMARK for name in holding}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row, one blank line between the cases."""
    print(f"\n{rows[0]['op']} on {rows[0]['device']}")
    header = (
        f"{'median us':>12} {'p10':>12} {'p90':>12} {'of bound':>9} {'peak MiB':>9} {'error':>9}"
    )
    print(f"{'case':48} {'impl':12} {header}")
    case = rows[0]["case"]
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            print()
        error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
        print(
            f"{case:48} {row['impl']:12} {row['median_us']:12.1f} {row['p10_us']:12.1f} "
            f"{row['p90_us']:12.1f} {row['bound_us'] / row['median_us']:9.2f} "
            f"{row['peak_mib']:9.1f} {error:>9}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    found = find()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the rows to: " + ", ".join(FIELDS))
    parser.add_argument("--op", choices=sorted(found), help="this op only")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing compiled")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name in [options.op] if options.op else sorted(found):
        measured = measure(found[name], device, options.quick)
        print_table(measured)
        rows += measured
        if options.json:  # after each op, so that an interrupted run keeps what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
