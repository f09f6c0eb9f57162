"""What each term of DeepAlign does in the demo: the table of the paper's ablation, on its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign import diagnostics
from fastalign.demo.report import interval, mean_accuracy

if TYPE_CHECKING:
    from fastalign.demo.run import DemoConfig

FULL = "full"
# What is judged, and its name in the table.
COLUMNS = {
    "accuracy": "accuracy",
    "ce": "CE (nats)",
    "mir": "MIR",
    "patch_correlation": "patch corr.",
    "cos_global": "cos global",
    "cos_instance": "cos instance",
}


def summarise(
    config: DemoConfig, base: dict[str, Any], outcomes: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Means over seeds, and differences to the full method, paired by seed, with intervals.

    Args:
        config: Of the run.
        base: How the base was judged.
        outcomes: How each arm was judged, seed by seed.

    Returns:
        "base": its values; "arms": for each arm and column the mean, `*_interval` (95 %), and,
        except of the full method, `*_less_full` and `*_less_full_interval`; None where an arm has
        no such value.
    """
    full = [_values(outcome) for outcome in outcomes[FULL]]
    arms = {}
    for arm, found in outcomes.items():
        values = [_values(outcome) for outcome in found]
        row: dict[str, Any] = {}
        for column in COLUMNS:
            row[column], row[f"{column}_interval"] = _interval([v[column] for v in values])
            if arm != FULL:
                pairs = zip(values, full, strict=True)
                less = [_minus(one[column], other[column]) for one, other in pairs]
                row[f"{column}_less_full"], row[f"{column}_less_full_interval"] = _interval(less)
        arms[arm] = row
    return {
        "base": _values(base),
        "arms": arms,
        "seeds": config.seeds,
        "config": asdict(config),
        "findings": findings(arms),
    }


def _values(outcome: dict[str, Any]) -> dict[str, float | None]:
    given = {**outcome, "accuracy": mean_accuracy(outcome)}
    return {column: given.get(column) for column in COLUMNS}


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _interval(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    return interval(known) if len(known) == len(values) else (None, None)


def findings(arms: dict[str, dict[str, Any]]) -> list[str]:
    """For each term left out: what moved beyond its paired interval, and what did not."""
    lines = []
    for arm, row in arms.items():
        if arm == FULL:
            continue
        moved: list[str] = []
        still: list[str] = []
        for column, title in COLUMNS.items():
            change, half = row[f"{column}_less_full"], row[f"{column}_less_full_interval"]
            if change is None or half is None:
                continue
            # With one seed there is no interval (NaN), and nothing is certain.
            (moved if abs(change) > half else still).append(f"{title} {change:+.3f} ± {half:.3f}")
        lines.append(
            f"{arm}: moved {', '.join(moved) or 'nothing'}; not beyond the interval "
            f"{', '.join(still) or 'nothing'}"
        )
    return lines


def show(result: dict[str, Any]) -> None:
    """Print the table and what moved."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"DeepAlign without each term, mean of {result['seeds']} seeds ± 95 % interval"
    names = list(COLUMNS)
    for columns in (names[:3], names[3:]):  # side by side they are wider than a terminal
        table = Table(title=title, title_justify="left")
        table.add_column("arm", no_wrap=True)
        for column in columns:
            table.add_column(COLUMNS[column], justify="right", no_wrap=True)
        table.add_row("base", *(_cell(result["base"][column], None) for column in columns))
        for arm, row in result["arms"].items():
            table.add_row(arm, *(_cell(row[c], row[f"{c}_interval"]) for c in columns))
        console.print(table)
    console.print("Against the full method, paired by seed:")
    for line in result["findings"]:
        console.print("- " + line)
    console.print(f"{result['seconds']:.0f} s, peak memory {result['peak_mib']:.0f} MiB")
    for path in result["figures"]:
        console.print(f"  {path}")


def _cell(mean: float | None, half: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" + ("" if half is None or half != half else f"±{half:.3f}")


def figure(folder: Path, result: dict[str, Any]) -> Path:
    """Draw each arm's values with their intervals, and the base's as a line."""
    drawn = diagnostics.new_figure(11.0, 3.6)
    arms, columns = list(result["arms"]), ("accuracy", "ce", "mir", "patch_correlation")
    panels = drawn.subplots(1, len(columns), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        for i, arm in enumerate(arms):
            row = result["arms"][arm]
            half = row[f"{column}_interval"]
            axes.errorbar(
                row[column],
                len(arms) - i,
                xerr=None if half != half else half,
                marker="o",
                capsize=3,
                color=diagnostics.COLORS[0 if arm == FULL else 1],
            )
        axes.axvline(result["base"][column], color="black", linewidth=1, linestyle="--")
        axes.set_xlabel(COLUMNS[column])
        axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms), 0, -1), arms)
    drawn.suptitle(f"DeepAlign without each term, {result['seeds']} seeds (dashed: base)")
    path = folder / "ablation.png"
    diagnostics.save_figure(drawn, path)
    return path
