"""What a command is told: the options of mir, heatmap and doctor, and settings in YAML files."""

import contextlib
import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

T = TypeVar("T")


# -- options -------------------------------------------------------------------------------------


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

    The image is the prompt and the text the answer, in the processor's chat template; one without
    a template gets `fastalign.data.plain_template`, which puts the text after the image.

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
        resamples: Groups of pairs for the standard error of MIR; 0 for none. 10 by default, or as
            many as the pairs, and the memory of so many metrics, allow.
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
    resamples: int | None = None


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


@dataclass(kw_only=True)
class Doctor:
    """What is installed, and which path each op takes here and why; and what works with a model.

    Attributes:
        model: Folder of a model: what of fastalign works with it, and what adapters cost. Of the
            folder only config.json is read.
        adapter: Folder of an adapter of this model, to tell its size too.
        json: Write the report here.
    """

    model: Path | None = None
    adapter: Path | None = None
    json: Path | None = None


# -- YAML files ----------------------------------------------------------------------------------


def config_option(argv: list[str]) -> Path | None:
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
