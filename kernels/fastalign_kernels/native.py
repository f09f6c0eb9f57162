"""The compiled kernels of `csrc`, where they were built: `torch.ops.fastalign.<name>.native`.

They have the names and arguments of the Triton launchers and run on the CPU; some of them on CUDA,
too. Imports torch only.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign_kernels import _fakes
from fastalign_kernels._op import DTYPES, one_by_one

_LIBRARY = torch.library.Library("fastalign", "FRAGMENT")


OPERATORS = (
    *("calibrate_fwd", "calibrate_bwd", "hadamard_reweight_fwd", "hadamard_reweight_bwd"),
    *("label_logits_fwd", "label_logits_bwd_hidden", "label_logits_bwd_weight"),
    *("structure_distill_fwd", "structure_distill_bwd"),
)


def _load() -> str | None:
    """Load the extension; why not, where that fails."""
    path = Path(__file__).with_name("_C.abi3.so")
    if not path.is_file():
        return "not built: pip install --no-build-isolation from a source, with a C++ compiler"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"built, but not loaded: {error}"
    if any("native" not in _overloads(name) for name in OPERATORS):
        return "built from other sources: build again"
    return None


def _overloads(name: str) -> list[str]:
    try:
        found: list[str] = getattr(torch.ops.fastalign, name).overloads()
    except AttributeError:
        return []
    return found


OBSTACLE = _load()
"""Why the compiled kernels are not in use; None where they are."""


def _cuda_obstacle() -> str | None:
    if OBSTACLE is not None:
        return OBSTACLE
    if not _overloads("native_cuda_obstacle"):
        return "built without nvcc"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return torch.ops.fastalign.native_cuda_obstacle() or None


CUDA_OBSTACLE = _cuda_obstacle()
"""Why those for CUDA are not; None where they can be. No GPU is touched to know it."""

OPS = ("calibrate", "hadamard_reweight", "label_logits", "structure_distill")
"""Those that have compiled kernels."""

CUDA_OPS = ("hadamard_reweight",)
"""Those that have them for CUDA, too."""

MAX_DIM = 16384
"""Numbers of a row that fit the registers of a block on CUDA."""


def register(name: str, overload: str) -> Callable[..., Any]:
    """The operator with its fake and its rule for vmap, as `fastalign_kernels._op.op` makes it."""
    full = f"fastalign::{name}.{overload}"
    operator: Callable[..., Any] = getattr(getattr(torch.ops.fastalign, name), overload)
    torch.library.register_fake(full, getattr(_fakes, name), lib=_LIBRARY)
    _LIBRARY.impl(f"{name}.{overload}", torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_vmap(full, one_by_one(operator), lib=_LIBRARY)
    return operator


def _operator(name: str) -> Callable[..., Any]:
    why = OBSTACLE
    if why is None and "native" not in _overloads(name):  # only CUDA has it
        why = CUDA_OBSTACLE
    if why is None:
        return register(name, "native")

    def absent(*_: object) -> None:
        raise RuntimeError(f"the compiled kernels are not in use: {why}")

    return absent


hadamard_reweight_fwd = _operator("hadamard_reweight_fwd")
hadamard_reweight_bwd = _operator("hadamard_reweight_bwd")
calibrate_fwd = _operator("calibrate_fwd")
calibrate_bwd = _operator("calibrate_bwd")
label_logits_fwd = _operator("label_logits_fwd")
label_logits_bwd_hidden = _operator("label_logits_bwd_hidden")
label_logits_bwd_weight = _operator("label_logits_bwd_weight")
structure_distill_fwd = _operator("structure_distill_fwd")
structure_distill_bwd = _operator("structure_distill_bwd")
inverse_norms = _operator("inverse_norms")


def takes(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels run on these: all on the CPU, in types that they know."""
    return OBSTACLE is None and all(
        t is None or (t.device.type == "cpu" and t.dtype in DTYPES) for t in tensors
    )


def takes_cuda(x: Tensor, *others: Tensor) -> bool:
    """Whether those for CUDA run on these: rows on one GPU, in types and of a length they know."""
    return (
        CUDA_OBSTACLE is None
        and x.is_cuda
        and x.shape[-1] <= MAX_DIM
        and all(t.dtype in DTYPES for t in (x, *others))
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def takes_structure(student: Tensor, teacher: Tensor, longest: int) -> bool:
    """The same of structure_distill, whose products need bfloat16 and an instruction for it.

    Where an image has more patches than the student channels, the gradient is fewer numbers than R
    and another order of products does less work: the portable path has it.
    """
    return (
        takes(student, teacher)
        and student.dtype == teacher.dtype == torch.bfloat16
        and longest <= student.shape[-1]
        and MULTIPLIES_BFLOAT16
    )


def instructions() -> str | None:
    """The instruction set in use: "avx512", "avx2" or "plain"; None where there are no kernels."""
    if OBSTACLE is not None:
        return None
    name: str = torch.ops.fastalign.native_instructions()
    return name


MULTIPLIES_BFLOAT16 = OBSTACLE is None and torch.ops.fastalign.native_has_structure_distill()
"""Whether structure_distill has a compiled kernel on this processor."""
