"""Every way in which an op is computed, as one parameter of its tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _emulated import UNUSABLE as NOT_EMULATED
from _emulated import emulated as skip_if_not_emulated
from fastalign_kernels import native

BEST = native.instructions()
INSTRUCTIONS = ("plain", "avx2", "avx512")


def _unusable(instructions: str) -> str | None:
    """Why the compiled kernels are not tested here in these instructions."""
    if native.OBSTACLE is not None:
        return f"the compiled kernels are not in use: {native.OBSTACLE}"
    if torch.cuda.is_available():
        return "what runs on the CPU is tested where there is no GPU"
    try:
        torch.ops.fastalign.native_use(instructions)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    torch.ops.fastalign.native_use(BEST)
    return None


UNUSABLE = {instructions: _unusable(instructions) for instructions in INSTRUCTIONS}


def compiled(instructions: str = BEST or "plain") -> pytest.MarkDecorator:
    """Skips, with the reason, what needs the compiled kernels in these instructions."""
    return pytest.mark.skipif(
        UNUSABLE[instructions] is not None, reason=str(UNUSABLE[instructions])
    )


class Compiled:
    """`fn` in one instruction set, which stays in use until the test ends."""

    def __init__(self, fn: Callable[..., Any], instructions: str) -> None:
        self.fn, self.instructions = fn, instructions

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        torch.ops.fastalign.native_use(self.instructions)
        return self.fn(*inputs, **options)


class Paths:
    """The functions of one op: all take the same arguments.

    Args:
        public: What users call.
        kernel: The Function of the Triton kernels, which on a CPU `public` passes by.
        reference: The reference, which `public` passes by where a kernel is in use.
        native: The Function of the compiled kernels.
        emulated: That of their CUDA part, run on the CPU, where the op has one.
    """

    def __init__(
        self, public: Any, kernel: Any, reference: Any, native: Any, emulated: Any = None
    ) -> None:
        self.fixed = {"public": public, "kernel": kernel, "reference": reference}
        self.compiled = {name: Compiled(native, name) for name in INSTRUCTIONS}
        self.emulated = {} if emulated is None else {"emulated": emulated}

    @property
    def every(self) -> pytest.MarkDecorator:
        """Runs a test with `fn` as each of them."""
        return self._parametrize(*self.fixed)

    @property
    def kernels(self) -> pytest.MarkDecorator:
        """The same of those that are compared with the reference."""
        return self._parametrize("kernel")

    @property
    def usable(self) -> list[Any]:
        """All that run here, for a test that draws its inputs."""
        found = [fn for name, fn in self.compiled.items() if UNUSABLE[name] is None]
        found += self.emulated.values() if NOT_EMULATED is None else []
        return [*self.fixed.values(), *found]

    def _parametrize(self, *fixed: str) -> pytest.MarkDecorator:
        found = [pytest.param(self.fixed[name], id=name) for name in fixed]
        found += [
            pytest.param(fn, id=f"native-{name}", marks=compiled(name))
            for name, fn in self.compiled.items()
        ]
        found += [
            pytest.param(fn, id=f"native-{name}", marks=skip_if_not_emulated)
            for name, fn in self.emulated.items()
        ]
        return pytest.mark.parametrize("fn", found)
