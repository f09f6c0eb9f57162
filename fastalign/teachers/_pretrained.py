"""Teachers and pixel statistics from folders of transformers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

Statistics = tuple[Sequence[float], Sequence[float]]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_SETTINGS = (
    *("do_normalize", "image_mean", "image_std"),
    *("do_rescale", "rescale_factor", "rescale_offset"),
)
# Only masked images have it, and a teacher masks none.
_UNUSED = ("mask_token",)


def load_model(path: str) -> nn.Module:
    """The model at `path` without a head, in the dtype of its weights.

    Raises:
        FileNotFoundError: There is no such folder, or it has no configuration or safetensors.
        ValueError: transformers does not know the type of the model, or weights are missing.
    """
    import transformers

    _check_folder("path", path, ("config.json",))
    auto: Any = transformers.AutoModel
    try:
        model, about = auto.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(
            f"path must be a model's folder with config.json and safetensors, or a hub name: "
            f"{path}: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"path must hold a model of a type that transformers {transformers.__version__} "
            f"knows: {path}: {error}"
        ) from error
    missing = sorted(k for k in about["missing_keys"] if not k.endswith(_UNUSED))
    if missing or about["mismatched_keys"]:
        raise ValueError(
            f"{path} must hold all weights of {type(model).__name__}: missing {missing[:5]} and "
            f"{max(0, len(missing) - 5)} more, of another shape {list(about['mismatched_keys'])}"
        )
    result: nn.Module = model
    return result


def statistics_at(path: str, name: str, *, missing_ok: bool = False) -> Statistics | None:
    """Pixel statistics of the processor at `path`; None when there is none and that is fine.

    Args:
        path: Folder or hub name, also of a processor that wraps an image processor.
        name: The argument that errors name.
        missing_ok: Whether there may be no processor.

    Raises:
        FileNotFoundError: There is no such folder or no processor in it.
        ValueError: The processor does not say how it normalises.
    """
    from transformers import AutoImageProcessor
    from transformers.models.auto.image_processing_auto import get_image_processor_config

    folder = Path(path)
    if missing_ok and folder.is_dir() and not any((folder / f).is_file() for f in _PROCESSORS):
        return None
    _check_folder(name, path, _PROCESSORS)
    loader: Any = AutoImageProcessor
    read: Any = get_image_processor_config
    try:
        found = loader.from_pretrained(path)
        processor = {key: getattr(found, key) for key in _SETTINGS if hasattr(found, key)}
    except (OSError, ValueError, ImportError) as error:
        # A class may need what is not installed (DINOv3's has no form without torchvision).
        try:
            processor = read(path)
        except OSError:
            processor = {}
        if not processor and missing_ok:
            return None
        if not processor:
            raise FileNotFoundError(
                f"{name} must be a folder or hub name with an image processor "
                f"({' or '.join(_PROCESSORS)}): {path}: {error}"
            ) from error
    try:
        return statistics_of(processor)
    except ValueError as error:
        raise ValueError(f"{name}: {path}: {error}") from None


def statistics_of(settings: Mapping[str, Any]) -> Statistics:
    """Mean and standard deviation for pixels in 0..1, of an image processor's settings.

    A processor gives (p * rescale_factor - offset - image_mean) / image_std for pixels p in 0..255,
    where it does not leave out a step; offset is 1 with `rescale_offset` (EfficientNet).

    Raises:
        ValueError: There is no `image_mean` or `image_std` of three numbers.
    """
    mean: Any = [0.0] * 3
    std: Any = [1.0] * 3
    if settings.get("do_normalize", True):
        mean, std = (settings.get(key) for key in ("image_mean", "image_std"))
        mean, std = ([x] * 3 if isinstance(x, float) else x for x in (mean, std))
        if not all(isinstance(x, Sequence) and len(x) == 3 for x in (mean, std)):
            raise ValueError(
                "the image processor must have image_mean and image_std of 3 channels, or "
                f"do_normalize false: got {mean} and {std}"
            )
    scale, offset = 1.0, 0.0
    if settings.get("do_rescale", True):
        scale = settings.get("rescale_factor", 1 / 255)
        offset = float(bool(settings.get("rescale_offset", False)))
    span = 255.0 * scale
    return [(m + offset) / span for m in mean], [s / span for s in std]


def _check_folder(name: str, path: str, files: Sequence[str]) -> None:
    """A path that exists or cannot be a hub name must be a folder with one of `files`."""
    folder = Path(path)
    named = len(folder.parts) <= 2 and not folder.is_absolute() and not path.startswith(".")
    if path and named and not folder.exists():
        return
    if not any((folder / file).is_file() for file in files):
        what = "is no folder" if not folder.is_dir() else "has none"
        raise FileNotFoundError(
            f"{name} must be a folder with a {' or '.join(files)}: {path or repr(path)} {what}"
        )
