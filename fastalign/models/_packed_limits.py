"""What the libraries of packed attention take, and why one cannot run what is asked for."""

import importlib
import importlib.machinery
import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastalign.models import _packed_backends as libraries

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Library:
    """Where the function of a back end is.

    Attributes:
        module: Holds the function.
        function: Its name there.
        package: The distribution that holds the module, or None for torch.
        dtypes: Taken on CUDA.
        softcap: Whether scores can be capped.
        pip: Options with which pip installs the package.
    """

    module: str
    function: str
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = _HALF
    softcap: bool = False
    pip: str = ""


LIBRARIES = {
    "varlen": Library("torch.nn.attention.varlen", "varlen_attn"),
    "flash-attn": Library(
        *("flash_attn", "flash_attn_varlen_func", "flash-attn"),
        softcap=True,
        pip="--no-build-isolation ",
    ),
    # It puts its modules into the folder of flash-attn, which it neither needs nor holds.
    "flash-attn-4": Library(
        "flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4", softcap=True
    ),
    "xformers": Library(
        "xformers.ops", "memory_efficient_attention", "xformers", (*_HALF, torch.float32)
    ),
    "flex": Library(
        *("torch.nn.attention.flex_attention", "flex_attention"),
        dtypes=(*_HALF, torch.float32),
        softcap=True,
    ),
}


def obstacle(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int = 128,
    windowed: bool = False,
    gaps: bool = False,
    softcap: bool = False,
) -> str | None:
    """Why a back end cannot attend to such tensors, or None when it can.

    Args:
        backend: One of `BACKENDS` but "auto".
        device: Where the tensors are.
        dtype: Their dtype.
        head_dim: Width of a head.
        windowed: Whether a sliding window hides something.
        gaps: Whether that window cuts segments whose positions have gaps, so that it is none in
            tokens.
        softcap: Whether the scores are capped.
    """
    if backend == "sdpa":
        return None
    library = LIBRARIES[backend]
    if not _found(library.module):
        extra = f': pip install {library.pip}"fastalign[{backend}]"' if library.package else ""
        return f"not installed{extra}"
    if backend == "flex" and device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"runs on CUDA devices only, not on {device.type}"
    if dtype not in library.dtypes:
        return f"does not take {dtype}"
    if backend == "flex":
        return None
    if windowed and gaps:
        return "counts a sliding window in tokens, not in positions, which have gaps"
    if softcap and not library.softcap:
        return "has no softcap"
    capability = torch.cuda.get_device_capability(device)
    if backend == "xformers":
        why = _xformers(capability, dtype, head_dim, windowed)
    else:
        why = _flash(backend, capability, head_dim)
    return why or _import_error(backend)


def _flash(backend: str, capability: tuple[int, int], head_dim: int) -> str | None:
    widest = 256
    if backend == "flash-attn-4":
        if capability[0] not in (9, 10):
            return "needs a device of compute capability 9 or 10"
        widest = 256 if capability[0] == 9 else 128
    elif capability < (8, 0):
        return "needs a device of compute capability 8.0 or newer"
    if head_dim > widest:
        return f"takes heads of at most {widest} channels, not {head_dim}"
    if backend == "varlen" and not {"scale", "window_size"} <= libraries.varlen_parameters():
        return f"takes no scale in torch {torch.__version__}: a newer torch is needed"
    return None


def _xformers(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, windowed: bool
) -> str | None:
    """It has flash kernels, as the others, and CUTLASS kernels where those do not run."""
    if dtype in _HALF and head_dim <= 256 and capability >= (8, 0):
        if torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled():
            return "has no deterministic gradient, and torch is set to deterministic algorithms"
        return None
    flash = "float16 and bfloat16 with heads of at most 256 channels"
    if capability > (9, 0):
        return f"takes only {flash} on devices newer than compute capability 9.0"
    if windowed:  # it calls the gradient of its CUTLASS kernels with such a mask unsure
        return f"takes a sliding window only for {flash}, on compute capability 8.0 or newer"
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "takes bfloat16 on devices of compute capability 8.0 or newer"
    return None


@lru_cache
def _found(module: str) -> bool:
    """Whether a module is installed, without importing anything."""
    name, *inner = module.split(".")
    spec = importlib.util.find_spec(name)
    for part in inner:
        if spec is None:
            return False
        name = f"{name}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    # Without an origin it is a folder that only other packages have put modules in.
    return spec is not None and spec.origin is not None


@lru_cache
def _import_error(backend: str) -> str | None:
    """Why what is installed cannot be imported, as when it was built for another torch."""
    library = LIBRARIES[backend]
    try:
        getattr(importlib.import_module(library.module), library.function)
    except Exception as error:  # compiled modules fail in any way
        line = next(iter(str(error).splitlines()), "")
        return f"cannot be imported ({type(error).__name__}: {line})"
    return None
