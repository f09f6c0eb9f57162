"""What every test shares: the device, Triton's interpreter without a GPU, and NaN-filled memory."""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do their children
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))

settings.register_profile("fastalign", max_examples=50, deadline=None)
settings.load_profile("fastalign")

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:  # read when a kernel is defined, so before fastalign_kernels is imported
    os.environ["TRITON_INTERPRET"] = "1"


def _patch_interpreter() -> None:
    """Make the interpreter treat bfloat16 and tf32 as the hardware does.

    It keeps bfloat16 as uint16 bit patterns: unpatched, it truncates float32 to bfloat16, and does
    arithmetic on the bit patterns. Here it rounds to nearest even, multiplies matrices of the
    values, rounds tf32 operands, and refuses other arithmetic on bfloat16 (kernels widen first).
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot, binary = (
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
        InterpreterBuilder.binary_op,
    )

    def round_bits(values: np.ndarray, bits: int) -> np.ndarray:
        """The bit patterns of float32 `values`, rounded to even at the `bits` lowest."""
        patterns = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        half = (1 << (bits - 1)) - 1
        return (patterns + half + ((patterns >> bits) & 1)) >> bits

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.float32:
            return self.cast_impl(cast_impl(self, src, tl.float32), dst_type)
        if source == tl.bfloat16:
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if target == tl.bfloat16:
            values = src.data.astype(np.float32)
            patterns = round_bits(values, 16).astype(np.uint16)
            return TensorHandle(
                np.where(np.isnan(values), 0x7FFF, patterns).astype(np.uint16), target
            )
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        def operand(x: Any) -> Any:
            if x.dtype.scalar == tl.bfloat16:
                return cast_impl(self, x, tl.float32)
            if x.dtype.scalar == tl.float32 and str(precision).lower().endswith("tf32"):
                rounded = (round_bits(x.data, 13) << 13).astype(np.uint32).view(np.float32)
                return TensorHandle(rounded, tl.float32)
            return x

        return dot(self, operand(a), operand(b), d, precision, imprecise)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise TypeError("a kernel must widen bfloat16 before it computes with it")
        return binary(self, lhs, rhs, op)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.binary_op = binary_op


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    _patch_interpreter()


# Few tests that take long, each file on one process: begun last, one would keep the others waiting.
FIRST = ("wheel", "engines", "divisions", "failures", "two_ranks", "soak", "stream_runs")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # by numbers of tests, the longest of them last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in FIRST)
    _skip_smolvlm(items)


def _skip_smolvlm(items: list[pytest.Item]) -> None:
    """Without SmolVLM, whose class before 5.21 took its patches' size for its tokens' number."""
    if importlib.util.find_spec("transformers") is None:
        return
    release = importlib.metadata.version("transformers").split(".")[:2]
    if tuple(map(int, release)) < (5, 21):
        skip = pytest.mark.skip(reason="a small SmolVLM needs transformers >= 5.21")
        for item in items:
            call = getattr(item, "callspec", None)
            if call is not None and "smolvlm" in map(str, call.params.values()):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernels are tested on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """One seed a test, and torch.empty gives NaN: a kernel that skips an element cannot pass."""
    torch.manual_seed(0)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def best_instructions() -> Iterator[None]:
    """The compiled kernels are left in the instruction set that they chose."""
    yield
    from fastalign_kernels import native

    if native.instructions() is not None:
        torch.ops.fastalign.native_use("")


@pytest.fixture(scope="module")
def harness() -> Iterator[ModuleType]:
    """The package `benchmarks` of this checkout, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1]))
        yield importlib.import_module("benchmarks")
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]  # so that another test can run the package as a command
