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
from pathlib import Path
from typing import Any

import torch
import triton
from fastalign_kernels import calibrate
from fastalign_kernels._op import DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks import _machine_code as machine_code
from benchmarks._offline_table import Row, markdown, splice
from benchmarks._offsets import narrow_products
from benchmarks._processes import in_processes
from benchmarks._variants import Variant as Variant
from benchmarks._variants import variants

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block, by architecture
REGISTERS = 65536  # of one multiprocessor
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
WIDTHS = ("d", "dt", "v", "w_stride", "tokens")  # arguments that are divisible by 16 when `d` is
SIZES = ("n", "rows", *WIDTHS)  # arguments that are 1 when `d` is
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")  # for the compiler
SHOWN = 4096  # row length of the table in the documentation


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
