"""The table of `python -m benchmarks.offline`: on the screen, and in the documentation."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch
import triton

BEGIN, END = "<!-- offline: begin -->", "<!-- offline: end -->"


@dataclass(frozen=True)
class Row:
    """What came out of one compilation; without numbers where the compiler refused."""

    kernel: str
    d: int
    dtype: str
    arch: int
    wrong: tuple[str, ...]
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    threads: int | None = None
    wide: str = "-"  # 16 bytes at a time: "read", "write" or "both"
    matrix: str = "-"  # the matrix instruction
    shown: bool = False  # in the documentation

    @staticmethod
    def header() -> str:
        """The names of the columns."""
        names = f"{'kernel':44} {'d':>6} {'dtype':9} sm   regs  spill  shared  threads 16-byte"
        return f"{names} matrix"

    def __str__(self) -> str:
        numbers = [self.registers, self.spilled, self.shared, self.threads]
        columns = zip(("-" if x is None else x for x in numbers), (5, 6, 7, 8), strict=True)
        text = " ".join(f"{value:>{width}}" for value, width in columns)
        where = f"{self.kernel:44} {self.d:6} {self.dtype:9} {self.arch:3}"
        return f"{where} {text} {self.wide:>7} {self.matrix}"


def _cell(rows: list[Row], name: str) -> str:
    """A value by architecture, "a / b / c", or once where it is the same; "a and b" of variants."""
    by_arch: dict[int, list[str]] = {}
    for row in rows:
        found = by_arch.setdefault(row.arch, [])
        text = "-" if getattr(row, name) is None else str(getattr(row, name))
        if text not in found:
            found.append(text)
    cells = [" and ".join(by_arch[arch]) for arch in sorted(by_arch)]
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _spilling(rows: Iterable[Row]) -> str:
    """A sentence on the kernels that spill."""
    spilled: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        if row.spilled:
            spilled.setdefault((row.kernel.split()[0], row.d), []).append(row.spilled)
    if not spilled:
        return "Nothing spills."
    found = [
        f"`{kernel}` at {d} ({min(sizes)} to {max(sizes)})"
        for (kernel, d), sizes in spilled.items()
    ]
    return f"Spilled bytes a thread, over all combinations: {', '.join(found)}. No other spills."


def markdown(rows: list[Row]) -> str:
    """The table of the documentation: the rows that are shown there, a line a kernel and dtype."""
    lengths = ", ".join(str(d) for d in sorted({row.d for row in rows}))
    archs = [f"sm_{arch}" for arch in sorted({row.arch for row in rows})]
    failed = sum(bool(row.wrong) for row in rows)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.shown:
            groups.setdefault((row.kernel, row.dtype), []).append(row)
    sizes = ", ".join(str(d) for d in sorted({row.d for row in rows if row.shown}))
    versions = f"torch {torch.__version__}, triton {triton.__version__}, no GPU."
    text = (
        f"Combinations of kernel, row length ({lengths}), dtype and architecture: {len(rows)} "
        f"compiled, {failed} failed. For rows of {sizes}, by architecture ({' / '.join(archs)}) "
        "where they differ: registers a thread, bytes it spills, bytes of shared memory and "
        "threads of a block, whether it reads and writes 16 bytes at a time, and the matrix "
        "instruction."
    )
    columns = ("registers", "spilled", "shared", "threads", "wide", "matrix")
    table = [
        "| kernel | dtype | registers | spilled | shared | threads | 16 bytes | matrix |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (kernel, dtype), group in groups.items():
        cells = [f"`{kernel}`", dtype, *(_cell(group, name) for name in columns)]
        table.append(f"| {' | '.join(cells)} |")
    paragraphs = [fill(f"{versions} {text}", 100), "\n".join(table), fill(_spilling(rows), 100)]
    return "\n\n".join(paragraphs)


def splice(path: Path, text: str) -> str:
    """The page at `path` with `text` between its two marks; a page of its own where there is none.

    Raises:
        ValueError: The page has not exactly one pair of marks.
    """
    if not path.exists():
        return f"{BEGIN}\n\n{text}\n\n{END}\n"
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"--markdown needs a page with one {BEGIN} before one {END}: {path}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
