"""The command line: `fastalign demo | train | mir | heatmap | bench | doctor`.

A command imports what it needs when it runs. Errors that a user can mend (a wrong value, a missing
file) are one line; all others keep their trace.
"""

import dataclasses
import json
import math
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import fastalign
from fastalign.doctor import examine
from fastalign.settings import Doctor, Heatmap, Mir, config_option, dump_config, load_config

T = TypeVar("T")

_EXTRA = ("PIL", "accelerate", "rich", "transformers", "tyro", "yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 after an error of its own, 2 for wrong arguments.

    Args:
        argv: The arguments, without the program's name; those of the process by default.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"fastalign {fastalign.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"fastalign: no command {name!r}\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[name](rest)
    except (ValueError, FileNotFoundError) as error:
        print(f"fastalign {name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f'fastalign {name}: no {error.name}: pip install "fastalign[hf]"', file=sys.stderr)
        return 1
    except SystemExit as stop:  # tyro's, after --help or wrong arguments
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _usage() -> str:
    commands = [f"  {name:<9}{run.__doc__}" for name, run in COMMANDS.items()]
    return "\n".join(["usage: fastalign COMMAND [OPTIONS]", "", *commands, "", "COMMAND --help"])


def _parse(kind: type[T], argv: list[str], command: str, **options: Any) -> T:
    import tyro

    return cast(T, tyro.cli(kind, args=argv, prog=f"fastalign {command}", **options))


def _write_json(path: Path | None, data: Any) -> None:
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


# -- demo, bench ---------------------------------------------------------------------------------


def demo(argv: list[str]) -> None:
    """Train and compare the objectives on the embedded scenes, without a download."""
    import tyro

    from fastalign.demo.run import DemoConfig, run

    @dataclass(kw_only=True)
    class Demo:
        """Train and compare the objectives on the embedded scenes.

        Attributes:
            json: Write the result here.
        """

        settings: Annotated[DemoConfig, tyro.conf.arg(name="")]
        json: Path | None = None

    options = _parse(Demo, argv, "demo", default=Demo(settings=DemoConfig()))
    _write_json(options.json, run(options.settings))


def bench(argv: list[str]) -> None:
    """Time every op against eager, torch.compile and its bound (needs the source checkout)."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            "benchmarks are no part of the installed package: run this from a source checkout, "
            f"installed with pip install -e . (looked in {root / 'benchmarks'})"
        )
    saved = sys.argv, sys.path
    sys.argv, sys.path = ["fastalign bench", *argv], [str(root), *sys.path]
    try:
        runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
    finally:
        sys.argv, sys.path = saved


# -- train ---------------------------------------------------------------------------------------


def train(argv: list[str]) -> None:
    """Post-train a model from a YAML file, with dotted overrides."""
    import tyro

    from fastalign.train import TrainConfig
    from fastalign.train import train as run

    @dataclass(kw_only=True)
    class Train:
        """Post-train a vision-language model; options override the values of `--config`.

        Attributes:
            config: YAML file of the settings below, nested as they are.
            print_config: Print the settings as such a file, and stop.
            json: Write the history and the place of the result here.
            figure: Draw the learning curve here.
        """

        settings: Annotated[TrainConfig, tyro.conf.arg(name="")]
        config: Path | None = None
        print_config: bool = False
        json: Path | None = None
        figure: Path | None = None

    given = config_option(argv)
    settings = TrainConfig() if given is None else load_config(given, TrainConfig)
    options = _parse(Train, argv, "train", default=Train(settings=settings, config=given))
    if options.print_config:
        print(dump_config(options.settings), end="")
        return
    result = run(options.settings)

    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    print(f"result in {result.path}")
    report = None if result.classifier is None else dataclasses.asdict(result.classifier)
    data = {"path": str(result.path), "history": result.history, "classifier": report}
    _write_json(options.json, data)
    if options.figure is not None:
        from fastalign import diagnostics

        curve = diagnostics.learning_curve(options.settings.output_dir)
        figure = diagnostics.plot_learning_curve({options.settings.objective: curve})
        diagnostics.save_figure(figure, options.figure)


# -- mir, heatmap --------------------------------------------------------------------------------


def mir(argv: list[str]) -> None:
    """Measure the modality gap (MIR) of a model, layer by layer."""
    options = _parse(Mir, argv, "mir")
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1: got {getattr(options, name)}")
    records = _pairs(options)
    vlm, processor = options.load()

    from fastalign import diagnostics
    from fastalign.data import Collator, plain_template
    from fastalign.progress import peak_memory_mib

    if processor.chat_template is None:
        processor.chat_template = plain_template(processor)
        print(f"{type(processor).__name__} has no chat template: the text follows the image")
    text_config = vlm.config.get_text_config()
    limit = options.max_length or getattr(text_config, "max_position_embeddings", None)
    collate = Collator(processor, max_length=limit, on_overflow="truncate")
    size = options.batch_size
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    device = next(vlm.model.parameters()).device
    resamples = _resamples(options.resamples, len(records), vlm)
    start = time.perf_counter()
    result = diagnostics.measure_mir(
        vlm,
        _progress(groups, collate, lambda: peak_memory_mib(device)),
        method=options.method,
        outliers=options.outliers,
        text=options.text,
        resamples=resamples,
    )
    result |= {"samples": len(records), "seconds": time.perf_counter() - start}
    result |= {"peak_mib": peak_memory_mib(device), "device": str(device)}
    chosen = {name: getattr(options, name) for name in ("method", "outliers", "text", "seed")}
    result |= {"model": options.model, "adapter": options.adapter, **chosen, "resamples": resamples}
    _show_mir(result)
    _write_json(options.json, result)
    if options.figure is not None:
        figure = diagnostics.plot_mir_per_layer({options.model.resolve().name: result})
        diagnostics.save_figure(figure, options.figure)


def _resamples(wanted: int | None, samples: int, vlm: Any) -> int:
    """Groups for the standard error: those wanted, or up to 10 as samples and memory allow."""
    from fastalign.diagnostics._mir import free_memory
    from fastalign.metrics import ModalityIntegrationRate

    if wanted is not None:
        return wanted
    parameter = next(vlm.model.parameters())
    metric = ModalityIntegrationRate(vlm.num_layers, vlm.hidden_size)
    each, free = metric.memory_bound(parameter.dtype), free_memory(parameter.device)
    fitting = min(10, samples, 10 if free is None else free // each)
    if fitting >= 2:
        return fitting
    why = "one sample" if samples < 2 else f"{each / 1e9:.1f} GB each, {(free or 0) / 1e9:.1f} free"
    print(f"no standard error: {why}")
    return 0


def _pairs(options: Mir) -> list[Any]:
    """Records of images and texts drawn at random, each at most once."""
    import random

    from fastalign.data import Record, image_folder, text_folder

    images, texts = image_folder(options.images), text_folder(options.texts)
    count = min(options.samples, len(images), len(texts))
    if count < options.samples:
        print(f"{count} samples: there are {len(images)} images and {len(texts)} texts")
    draw = random.Random(options.seed)
    pairs = zip(draw.sample(images, count), draw.sample(texts, count), strict=True)
    return [Record.from_caption(image, text) for image, text in pairs]


def _progress(
    groups: list[Any], collate: Callable[[Any], dict[str, Any]], peak: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    """Batches of `groups`, with a bar on stderr."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[text]}"),
    )
    tokens = samples = 0
    start = time.perf_counter()
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(groups), text="")
        for group in groups:
            batch = collate(group)
            yield batch
            tokens, samples = tokens + int(batch["attention_mask"].sum()), samples + len(group)
            spent = time.perf_counter() - start
            rates = f"{tokens / spent:.0f} tokens/s  {samples / spent:.1f} images/s"
            bar.update(task, advance=1, text=f"{rates}  {peak():.0f} MiB")
    print("distances of the layers ...", file=sys.stderr, flush=True)


def _show_mir(result: dict[str, Any]) -> None:
    total = sum(result["fid"])
    rows = [
        (str(layer), f"{fid:.6g}", f"{fid / total:.1%}" if total else "")
        for layer, fid in zip(result["layer"], result["fid"], strict=True)
    ]
    _table("Modality gap by layer", ("layer", "Fréchet distance", "share"), rows, right=True)
    print(
        f"MIR {result['mir']:.4f}: {result['samples']} samples, "
        f"{result['vision_tokens']} vision and {result['text_tokens']} text tokens, "
        f"{result['seconds']:.1f} s, peak {result['peak_mib']:.0f} MiB on {result['device']}"
    )
    if result["resamples"]:
        error = result["mir_standard_error"]
        about = f"standard error over {result['resamples']} resamples"
        print(f"MIR {result['mir']:.4f} ± {error:.4f} ({about})")


def _table(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if right else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def heatmap(argv: list[str]) -> None:
    """Show which words of a caption come from the image."""
    options = _parse(Heatmap, argv, "heatmap")

    from fastalign.data import Collator, Record, open_image

    # Opened before the model is loaded, which takes longer to find out about a wrong name.
    image = open_image(options.image)
    record = Record.from_caption(image, options.text, prompt=options.prompt)
    vlm, processor = options.load()

    from fastalign import diagnostics

    device = next(vlm.model.parameters()).device
    batch = {k: v.to(device) for k, v in Collator(processor)([record]).items()}
    samples = diagnostics.token_contrast(vlm, processor, batch, mode=options.mode)
    rows = [(repr(t.text), f"{t.delta:+.3f}", f"{t.weight:.3f}") for t in samples[0]]
    _table(f"Contrast with {options.image.name}", ("token", "delta", "weight"), rows, right=True)
    tokens = [token._asdict() for token in samples[0]]
    about = {"model": options.model, "adapter": options.adapter, "image": options.image}
    _write_json(options.json, {**about, "mode": options.mode, "tokens": tokens})
    title = f"{options.image.name}, {options.model.resolve().name}"
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(diagnostics.contrast_html(samples, title=title), encoding="utf-8")
    if options.figure is not None:
        figure = diagnostics.plot_token_contrast(samples, title=title)
        diagnostics.save_figure(figure, options.figure)


# -- doctor --------------------------------------------------------------------------------------


def doctor(argv: list[str]) -> None:
    """Say what is installed, and which path each op takes here and why."""
    options = _parse(Doctor, argv, "doctor")
    report = examine()
    _table(
        "Versions", ("package", "version"), [(k, v or "-") for k, v in report["versions"].items()]
    )
    devices = [(d["name"], d["kind"], d["detail"]) for d in report["devices"]]
    _table("Devices", ("device", "kind", ""), devices)
    _table("Ops", ("op", "path", "why"), [(o["op"], o["path"], o["why"]) for o in report["ops"]])
    backends = [(b["name"], "yes" if b["usable"] else "no", b["why"]) for b in report["attention"]]
    _table("Packed attention", ("back end", "usable", "why"), backends)
    extras = [
        (name, "yes" if not missing else "no", ", ".join(missing))
        for name, missing in report["extras"].items()
    ]
    _table("Extras", ("extra", "complete", "missing"), extras)
    _write_json(options.json, report)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "mir": mir,
    "heatmap": heatmap,
    "bench": bench,
    "doctor": doctor,
}
