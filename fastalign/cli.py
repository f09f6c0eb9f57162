"""The command line: `fastalign demo | train | mir | heatmap | bench | doctor`.

A command imports what it needs when it runs. Errors that a user can mend (a wrong value, a missing
file) are one line; all others keep their trace.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import runpy
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import fastalign

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

    given = _config_option(argv)
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


def _config_option(argv: list[str]) -> Path | None:
    """The value of `--config`, read first: its file holds the defaults of all other options."""
    for option, following in zip(argv, [*argv[1:], None], strict=True):
        if option == "--config" and following is not None:
            return Path(following)
        if option.startswith("--config="):
            return Path(option.removeprefix("--config="))
    return None


def load_config(path: Path, kind: type[T]) -> T:
    """The dataclass `kind` with the values of a YAML file, which may leave out any of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no mapping, a key is unknown or a value has the wrong type; the
            message names the file and the key, and the nearest known keys.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"config must be a YAML file: {path} is not a file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(kind, {} if values is None else values, "")
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dump_config(settings: Any) -> str:
    """The YAML that `load_config` reads back to the same settings."""
    import yaml

    # By way of JSON, where tuples are lists: YAML would tag them as Python's own.
    values = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return text


def _build(kind: type[T], values: Any, prefix: str) -> T:
    """The dataclass `kind` from a mapping; `prefix` is the dotted name of what it is a value of."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'the file'} must be a mapping of settings: got {values!r}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(cast(Any, kind))]
    dots = f"{prefix}." if prefix else ""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, cutoff=0.5)
            names = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{dots}{key} is no setting; {names}")
    return kind(**{key: _convert(value, hints[key], dots + key) for key, value in values.items()})


class _WrongType(ValueError):
    """A value does not have its setting's type."""


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value`, as YAML has it, in the type `hint`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(cast(type, hint), value, name)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        for option in (i for i in inner if i is not type(None)):
            with contextlib.suppress(_WrongType):
                return _convert(value, option, name)
    elif origin is Literal and value in inner:
        return value
    elif origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            pairs = zip(value, kinds, strict=True)
            return tuple(_convert(v, kind, f"{name}[{i}]") for i, (v, kind) in enumerate(pairs))
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 3e-5, having no point, as a string
            return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is Any or (hint in (bool, int, str) and type(value) is hint):
        return value
    shown = hint.__name__ if isinstance(hint, type) and not inner else str(hint)
    raise _WrongType(f"{name} must be {shown.replace('typing.', '')}: got {value!r}")


# -- mir, heatmap --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Source:
    """A model on disk.

    Attributes:
        model: Folder of a model and its processor.
        adapter: Folder of an adapter to put on it.
        device: "auto" is CUDA where there is a GPU, else the CPU.
        dtype: Of the weights; "auto" is the checkpoint's own.
        json: Write the result here.
        figure: Draw the result here.
    """

    model: Path
    adapter: Path | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    json: Path | None = None
    figure: Path | None = None

    def load(self) -> tuple[Any, Any]:
        """The VLM and its processor: local safetensors, and no code of the checkpoint's own."""
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from fastalign.adapters import load_adapter
        from fastalign.models import VLM

        if not (self.model / "config.json").is_file():
            raise FileNotFoundError(f"model must be a folder with a config.json: got {self.model}")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        local: dict[str, Any] = {"local_files_only": True}
        model: Any = AutoModelForImageTextToText.from_pretrained(
            self.model, dtype=self.dtype, use_safetensors=True, **local
        )
        load_processor: Any = AutoProcessor.from_pretrained
        processor = load_processor(self.model, **local)
        model = model.to(device).eval()
        if self.adapter is not None:
            load_adapter(model, self.adapter)
        return VLM(model), processor


@dataclass(kw_only=True)
class Mir(Source):
    """Modality integration rate of a model over random pairs of images and texts.

    The image is the prompt and the text the answer, in the model's own chat template.

    Attributes:
        images: Folder of images.
        texts: Folder of .txt files, or of .jsonl files with "text" in each line; or one such file.
        samples: Pairs, as far as images and texts reach.
        batch_size: Pairs in a batch.
        max_length: Tokens after which a text is cut; what the model can take by default.
        seed: Of the choice of pairs.
        method: Of the square root; see `ModalityIntegrationRate`.
        outliers: What becomes of tokens of unusual norm.
        text: "after" counts only text behind the image, as the released code does.
    """

    images: Path
    texts: Path
    samples: int = 100
    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0
    method: Literal["newton_schulz", "eigh", "official_fast"] = "newton_schulz"
    outliers: Literal["remove", "median", "keep"] = "remove"
    text: Literal["all", "after"] = "all"


def mir(argv: list[str]) -> None:
    """Measure the modality gap (MIR) of a model, layer by layer."""
    options = _parse(Mir, argv, "mir")
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1: got {getattr(options, name)}")
    records = _pairs(options)
    vlm, processor = options.load()

    from fastalign import diagnostics
    from fastalign.data import Collator
    from fastalign.progress import peak_memory_mib

    limit = options.max_length or vlm.config.get_text_config().max_position_embeddings
    collate = Collator(processor, max_length=limit, on_overflow="truncate")
    size = options.batch_size
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    device = next(vlm.model.parameters()).device
    start = time.perf_counter()
    result = diagnostics.measure_mir(
        vlm,
        _progress(groups, collate, lambda: peak_memory_mib(device)),
        method=options.method,
        outliers=options.outliers,
        text=options.text,
    )
    result |= {"samples": len(records), "seconds": time.perf_counter() - start}
    result |= {"peak_mib": peak_memory_mib(device), "device": str(device)}
    chosen = {name: getattr(options, name) for name in ("method", "outliers", "text", "seed")}
    result |= {"model": options.model, "adapter": options.adapter, **chosen}
    _show_mir(result)
    _write_json(options.json, result)
    if options.figure is not None:
        figure = diagnostics.plot_mir_per_layer({options.model.resolve().name: result})
        diagnostics.save_figure(figure, options.figure)


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


@dataclass(kw_only=True)
class Heatmap(Source):
    """How much an image raises the logit of each token of a text, and the weight CAL gives it.

    Attributes:
        image: Image file.
        text: Its caption.
        prompt: The question before the caption, if any.
        mode: How the image is taken away; see `VLM.contrast`.
        html: Write the heat map here as a page of its own.
    """

    image: Path
    text: str
    prompt: str = ""
    mode: str = "drop"
    html: Path | None = None


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


@dataclass(kw_only=True)
class Doctor:
    """What is installed, and which path each op takes here and why.

    Attributes:
        json: Write the report here.
    """

    json: Path | None = None


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


def examine() -> dict[str, Any]:
    """What `fastalign doctor` reports, as data: versions, devices, ops, attention, extras."""
    packages = ("torch", "triton", "transformers", "accelerate", "torchmetrics")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {"fastalign": fastalign.__version__} | {name: _version(name) for name in packages}
    return {
        "versions": versions,
        "devices": _devices(),
        "ops": _ops(),
        "attention": _attention(),
        "extras": _extras(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that would hold it
        return False


def _devices() -> list[dict[str, str]]:
    import torch

    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    devices = [{"name": "cpu", "kind": platform.system(), "detail": cpu}]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        detail = f"sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        devices.append({"name": f"cuda:{i}", "kind": about.name, "detail": detail})
    return devices


def _ops() -> list[dict[str, str]]:
    """Each public function with the path it takes on the best device here."""
    import torch

    from fastalign import linalg, losses, ops

    cuda = torch.cuda.is_available()
    lacking = [name for name in ("triton", "fastalign_kernels") if not _found(name)]
    rows = []
    for group in (ops, losses, linalg):
        for name in group.__all__:
            if not callable(getattr(group, name)) or isinstance(getattr(group, name), type):
                continue
            # One stem: an op with a kernel is a module of fastalign.ops and of fastalign_kernels.
            if not _found(f"fastalign.ops.{name}"):
                path, why = "torch", "no kernel of its own"
            elif not cuda:
                path, why = "torch", "no CUDA device for its kernel"
            elif lacking:
                path, why = "error", f"not installed, but needed on CUDA: {', '.join(lacking)}"
            else:
                path, why = "triton", "CUDA tensors; torch for those on the CPU"
            module = group.__name__.removeprefix("fastalign.")
            rows.append({"op": f"{module}.{name}", "path": path, "why": why})
    return rows


def _attention() -> list[dict[str, Any]]:
    """The back ends that attend within packed sequences."""
    import torch

    cuda = torch.cuda.is_available()
    rows = []
    for name, module in (
        ("torch varlen", "torch.nn.attention.varlen"),
        ("flash-attn", "flash_attn"),
        ("xformers", "xformers"),
    ):
        found = _found(module)
        why = "" if found and cuda else "no CUDA device" if found else "not installed"
        rows.append({"name": name, "installed": found, "usable": found and cuda, "why": why})
    return rows


def _extras() -> dict[str, list[str]]:
    """Each extra of the package and its missing requirements; extras of extras are followed."""
    needs: dict[str, list[str]] = {}
    lines = importlib.metadata.requires("fastalign") if _version("fastalign") else None
    for line in lines or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        parts = re.match(r"([\w.-]+)(?:\[([^]]*)])?", line)
        if extra and parts:
            needs.setdefault(extra[1], []).append(parts[0])

    def missing(extra: str) -> list[str]:
        lacking: list[str] = []
        for need in needs.get(extra, []):
            name, _, inner = need.rstrip("]").partition("[")
            if name == "fastalign":
                lacking += [m for e in inner.split(",") for m in missing(e.strip())]
            elif _version(name) is None:
                lacking.append(name)
        return list(dict.fromkeys(lacking))

    return {extra: missing(extra) for extra in needs}


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "train": train,
    "mir": mir,
    "heatmap": heatmap,
    "bench": bench,
    "doctor": doctor,
}
