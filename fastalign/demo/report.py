"""What the demo found: means with intervals, a table, figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalign import diagnostics
from fastalign.demo.dataset import SceneDataset
from fastalign.demo.evaluate import CHANCE
from fastalign.demo.scenes import ATTRIBUTES
from fastalign.models import VLM, evaluating

if TYPE_CHECKING:
    from fastalign.demo.run import DemoConfig

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Outcomes = dict[str, dict[str, list[dict[str, Any]]]]


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over `total` runs or steps; call it with a few words as each ends."""
    from rich import progress as bars

    columns = (
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (NaN for one value)."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), float("nan")
    return float(x.mean()), _T[len(x) - 2] * float(x.std()) / len(x) ** 0.5


def mean_accuracy(outcome: dict[str, Any]) -> float:
    """Mean over the five attributes."""
    return float(sum(outcome["accuracy"].values()) / len(ATTRIBUTES))


def _arm(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {
        "ce": [o["ce"] for o in outcomes],
        "accuracy": [mean_accuracy(o) for o in outcomes],
        "mir": [o["mir"] for o in outcomes],
        "patch_correlation": [o["patch_correlation"] for o in outcomes],
    }
    arm: dict[str, Any] = {}
    for name, values in columns.items():
        arm[name], arm[f"{name}_interval"] = interval(values)
    by_attribute = {a: interval([o["accuracy"][a] for o in outcomes])[0] for a in ATTRIBUTES}
    return arm | {"accuracy_by_attribute": by_attribute}


def summarise(config: DemoConfig, base: dict[str, Any], outcomes: Outcomes) -> dict[str, Any]:
    """Means over seeds. Differences are paired: both arms of a seed saw the same scenes."""
    result: dict[str, Any] = {
        "accuracy": {
            "with_image": base["accuracy"],
            "shuffled_image": {name: base["shuffled"][name] for name in ATTRIBUTES},
            "seen_combinations": {name: base["seen"][name] for name in ATTRIBUTES},
            "chance": dict(CHANCE),
        },
        "arms": {"base": _arm([base])},
        "swapped_arms": {"base": _arm([base])},
        "cal_less_sft": {},
        "noise": config.noise,
        "seeds": config.seeds,
        "config": asdict(config),
        "curves": {},
        "mir_per_layer": {"base": base["mir_per_layer"]},
    }
    for kind, key in (("clean", "arms"), ("swapped", "swapped_arms")):
        for arm, found in outcomes[kind].items():
            result[key][arm] = _arm(found)
        pairs = zip(outcomes[kind]["cal"], outcomes[kind]["sft"], strict=True)
        difference = interval([c["ce"] - s["ce"] for c, s in pairs])
        result["cal_less_sft"][kind] = {"ce": difference[0], "ce_interval": difference[1]}
    for arm, found in outcomes["clean"].items():
        result["curves"][arm] = found[0]["curve"]
        result["mir_per_layer"][arm] = found[0]["mir_per_layer"]
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables and, in words, what helped and what did not."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    with_image, shuffled = (result["accuracy"][k] for k in ("with_image", "shuffled_image"))
    table = Table(title="Base model: accuracy by attribute, on combinations never trained on")
    for column in ("", *ATTRIBUTES):
        table.add_column(column, justify="right" if column else "left")
    for name, row in (
        ("right image", with_image),
        ("shuffled image", shuffled),
        ("seen combinations", result["accuracy"]["seen_combinations"]),
        ("chance", result["accuracy"]["chance"]),
    ):
        table.add_row(name, *(f"{row[a]:.2f}" for a in ATTRIBUTES))
    console.print(table)

    seeds, noisy = result["seeds"], f"{result['noise']:.0%}"
    table = Table(
        title=f"After post-training, mean of {seeds} seeds ± 95 % interval; {noisy} swapped"
    )
    for column in ("arm", "captions", "CE (nats)", "accuracy", "MIR", "patch corr."):
        table.add_column(column, justify="left" if column in ("arm", "captions") else "right")
    for key, captions in (("arms", "clean"), ("swapped_arms", "swapped")):
        for arm, values in result[key].items():
            if arm == "base" and key == "swapped_arms":
                continue
            cells = (_cell(values, name) for name in ("ce", "accuracy", "mir", "patch_correlation"))
            table.add_row(arm, "-" if arm == "base" else captions, *cells)
    console.print(table)
    for line in findings(result):
        console.print("- " + line)
    console.print(f"{result['seconds']:.0f} s, peak memory {result['peak_mib']:.0f} MiB")
    for path in result.get("figures", ()):
        console.print(f"  {path}")


def _cell(values: dict[str, Any], name: str) -> str:
    half = values[f"{name}_interval"]
    return f"{values[name]:.3f}" + ("" if half != half else f"±{half:.3f}")


def findings(result: dict[str, Any]) -> list[str]:
    """What the numbers say, favourable or not."""
    with_image, shuffled = (result["accuracy"][k] for k in ("with_image", "shuffled_image"))
    lines = [
        f"Objects are named right in {with_image['object']:.0%} of held-out scenes with their own "
        f"image and in {shuffled['object']:.0%} with another's: the image is read."
    ]
    for kind, captions in (("swapped", "swapped captions"), ("clean", "clean captions")):
        found = result["cal_less_sft"][kind]
        mean, half = found["ce"], found["ce_interval"]
        verdict = "lower" if mean < 0 else "higher"
        # With one seed there is no interval, and nothing is certain.
        sure = "the interval excludes 0" if abs(mean) > half else "the interval holds 0"
        lines.append(
            f"CAL's cross-entropy after {captions} is {abs(mean):.3f} {verdict} than SFT's "
            f"(± {half:.3f}, paired; {sure})."
        )
    base, aligned = result["arms"]["base"], result["arms"]["deepalign"]
    sft = result["arms"]["sft"]
    correlation = "patch_correlation"
    lines.append(
        f"DeepAlign takes the correlation with the teacher from {base[correlation]:.3f} to "
        f"{aligned[correlation]:.3f}; SFT of all weights to {sft[correlation]:.3f}."
    )
    for arm, name in (("deepalign", "DeepAlign"), ("moca", "MoCa")):
        found = result["arms"][arm]
        change, half = found["accuracy"] - base["accuracy"], found["accuracy_interval"]
        effect = "changes" if abs(change) > half else "does not change"
        lines.append(
            f"{name} {effect} accuracy beyond its interval ({change:+.3f} ± {half:.3f}) and takes "
            f"MIR from {base['mir']:.3f} to {found['mir']:.3f}."
        )
    lines.append("MIR measures the gap between the modalities, never quality.")
    return lines


def figures(
    folder: Path,
    result: dict[str, Any],
    base: nn.Module,
    aligned: nn.Module,
    heldout: SceneDataset,
    teacher: Callable[[Tensor], Tensor],
) -> list[Path]:
    """Write every figure and the heat map's page; return their paths."""
    from fastalign.demo.base import build_processor
    from fastalign.demo.run import STUDENT_LAYER

    samples = diagnostics.token_contrast(VLM(base), build_processor(), heldout.batch(range(6)))
    before, after = (
        _similarity(model, heldout, teacher, STUDENT_LAYER) for model in (base, aligned)
    )
    grid = (8, 8)
    drawn = {
        "summary.png": plot_summary(result),
        "mir_per_layer.png": diagnostics.plot_mir_per_layer(result["mir_per_layer"]),
        "contrast.png": diagnostics.plot_token_contrast(
            samples, title="What the image adds to each word (held-out captions, base model)"
        ),
        "patch_similarity.png": diagnostics.plot_patch_similarity(before, after, grid=grid),
        "learning_curve.png": diagnostics.plot_learning_curve(result["curves"], terms=("ce",)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        diagnostics.save_figure(figure, folder / name)
    page = folder / "contrast.html"
    page.write_text(diagnostics.contrast_html(samples, title="What the image adds to each word"))
    return [*(folder / name for name in drawn), page]


def _similarity(
    model: nn.Module, heldout: SceneDataset, teacher: Callable[[Tensor], Tensor], layer: int
) -> diagnostics.PatchSimilarity:
    vlm, batch = VLM(model), heldout.batch([0])
    with evaluating(model):
        (hidden,) = vlm.hidden_states(batch, [layer])
        student, target = vlm.patches(batch).of(hidden), teacher(batch["pixel_values"])
    return diagnostics.patch_similarity(student, target[0])


def plot_summary(result: dict[str, Any]) -> Any:
    """Accuracy with right and wrong images, and cross-entropy of the arms after noise."""
    figure = diagnostics.new_figure(10.0, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    accuracy = result["accuracy"]
    for i, (key, label) in enumerate(
        (("with_image", "right image"), ("shuffled_image", "shuffled image"), ("chance", "chance"))
    ):
        values = [accuracy[key][a] for a in ATTRIBUTES]
        places = [j + 0.27 * (i - 1) for j in range(len(values))]
        left.bar(places, values, 0.25, label=label, color=diagnostics.COLORS[(0, 1, 4)[i]])
    left.set_xticks(range(len(ATTRIBUTES)), list(ATTRIBUTES))
    left.set_ylabel("accuracy on held-out combinations")
    left.set_ylim(0, 1.25)  # room for the legend
    left.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    left.set_title("The base model reads the image")
    arms = [a for a in result["arms"] if a != "base"]
    for i, (key, label) in enumerate(
        (("arms", "clean captions"), ("swapped_arms", f"{result['noise']:.0%} swapped"))
    ):
        values = [result[key][a]["ce"] for a in arms]
        halves = [result[key][a]["ce_interval"] for a in arms]
        places = [j + 0.36 * (i - 0.5) for j in range(len(arms))]
        right.bar(
            places,
            values,
            0.34,
            yerr=None if halves[0] != halves[0] else halves,
            capsize=3,
            label=label,
            color=diagnostics.COLORS[i * 5],
        )
    right.axhline(result["arms"]["base"]["ce"], color="black", linewidth=1, linestyle="--")
    right.set_xticks(range(len(arms)), arms)
    right.set_ylabel("held-out cross-entropy (nats / token)")
    right.set_title(f"Post-training, {result['seeds']} seeds (dashed: base)")
    for axes, columns in ((left, 3), (right, 2)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, ncols=columns, loc="upper center")
    right.set_ylim(0, 1.2 * right.get_ylim()[1])
    return figure
