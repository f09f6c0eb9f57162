"""What a diagnostic writes beside its table."""

from collections.abc import Callable, Iterable
from typing import Any

from fastalign.commands.console import write_json
from fastalign.settings import Source


def about(options: Source) -> dict[str, Any]:
    """Which model the result is of."""
    return {"model": options.model, "adapter": options.adapter}


def finish(options: Source, data: dict[str, Any], draw: Callable[[], Any]) -> None:
    """The result as a file, and as a figure."""
    from fastalign import diagnostics

    write_json(options.json, data | about(options))
    if options.figure is not None:
        diagnostics.save_figure(draw(), options.figure)


def curves(options: Source, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The data under the model's name, as figures take it."""
    return {options.model.resolve().name: data}


def interval(ends: Iterable[float]) -> str:
    """As it is printed."""
    return " to ".join(f"{end:.4g}" for end in ends)
