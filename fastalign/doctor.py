"""What is installed, and which path each op takes here and why, as data."""

import importlib.metadata
import importlib.util
import platform
import re
from typing import Any

import fastalign


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
    rows = []
    for group in (ops, losses, linalg):
        for name in group.__all__:
            if not callable(getattr(group, name)) or isinstance(getattr(group, name), type):
                continue
            # One stem: an op with a kernel is a module of fastalign.ops and of fastalign_kernels.
            if not _found(f"fastalign.ops.{name}"):
                path, why = "torch", "no kernel of its own"
            elif not cuda:
                path, why = _path_on_cpu(name)
            elif not _found("triton"):
                path, why = _path_without_triton(name)
            else:
                path, why = "triton", f"CUDA tensors; {_path_on_cpu(name)[0]} for those on the CPU"
            module = group.__name__.removeprefix("fastalign.")
            rows.append({"op": f"{module}.{name}", "path": path, "why": why})
    return rows


def _path_without_triton(op: str) -> tuple[str, str]:
    """Path and reason of an op with a kernel, for tensors on CUDA."""
    from fastalign_kernels import native

    if op not in native.CUDA_OPS:
        return "torch", "triton is not installed"
    if native.CUDA_OBSTACLE is not None:
        return "torch", f"triton is not installed; compiled kernels: {native.CUDA_OBSTACLE}"
    return "compiled", "CUDA tensors, as triton is not installed; torch for float64"


def _path_on_cpu(op: str) -> tuple[str, str]:
    """Path and reason of an op with a kernel, for tensors on the CPU."""
    from fastalign_kernels import native

    if op not in native.OPS:
        return "torch", "no CUDA device for its kernel"
    if native.OBSTACLE is not None:
        return "torch", f"no CUDA device; compiled kernels of the CPU: {native.OBSTACLE}"
    if op != "structure_distill":
        return "compiled", f"on the CPU, {native.instructions()}; torch for float64"
    if not native.MULTIPLIES_BFLOAT16:
        return "torch", "this processor lacks avx512_bf16, which its compiled kernel needs"
    return "compiled", "on the CPU, avx512_bf16, bfloat16 of at most d patches; else torch"


def _attention() -> list[dict[str, Any]]:
    """The back ends of packed attention: which can run here, where each is taken, and why not."""
    import torch

    from fastalign.models import _packed

    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    places: list[tuple[torch.device, list[torch.dtype]]] = [
        (device, [torch.bfloat16, torch.float32]) for device in cuda
    ]
    places.append((torch.device("cpu"), [torch.float32]))
    rows = []
    for name in _packed.BACKENDS[1:]:
        taken, reasons = [], []
        for device, dtypes in places:
            best = [dtype for dtype in dtypes if _packed.choose(device, dtype) == name]
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in best)
            taken += [f"{device} ({kinds})" if len(dtypes) > 1 else f"{device}"] if best else []
            reasons.append(_packed.obstacle(name, device, dtypes[0]))
        usable = None in reasons
        why = f"taken on {', '.join(taken)}" if taken else "when named" if usable else reasons[0]
        if name == "flash-attn" and usable and not taken:
            why = "taken with a softcap, else when named"
        installed = not (reasons[0] or "").startswith("not installed")
        package = _packed.LIBRARIES[name].package if name in _packed.LIBRARIES else None
        version = _version(package or "torch") if installed else None
        row = {"name": name, "version": version, "installed": installed, "usable": usable}
        rows.append({**row, "why": why})
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
