"""Compile every kernel for every GPU generation, without a GPU, and check what came out.

    python -m benchmarks.offline [--arch 80 90 100] [--dim 1 127 4096 8192 16384] [--dtype ...]

Each kernel is compiled for each dtype and launch configuration. A row fails when the compiler
refuses, an offset is multiplied in 32 bits (rows beyond 2^31 elements would overlap), registers
spill, the block cannot be launched, or aligned rows are not moved 16 bytes at a time. The exit
status says whether any did. It does not run in Triton's interpreter.
"""

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from fastalign_kernels import calibrate, hadamard_reweight, label_logits
from fastalign_kernels._op import DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block, by architecture
REGISTERS = 65536  # of one multiprocessor
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration.

    Args:
        kernel: The @triton.jit function.
        types: Triton's type of each argument that is no constexpr; "*" is the activations' dtype.
        constants: The constexprs and num_warps, as the launcher passes them.
        d: Row length; divisible by 16 or not, as it is specialised at a launch.
        wide: Whether it must move aligned rows 16 bytes at a time.
        spill: Bytes a thread may spill.
    """

    kernel: JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    d: int
    wide: bool = True
    spill: int = 0

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants.items() if value is True]
        return " ".join([self.kernel.__name__.lstrip("_"), *flags])


def variants(d: int) -> Iterator[Variant]:
    """Every kernel as its launcher configures it for rows of `d`; for d = 1 all sizes are 1."""
    sizes = {"n": "i32", "d": "i32"}
    rows = {"h_ptr": "*", "w_ptr": "*", "d": "i32", "w_stride": "i32"}
    config = hadamard_reweight._config(d)
    if d <= hadamard_reweight.MAX_DIM:
        kernel = hadamard_reweight._hadamard_reweight_fwd
        yield Variant(kernel, {**rows, "y_ptr": "*"}, config, d)
        kernel = hadamard_reweight._hadamard_reweight_bwd
        for needs_w, shared in ((True, False), (True, True), (False, False)):
            dw = "*fp32" if shared else "*"
            types = {**rows, "dy_ptr": "*", "dh_ptr": "*", "dw_ptr": dw, "n": "i32"}
            constants = {"NEEDS_W": needs_w, "SHARED": shared, **config}
            if shared:
                types["rows"] = "i32"
            else:
                constants["rows"] = 1
            yield Variant(kernel, types, constants, d, spill=256 if d > 8192 else 0)

    config = label_logits._config(d)
    picked = {"weight_ptr": "*", "labels_ptr": "*i64", "d": "i32", "v": "i32"}
    for bias in (False, True):
        types = {**picked, "hidden_ptr": "*", "bias_ptr": "*", "y_ptr": "*fp32"}
        yield Variant(label_logits._label_logits_fwd, types, {"HAS_BIAS": bias, **config}, d)
    types = {**picked, "dy_ptr": "*fp32", "dhidden_ptr": "*"}
    yield Variant(label_logits._label_logits_bwd_hidden, types, config, d)
    types = {"dy_ptr": "*fp32", "hidden_ptr": "*", "dweight_ptr": "*", "dbias_ptr": "*"}
    types |= {"sorted_ptr": "*i64", "order_ptr": "*i64", "end_ptr": "*i64", "d": "i32", "v": "i32"}
    kernel = label_logits._label_logits_bwd_weight
    yield Variant(kernel, types, label_logits._config_weight(d), d, wide=False)

    config = calibrate._config(d)
    tile = {**sizes, "x_ptr": "*", "mask_ptr": "*i1"}
    for scale in ("*", "*fp32"):
        types = {**tile, "scale_ptr": scale, "shift_ptr": scale, "y_ptr": "*"}
        yield Variant(calibrate._calibrate_fwd, types, config, d)
    sums = {"dscale_ptr": "*fp32", "dshift_ptr": "*fp32", "chunk": "i32"}
    types = {**tile, **sums, "scale_ptr": "*fp32", "dy_ptr": "*", "dx_ptr": "*"}
    yield Variant(calibrate._calibrate_bwd, types, config, d)


def compile_for(arch: int, variant: Variant, dtype: torch.dtype) -> Any:
    """The compiled kernel, with the alignment hints that a launch on torch's tensors gives."""
    names = variant.kernel.arg_names
    types = {k: TYPES[dtype] if t == "*" else t for k, t in variant.types.items()}
    constants = {k: value for k, value in variant.constants.items() if k in names}
    if variant.d == 1:  # a launch makes constants of arguments that are 1
        ones = types.keys() & {"n", "d", "v", "w_stride", "rows"}
        types = {k: t for k, t in types.items() if k not in ones}
        constants |= dict.fromkeys(ones, 1)
    assert set(names) == types.keys() | constants.keys(), f"{variant}: arguments changed"
    aligned = [k for k, t in types.items() if t.startswith("*")]
    if variant.d % 16 == 0:
        aligned += [k for k in ("d", "w_stride") if k in types]
    source = ASTSource(
        fn=variant.kernel,
        signature={k: types.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): value for k, value in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    options = {"num_warps": variant.constants["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> tuple[int, int] | None:
    """Registers a thread and bytes of stack and local memory; None without cuobjdump."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin/cuobjdump"
    if not tool.is_file():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources: {text[:200]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def narrow_products(ttir: str) -> list[str]:
    """The lines that multiply in 32 bits: kernels widen a row's number before any product."""
    return re.findall(r"^.*arith\.muli.*: (?:tensor<[\dx]*)?i32.*$", ttir, re.MULTILINE)


def faults(arch: int, variant: Variant, dtype: torch.dtype) -> tuple[str, list[str]]:
    """The columns to print, and what is wrong."""
    kernel = compile_for(arch, variant, dtype)
    wrong = [f"32-bit product: {line.strip()}" for line in narrow_products(kernel.asm["ttir"])]
    if variant.d > 1 and not re.search(r"arith\.muli.*i64", kernel.asm["ttir"]):
        wrong.append("no row offset in 64 bits")
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    if shared > SHARED_BYTES[arch]:
        wrong.append(f"{shared} bytes of shared memory, of {SHARED_BYTES[arch]}")
    used = resources(kernel.asm["cubin"])
    if used is not None:
        if used[1] > variant.spill:
            wrong.append(f"{used[1]} bytes spilled, of {variant.spill}")
        if used[0] * threads > REGISTERS:
            wrong.append(f"{used[0]} registers by {threads} threads")
    wide = re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", kernel.asm["ptx"])
    if variant.wide and variant.d % 16 == 0 and not wide:
        wrong.append("aligned rows are not read 16 bytes at a time")
    registers, spilled = used or ("-", "-")
    return f"{registers:>5} {spilled:>6} {shared:>7} {threads:>8} {wide is not None!s:>6}", wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dim", type=int, nargs="+", default=[1, 127, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", default=[str(t)[6:] for t in DTYPES])
    options = parser.parse_args(argv)
    if not isinstance(calibrate._calibrate_fwd, JITFunction):
        parser.error("kernels are interpreted: unset TRITON_INTERPRET")
    start, count, failed = time.perf_counter(), 0, 0
    print(f"{'kernel':44} {'d':>6} {'dtype':9} sm   regs  spill  shared  threads 16-byte")
    for d in options.dim:
        for variant in variants(d):
            for name in options.dtype:
                for arch in options.arch:
                    columns, wrong = faults(arch, variant, getattr(torch, name))
                    print(f"{variant!s:44} {d:6} {name:9} {arch:3} {columns}", flush=True)
                    for fault in wrong:
                        print(f"    FAILED: {fault}")
                    count, failed = count + 1, failed + bool(wrong)
    seconds = time.perf_counter() - start
    print(f"{count} kernels compiled in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
