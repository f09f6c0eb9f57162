"""Compile every kernel for every GPU generation, without a GPU, and check what came out.

    python -m benchmarks.offline [--arch 80 90 100] [--dim 1 127 4096 8192 16384] [--dtype ...]
                                 [--full] [--jobs N] [--markdown docs/performance.md]

Each kernel is compiled for each dtype and launch configuration. A row fails when the compiler
refuses, an offset is multiplied in 32 bits that might not fit (rows beyond 2^31 elements would
overlap), registers spill, the block cannot be launched, or aligned rows are not moved 16 bytes at a
time; a matrix product also when the matrix instruction of the GPU is missing or spills are in its
loop, and one that loads through tensor descriptors when no such load is left. The exit status says
whether any did. It does not run in Triton's interpreter.

The last points are read from machine code, and with --full all are; taking it apart costs more than
compiling a small kernel, so that other kernels are judged by their PTX.
"""

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fastalign_kernels import calibrate, hadamard_reweight, label_logits
from fastalign_kernels._op import DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import _machine_code as machine_code
from benchmarks._offline_table import Row, markdown, splice
from benchmarks._offsets import narrow_products
from benchmarks._processes import in_processes

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block, by architecture
REGISTERS = 65536  # of one multiprocessor
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
WIDTHS = ("d", "dt", "w_stride")  # arguments that are divisible by 16 when `d` is
SIZES = ("n", "v", "rows", *WIDTHS)  # arguments that are 1 when `d` is
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # for the compiler
SHOWN = 4096  # row length of the table in the documentation


@dataclass(frozen=True)
class Variant:
    """One kernel in one configuration.

    Args:
        kernel: The @triton.jit function.
        types: Triton's type of each argument that is no constexpr; "*" is a pointer to the
            activations' dtype, "tensordesc<*[128,64]>" a descriptor of tiles of it.
        constants: The constexprs, num_warps and num_stages, as the launcher passes them.
        d: Row length; divisible by 16 or not, as it is specialised at a launch.
        wide: Whether it must read aligned rows 16 bytes at a time.
        spill: Bytes a thread may spill; none in the loop of a matrix product.
        matrix: Whether it must hold the matrix instruction of its architecture.
        descriptor: Whether it must load through tensor descriptors; not compiled for sm_80.
        offsets: Whether it multiplies offsets, which must be in 64 bits.
        archs: What it is launched on.
        dtypes: What it is launched for.
        note: What tells it from variants of the same kernel with the same flags.
    """

    kernel: JITFunction
    types: dict[str, str]
    constants: dict[str, Any]
    d: int
    wide: bool = True
    spill: int = 0
    matrix: bool = False
    descriptor: bool = False
    offsets: bool = True
    archs: tuple[int, ...] = (80, 90, 100)
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)
    note: str = ""

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants.items() if value is True]
        name = self.kernel.__name__.lstrip("_")
        return " ".join([name, *flags, *([self.note] if self.note else [])])

    def runs(self, arch: int, dtype: torch.dtype) -> bool:
        """Whether it is launched on this architecture for this dtype."""
        return arch in self.archs and dtype in self.dtypes and not (self.descriptor and arch < 90)


def _hadamard_reweight(d: int) -> Iterator[Variant]:
    if d > hadamard_reweight.MAX_DIM:
        return
    rows = {"h_ptr": "*", "w_ptr": "*", "d": "i32", "w_stride": "i32"}
    config = hadamard_reweight._config(d)
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


def _label_logits(d: int) -> Iterator[Variant]:
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


def _calibrate(d: int) -> Iterator[Variant]:
    config = calibrate._config(d)
    tile = {"n": "i32", "d": "i32", "x_ptr": "*", "mask_ptr": "*i1"}
    for scale in ("*", "*fp32"):
        types = {**tile, "scale_ptr": scale, "shift_ptr": scale, "y_ptr": "*"}
        yield Variant(calibrate._calibrate_fwd, types, config, d)
    sums = {"dscale_ptr": "*fp32", "dshift_ptr": "*fp32", "chunk": "i32"}
    types = {**tile, **sums, "scale_ptr": "*fp32", "dy_ptr": "*", "dx_ptr": "*"}
    yield Variant(calibrate._calibrate_bwd, types, config, d)


# One function for each module of kernels: a new module adds its own here.
MODULES: tuple[Callable[[int], Iterator[Variant]], ...] = (
    _hadamard_reweight,
    _label_logits,
    _calibrate,
)


def variants(d: int) -> Iterator[Variant]:
    """Every kernel as its launcher configures it for rows of `d`; for d = 1 all sizes are 1."""
    for module in MODULES:
        yield from module(d)


def compile_for(arch: int, variant: Variant, dtype: torch.dtype) -> Any:
    """The compiled kernel, with the alignment hints that a launch on torch's tensors gives."""
    names = variant.kernel.arg_names
    name = TYPES[dtype]
    types = {
        k: f"*{name}" if t == "*" else t.replace("<*[", f"<{name}[")
        for k, t in variant.types.items()
    }
    constants = {k: value for k, value in variant.constants.items() if k in names}
    specialised = {p.name for p in variant.kernel.params if not p.do_not_specialize}
    if variant.d == 1:  # a launch makes constants of arguments that are 1
        ones = types.keys() & specialised & set(SIZES)
        types = {k: t for k, t in types.items() if k not in ones}
        constants |= dict.fromkeys(ones, 1)
    assert set(names) == types.keys() | constants.keys(), f"{variant}: arguments changed"
    aligned = [k for k, t in types.items() if t.startswith("*")]
    if variant.d % 16 == 0:
        aligned += [k for k in WIDTHS if k in types]
    source = ASTSource(
        fn=variant.kernel,
        signature={k: types.get(k, "constexpr") for k in names},
        constexprs={(names.index(k),): value for k, value in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned if k in specialised},
    )
    options = {k: value for k, value in variant.constants.items() if k in OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def matrix_faults(arch: int, variant: Variant, sass: str) -> tuple[str, list[str]]:
    """The matrix instruction that the machine code holds, and what is wrong with it."""
    code = [line for lines in machine_code.sections(sass) for line in machine_code.opcodes(lines)]
    wrong = []
    used = {m.group() for m in (re.match(machine_code.MATRIX[arch], line) for line in code) if m}
    if variant.matrix and not used:
        name = machine_code.MATRIX[arch].replace(r"\w", "")
        wrong.append(f"no matrix instruction: {name} is missing")
    if variant.descriptor and not any(machine_code.DESCRIPTOR.match(line) for line in code):
        wrong.append("nothing is loaded through a tensor descriptor: no UTMALDG")
    for loop in machine_code.matrix_loops(sass, arch):
        spills = sum(machine_code.LOCAL.match(line) is not None for line in loop)
        if spills:
            wrong.append(f"{spills} spills among the {len(loop)} instructions of a matrix loop")
    return "+".join(sorted(used)) or "-", wrong


def _labels(arch: int, variant: Variant, dtype: torch.dtype) -> dict[str, Any]:
    """What a row says about its variant; the documentation shows one length, one dtype or two."""
    shown = (torch.bfloat16, torch.float32) if variant.matrix else (torch.bfloat16,)
    return {
        "kernel": str(variant),
        "d": variant.d,
        "dtype": str(dtype).removeprefix("torch."),
        "arch": arch,
        "shown": variant.d == SHOWN and dtype in shown,
    }


def check(arch: int, variant: Variant, dtype: torch.dtype, full: bool = False) -> Row:
    """Compiles a variant and judges it; `full` takes its machine code apart in any case."""
    labels = _labels(arch, variant, dtype)
    try:
        kernel = compile_for(arch, variant, dtype)
    except Exception as error:  # of any of five compilers; the others are still to be tried
        return Row(**labels, wrong=(f"{type(error).__name__}: {str(error).strip()}",))
    ttir = kernel.asm["ttir"]
    wrong = [f"32-bit product: {line}" for line in narrow_products(ttir)]
    if variant.offsets and variant.d > 1 and not re.search(r"arith\.muli.*i64", ttir):
        wrong.append("no row offset in 64 bits")
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    if shared > SHARED_BYTES[arch]:
        wrong.append(f"{shared} bytes of shared memory, of {SHARED_BYTES[arch]}")
    registers, spilled = machine_code.resources(kernel.asm["cubin"])
    if spilled > variant.spill:
        wrong.append(f"{spilled} bytes spilled, of {variant.spill}")
    if -(-registers // 8) * 8 * threads > REGISTERS:  # given out by 8
        wrong.append(f"{registers} registers by {threads} threads")
    matrix, code = "-", kernel.asm["ptx"]
    if full or variant.matrix or variant.descriptor:
        code = machine_code.disassemble(kernel.asm["cubin"])
        matrix, more = matrix_faults(arch, variant, code)
        wrong += more
    reads, writes = (p.search(code) is not None for p in (machine_code.READS, machine_code.WRITES))
    if variant.wide and variant.d % 16 == 0 and not reads:
        wrong.append("aligned rows are not read 16 bytes at a time")
    wide = {(1, 1): "both", (1, 0): "read", (0, 1): "write"}.get((reads, writes), "-")
    return Row(
        **labels,
        wrong=tuple(wrong),
        registers=registers,
        spilled=spilled,
        shared=shared,
        threads=threads,
        wide=wide,
        matrix=matrix,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dim", type=int, nargs="+", default=[1, 127, 4096, 8192, 16384])
    parser.add_argument("--dtype", nargs="+", default=[str(t)[6:] for t in DTYPES])
    parser.add_argument("--full", action="store_true", help="take all machine code apart")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="rewrite its table")
    options = parser.parse_args(argv)
    if not isinstance(calibrate._calibrate_fwd, JITFunction):
        parser.error("kernels are interpreted: unset TRITON_INTERPRET")
    if options.markdown is not None:
        try:
            splice(options.markdown, "")
        except ValueError as error:
            parser.error(str(error))
    start = time.perf_counter()
    jobs = [
        (arch, variant, getattr(torch, name), options.full)
        for d in options.dim
        for variant in variants(d)
        for name in options.dtype
        for arch in options.arch
        if variant.runs(arch, getattr(torch, name))
    ]
    rows = []
    print(Row.header())
    for job, row in zip(jobs, in_processes(check, jobs, options.jobs), strict=True):
        if row is None:
            row = Row(**_labels(*job[:3]), wrong=("its process died: see what it printed",))
        rows.append(row)
        print(row, *(f"    FAILED: {fault}" for fault in row.wrong), sep="\n", flush=True)
    failed = sum(bool(row.wrong) for row in rows)
    if options.markdown is not None:
        options.markdown.write_text(splice(options.markdown, markdown(rows)), encoding="utf-8")
    seconds = time.perf_counter() - start
    print(f"{len(rows)} kernels compiled in {seconds:.0f} s, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
