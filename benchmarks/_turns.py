"""Benchmarks of whole steps: rows that are timed in turn, printed and kept with their ratios."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import Run, _interleaved_us, _peak_mib, device_name, quantiles, results_file
from benchmarks.__main__ import merged, write
from benchmarks._gpu_models import Shape

T = TypeVar("T")


def llava_shape(
    name: str, side: int, batch: int, tower: Mapping[str, int], width: int, layers: int, **more: Any
) -> Shape:
    """LLaVA in small: `side` squared image tokens and 128 of text, 80 of them labels.

    Args:
        name, batch: Of the shape.
        side: Patches along a side of the image.
        tower: Sizes of the vision tower.
        width, layers: Of the decoder.
        more: Other settings of the shape.
    """
    vision = {**tower, "num_attention_heads": 2, "image_size": 14 * side, "patch_size": 14}
    text = {"vocab_size": 1000, "hidden_size": width, "intermediate_size": 1376 * width // 512}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 8}
    text |= {"max_position_embeddings": 4096}
    lengths: dict[str, Any] = {"prompt": 35, "question": (13, 13), "answer": (80, 80)}
    vision |= {"projection_dim": 64}
    return Shape(name, vision, text, tiles=False, batch=batch, **lengths, **more)


@dataclass(frozen=True)
class Row:
    """One way to do the same.

    Attributes:
        op, case, impl, device: As in the rows of `python -m benchmarks`.
        ratio: Of its median to that of the row it is compared with.
        peak_mib: Most memory that a run holds beyond what it starts with; None where not measured.
        max_error: Of the result, relative; None where there is nothing to compare.
    """

    op: str
    case: str
    impl: str
    device: str
    median_us: float
    p10_us: float
    p90_us: float
    ratio: float
    peak_mib: float | None = None
    max_error: float | None = None


def time_rows(
    op: str,
    case: str,
    runs: Mapping[str, Run],
    device: str,
    rounds: int,
    base_of: Callable[[str], str],
    *,
    peaks: bool = True,
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """Time runs in turn.

    Args:
        op, case, device: Of the rows.
        runs: By the name of their row.
        rounds: How often each runs.
        base_of: From a row's name to that of the row its ratio is to.
        peaks: Measure memory.
        errors: By the name of the row.
    """
    most = {name: _peak_mib(run, device) for name, run in runs.items()} if peaks else {}
    times = _interleaved_us(dict(runs), device, rounds=rounds, seconds=float("inf"))
    found = {name: quantiles(us) for name, us in times.items()}
    rows = []
    for name, us in found.items():
        ratio = us["median_us"] / found[base_of(name)]["median_us"]
        more = {"peak_mib": most.get(name), "max_error": (errors or {}).get(name)}
        rows.append(Row(op, case, name, device_name(device), **us, ratio=ratio, **more))
    return rows


def print_rows(rows: Sequence[Row], about: str = "") -> None:
    """One case as a table."""
    peaks = rows[0].peak_mib is not None
    last = "peak MiB" if peaks else "error" if rows[0].max_error is not None else ""
    width = max(len(row.impl) for row in rows) + 2
    print(f"\n{rows[0].op}, {rows[0].case}{about}, on {rows[0].device}")
    print(f"{'':{width}} {'median ms':>10} {'p10':>9} {'p90':>9} {'ratio':>7} {last:>9}")
    for row in rows:
        ms = (1e-3 * us for us in (row.median_us, row.p10_us, row.p90_us))
        columns = "{:10.1f} {:9.1f} {:9.1f}".format(*ms)
        end = f"{row.peak_mib:9.1f}" if peaks else ""
        end = end if row.max_error is None else f"{row.max_error:9.1e}"
        print(f"{row.impl:{width}} {columns} {row.ratio:7.3f} {end}", flush=True)


def parser(module: str, doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    found = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--json", type=Path, help="file to write the rows to")
    found.add_argument("--save", action="store_true", help="keep them in benchmarks/results/")
    found.add_argument("--rounds", type=int, default=rounds, help="runs of each row")
    found.add_argument("--quick", action="store_true", help="one small case, three rounds")
    return found


def run(
    options: argparse.Namespace,
    cases: Sequence[T],
    quick: Sequence[T],
    measure: Callable[[T, str, int], list[Row]],
) -> int:
    """Measure the cases, print each as it comes, and keep what the options ask for."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for case in quick if options.quick else cases:
        new = measure(case, device, 3 if options.quick else options.rounds)
        print_rows(new)
        rows += [{k: v for k, v in asdict(row).items() if v is not None} for row in new]
        if options.json:
            write(options.json, rows)
    if options.save:
        write(results_file(device), merged(results_file(device), rows))
    return 0
