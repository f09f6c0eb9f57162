"""What every command does with its arguments, its tables, its files and its progress."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


def parse(kind: type[T], argv: list[str], command: str, **options: Any) -> T:
    """The dataclass `kind` from arguments; SystemExit after --help or wrong ones."""
    import tyro

    return cast(T, tyro.cli(kind, args=argv, prog=f"fastalign {command}", **options))


def write_json(path: Path | None, data: Any) -> None:
    """Strict JSON: what is not finite becomes null."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, Path) else data


def table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False
) -> None:
    """A table on stdout, plain where rich is not installed; `right` aligns its cells there."""
    if importlib.util.find_spec("rich") is None:
        _plain_table(title, [header, *rows], right)
        return

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if right else "left", no_wrap=i == 0)
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    Console().print(shown)


def _plain_table(title: str, rows: Sequence[Sequence[str]], right: bool) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = (cell.rjust(width) if right else cell.ljust(width) for cell, width in cells)
        print(f"  {'  '.join(padded)}".rstrip())


@contextmanager
def bar(total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on stderr; gives the function that moves it on, by `advance`, and sets its `text`."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=total, text="")
        yield lambda **change: shown.update(task, **({"advance": 1} | change))


def batches(
    groups: Sequence[Any],
    collate: Callable[[Any], dict[str, Any]],
    peak: Callable[[], float],
    *,
    after: str = "",
) -> Iterator[dict[str, Any]]:
    """Batches of `groups`, with a bar on stderr, and the line `after` once they are all taken."""
    tokens = samples = 0
    start = time.perf_counter()
    with bar(len(groups)) as move:
        for group in groups:
            batch = collate(group)
            yield batch
            tokens, samples = tokens + int(batch["attention_mask"].sum()), samples + len(group)
            spent = time.perf_counter() - start
            rates = f"{tokens / spent:.0f} tokens/s  {samples / spent:.1f} images/s"
            move(text=f"{rates}  {peak():.0f} MiB")
    if after:
        print(after, file=sys.stderr, flush=True)
