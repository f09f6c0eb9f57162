"""Time every op, or one, on CUDA where there is a GPU and on the CPU where there is none.

    python -m benchmarks [--json FILE] [--save] [--op NAME] [--case SUBSTRING] [--quick]

Rows of one case: fastalign, plain torch in float32 (eager), torch.compile of it, peers, and the
copy or product that bounds it. Ops built on matrix products are also timed in bfloat16 and, on
CUDA, in TF32. Times are medians over interleaved runs of the value with all gradients, on the wall
clock; "x fastalign" is the ratio of the medians, above 1 where fastalign is faster. The error is
relative to the largest magnitude of the exact result, computed in float64.
"""

import argparse
import functools
import importlib
import json
import pkgutil
from pathlib import Path
from typing import Any

import torch

import benchmarks
from benchmarks import FIELDS, Benchmark, measure, ratios, results_file


@functools.cache
def find() -> dict[str, Benchmark]:
    """The benchmarks by op: the modules of this package that define BENCHMARK."""
    names = sorted(info.name for info in pkgutil.iter_modules(benchmarks.__path__))
    paths = {name: Path(benchmarks.__path__[0]) / f"{name}.py" for name in names}
    holding = [n for n, p in paths.items() if p.is_file() and "\nBENCHMARK = " in p.read_text()]
    return {name: importlib.import_module(f"benchmarks.{name}").BENCHMARK for name in holding}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row of one op, one blank line between the cases; then the absent peers."""
    if not rows:
        return
    print(f"\n{rows[0]['op']} on {rows[0]['device']}")
    header = f"{'median us':>12} {'p10':>12} {'p90':>12} {'x fastalign':>11} {'of bound':>9}"
    print(f"{'case':48} {'impl':18} {header} {'peak MiB':>9} {'error':>9}")
    case, found = rows[0]["case"], ratios(rows)
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            print()
        ratio = found.get((row["op"], case, row["device"]), {}).get(row["impl"])
        error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
        print(
            f"{case:48} {row['impl']:18} {row['median_us']:12.1f} {row['p10_us']:12.1f} "
            f"{row['p90_us']:12.1f} {'' if ratio is None else f'{ratio:.2f}':>11} "
            f"{row['bound_us'] / row['median_us']:9.2f} {row['peak_mib']:9.1f} {error:>9}",
            flush=True,
        )
    benchmark = find().get(rows[0]["op"])
    for name, package in benchmark.absent().items() if benchmark else ():
        print(f"{'':48} {f'peer:{name}':18} absent: no package {package}")


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


def merged(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `file`, where there is one, with those of the cases in `rows` replaced."""
    before = json.loads(file.read_text()) if file.is_file() else []
    new = {(row["op"], row["case"], row["device"]) for row in rows}
    kept = [row for row in before if (row["op"], row["case"], row["device"]) not in new]
    return sorted([*kept, *rows], key=lambda row: row["op"])  # stable: cases keep their order


def main(argv: list[str] | None = None) -> int:
    found = find()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to: " + ", ".join(FIELDS))
    parser.add_argument(
        "--save",
        action="store_true",
        help="write them to benchmarks/results/<device>.json, in place of those of the same cases",
    )
    parser.add_argument("--op", choices=sorted(found), help="this op only")
    parser.add_argument("--case", default="", help="cases whose name contains this, in any case")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing compiled")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = options.case.lower()
    rows: list[dict[str, Any]] = []
    for name in [options.op] if options.op else sorted(found):
        new = measure(found[name], device, options.quick, lambda case: wanted in str(case).lower())
        print_table(new)
        rows += new
        if options.json:  # after each op, so that an interrupted run keeps what it has
            write(options.json, rows)
        if options.save and new:
            file = results_file(device)
            write(file, merged(file, new))
    if not rows:
        parser.error(f"no case on {device} contains {options.case!r}: leave out --case or --quick")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
