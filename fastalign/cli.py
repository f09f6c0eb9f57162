"""The command line: `fastalign demo | train | mir | heatmap | diagnose | plan | bench | doctor`.

A command imports what it needs when it runs. Errors that a user can mend (a wrong value, a missing
file, a full disk, a step that is not finite, short memory, a lost rank) are one line; all others
keep their trace.
"""

import dataclasses
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import fastalign
from fastalign.commands.console import batches, parse, table, write_json
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
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"fastalign {name}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not _explained(error):
            raise
        print(f"fastalign {name}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(f'fastalign {name}: no {error.name}: pip install "fastalign[hf]"', file=sys.stderr)
        return 1
    except ImportError as error:
        if "pip install" not in str(error):  # a function of fastalign that names its extra
            raise
        print(f"fastalign {name}: {error}", file=sys.stderr)
        return 1
    except SystemExit as stop:  # tyro's, after --help or wrong arguments
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _explained(error: RuntimeError) -> bool:
    """Whether a run has said what was short, or who was lost, and what to do."""
    import torch

    from fastalign._run.failures import CPUMemoryError, LostRankError

    return isinstance(error, LostRankError | CPUMemoryError | torch.OutOfMemoryError)


def _usage() -> str:
    commands = [f"  {name:<9}{run.__doc__}" for name, run in COMMANDS.items()]
    return "\n".join(["usage: fastalign COMMAND [OPTIONS]", "", *commands, "", "COMMAND --help"])


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

    options = parse(Demo, argv, "demo", default=Demo(settings=DemoConfig()))
    write_json(options.json, run(options.settings))


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
    options = parse(Train, argv, "train", default=Train(settings=settings, config=given))
    if options.print_config:
        print(dump_config(options.settings), end="")
        return
    result = run(options.settings)

    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    print(f"result in {result.path}")
    data: dict[str, Any] = {"path": str(result.path), "history": result.history}
    for name in ("classifier", "classifier_accuracy"):
        found = getattr(result, name)
        data[name] = None if found is None else dataclasses.asdict(found)
    write_json(options.json, data)
    if options.figure is not None:
        from fastalign import diagnostics

        curve = diagnostics.learning_curve(options.settings.output_dir)
        figure = diagnostics.plot_learning_curve({options.settings.objective: curve})
        diagnostics.save_figure(figure, options.figure)


# -- mir, heatmap --------------------------------------------------------------------------------


def mir(argv: list[str]) -> None:
    """Measure the modality gap (MIR) of a model, layer by layer."""
    options = parse(Mir, argv, "mir")

    from fastalign.commands.inputs import at_least_one, collator, pairs

    at_least_one(options, "samples", "batch_size")
    records = pairs(options.images, options.texts, options.samples, options.seed)
    vlm, processor = options.load()

    from fastalign import diagnostics
    from fastalign.progress import peak_memory_mib

    collate = collator(vlm, processor, options.max_length)
    size = options.batch_size
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    device = next(vlm.model.parameters()).device
    resamples = _resamples(options.resamples, len(records), vlm)
    start = time.perf_counter()
    result = diagnostics.measure_mir(
        vlm,
        batches(
            groups,
            collate,
            lambda: peak_memory_mib(device),
            after="distances of the layers ...",
        ),
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
    write_json(options.json, result)
    if options.figure is not None:
        figure = diagnostics.plot_mir_per_layer({options.model.resolve().name: result})
        diagnostics.save_figure(figure, options.figure)


def _resamples(wanted: int | None, samples: int, vlm: Any) -> int:
    """Groups for the standard error: those wanted, or up to 10 as samples and memory allow."""
    from fastalign.metrics import ModalityIntegrationRate
    from fastalign.models._mir import free_memory

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


def _show_mir(result: dict[str, Any]) -> None:
    total = sum(result["fid"])
    rows = [
        (str(layer), f"{fid:.6g}", f"{fid / total:.1%}" if total else "")
        for layer, fid in zip(result["layer"], result["fid"], strict=True)
    ]
    table("Modality gap by layer", ("layer", "Fréchet distance", "share"), rows, right=True)
    print(
        f"MIR {result['mir']:.4f}: {result['samples']} samples, "
        f"{result['vision_tokens']} vision and {result['text_tokens']} text tokens, "
        f"{result['seconds']:.1f} s, peak {result['peak_mib']:.0f} MiB on {result['device']}"
    )
    if result["resamples"]:
        error = result["mir_standard_error"]
        about = f"standard error over {result['resamples']} resamples"
        print(f"MIR {result['mir']:.4f} ± {error:.4f} ({about})")


def heatmap(argv: list[str]) -> None:
    """Show which words of a caption come from the image."""
    options = parse(Heatmap, argv, "heatmap")

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
    table(f"Contrast with {options.image.name}", ("token", "delta", "weight"), rows, right=True)
    tokens = [token._asdict() for token in samples[0]]
    about = {"model": options.model, "adapter": options.adapter, "image": options.image}
    write_json(options.json, {**about, "mode": options.mode, "tokens": tokens})
    title = f"{options.image.name}, {options.model.resolve().name}"
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(diagnostics.contrast_html(samples, title=title), encoding="utf-8")
    if options.figure is not None:
        figure = diagnostics.plot_token_contrast(samples, title=title)
        diagnostics.save_figure(figure, options.figure)


# -- diagnose ------------------------------------------------------------------------------------


def diagnose(argv: list[str]) -> None:
    """Look into a model: gap, embedding, attention, words, probe, perplexity or blind."""
    from fastalign.commands.diagnose import run

    run(argv)


# -- plan ----------------------------------------------------------------------------------------


def plan(argv: list[str]) -> None:
    """Say what a training run will take: memory, FLOPs and hours, from config.json alone."""
    from fastalign.commands.plan import run

    run(argv)


# -- doctor --------------------------------------------------------------------------------------


def doctor(argv: list[str]) -> None:
    """Say what is installed, and which path each op takes here and why."""
    # It is what says which extras are missing: without options it runs without all of them.
    options = parse(Doctor, argv, "doctor") if argv else Doctor()
    report = examine()
    table(
        "Versions", ("package", "version"), [(k, v or "-") for k, v in report["versions"].items()]
    )
    devices = [(d["name"], d["kind"], d["detail"]) for d in report["devices"]]
    table("Devices", ("device", "kind", ""), devices)
    table("Ops", ("op", "path", "why"), [(o["op"], o["path"], o["why"]) for o in report["ops"]])
    backends = [
        (b["name"], b["version"] or "-", "yes" if b["usable"] else "no", b["why"])
        for b in report["attention"]
    ]
    table("Packed attention", ("back end", "version", "usable", "why"), backends)
    extras = [
        (name, "yes" if not missing else "no", ", ".join(missing))
        for name, missing in report["extras"].items()
    ]
    table("Extras", ("extra", "complete", "missing"), extras)
    if options.model is not None:
        from fastalign.commands.model_report import examine_model, show_model

        report["model"] = examine_model(options.model, options.adapter)
        show_model(report["model"])
    elif options.adapter is not None:
        raise ValueError("model must be given with an adapter: got none")
    write_json(options.json, report)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "mir": mir,
    "heatmap": heatmap,
    "diagnose": diagnose,
    "plan": plan,
    "bench": bench,
    "doctor": doctor,
}
