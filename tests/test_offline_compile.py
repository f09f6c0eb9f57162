"""Kernels compile for a GPU on a machine without one; `python -m benchmarks.offline` does them all.

It runs in processes of its own, because here the kernels are interpreted.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def product(x_ptr, y_ptr, out_ptr, n, d,
            BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
            NARROW: tl.constexpr, SHIFT: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if not NARROW:
        rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, d, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows[:, None] * d + ks[None, :] + SHIFT)
        y = tl.load(y_ptr + cols[None, :] * d + ks[:, None] + SHIFT)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    out = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty))

@triton.jit
def described(x, y, out_ptr, n, d, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    top, left = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, d, BLOCK_K):
        acc = tl.dot(x.load([top, k]), y.load([left, k]).T, acc)
    rows, cols = top + tl.arange(0, BLOCK), left + tl.arange(0, BLOCK)
    out = out_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty))

@triton.jit
def triangle(p):
    j = ((tl.sqrt((8 * p + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    return p - j * (j + 1) // 2

@triton.jit
def address(x_ptr, at_ptr, d, CASE: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, 64)
    if CASE == "right: tile":
        offset = (row * 64 + lane).to(tl.int64) * d
    elif CASE == "right: column":
        offset = row.to(tl.int64) * d + tl.program_id(1) * 64 + lane
    elif CASE == "right: triangle":
        offset = triangle(row).to(tl.int64) * d + lane
    elif CASE == "right: rounded down":
        offset = row // d * d + lane
    elif CASE == "right: padded width":
        offset = row.to(tl.int64) * (tl.cdiv(d, 64) * 64) + lane
    elif CASE == "right: from memory":
        offset = tl.load(at_ptr + row).to(tl.int64) * d + lane
    elif CASE == "wrong: row":
        offset = row * d + lane
    elif CASE == "wrong: widened late":
        offset = (row * d).to(tl.int64) + lane
    elif CASE == "wrong: lanes":
        offset = row.to(tl.int64) * d + lane * d
    elif CASE == "wrong: constant width":
        offset = row * 4096 + lane
    elif CASE == "wrong: shifted":
        offset = (row << 12) + lane
    elif CASE == "wrong: strip":
        offset = row.to(tl.int64) + d * 64 + lane
    elif CASE == "wrong: divided":
        offset = row * d // 2 + lane
    elif CASE == "wrong: cut":
        offset = (row.to(tl.int64) * d).to(tl.int32) + lane
    elif CASE == "wrong: from memory":
        offset = tl.load(at_ptr + row) * d + lane
    elif CASE == "wrong: in a loop":
        offset = lane
        for _ in range(0, tl.load(at_ptr)):
            offset += row * d
    elif CASE == "wrong: in a while":
        offset = lane
        while tl.max(offset) < 100:
            offset += row * d
    elif CASE == "wrong: in a branch":
        offset = lane
        if row > 3:
            offset = lane + row * d
    elif CASE == "wrong: after a return":
        if row > tl.load(at_ptr):
            return
        offset = row * d + lane
    tl.store(x_ptr + offset, 0.0)
"""

# Runs what is judged below, and prints for each name the matrix instruction and the faults.
CHECK = """
import json
import torch
from benchmarks.offline import Variant, check
from made import address, described, product

CASES = [line.split('"')[1] for line in open("{folder}/made.py") if "if CASE ==" in line]
FP32, BF16 = torch.float32, torch.bfloat16

def multiply(block=64, warps=4, stages=3, precision="tf32x3", narrow=False, shift=0, **more):
    types = {{"x_ptr": "*", "y_ptr": "*", "out_ptr": "*", "n": "i32", "d": "i32"}}
    constants = {{"BLOCK": block, "BLOCK_K": 32, "PRECISION": precision, "NARROW": narrow}}
    constants |= {{"SHIFT": shift, "num_warps": warps, "num_stages": stages}}
    return Variant(product, types, constants, 4096, **{{"matrix": True, **more}})

def describe(block=64):
    types = {{"x": f"tensordesc<*[{{block}},64]>", "y": f"tensordesc<*[{{block}},64]>"}}
    types |= {{"out_ptr": "*", "n": "i32", "d": "i32"}}
    constants = {{"BLOCK": block, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}}
    return Variant(described, types, constants, 4096, matrix=True, descriptor=True)

def addresses(case):
    types = {{"x_ptr": "*", "at_ptr": "*i32", "d": "i32"}}
    return Variant(address, types, {{"CASE": case, "num_warps": 2}}, 127, offsets=False)

assert not describe().runs(80, BF16) and describe().runs(90, BF16)
trials = {{f"{{dtype}} {{arch}}".removeprefix("torch."): (arch, multiply(), dtype)
           for dtype in (BF16, FP32) for arch in (80, 90, 100)}}
trials |= {{f"descriptor {{arch}}": (arch, describe(), BF16) for arch in (90, 100)}}
trials |= {{case: (80, addresses(case), FP32) for case in CASES}}
trials |= {{
    "no matrix instruction": (80, multiply(precision="ieee"), FP32),
    "no matrix instruction 90": (90, multiply(precision="ieee"), FP32),
    "no matrix instruction asked": (80, multiply(precision="ieee", matrix=False), FP32),
    "narrow": (80, multiply(narrow=True), BF16),
    "spills": (80, multiply(block=256, spill=10**6), BF16),
    "stages": (80, multiply(block=128, warps=8, stages=12), BF16),
    "unaligned": (80, multiply(shift=1), BF16),
    "unaligned and not asked": (80, multiply(shift=1, wide=False), BF16),
    "no descriptor": (90, multiply(descriptor=True), BF16),
    "no product": (80, Variant(address, {{"x_ptr": "*", "at_ptr": "*i32", "d": "i32"}},
                               {{"CASE": "wrong: row", "num_warps": 2}}, 127), FP32),
}}
print(json.dumps({{name: check(*trial).__dict__ for name, trial in trials.items()}}))
"""

MAIN = """
import os
import benchmarks.offline as offline
from made import address

TYPES = {"x_ptr": "*", "at_ptr": "*i32", "d": "i32"}
PLAIN = {"CASE": "right: column", "num_warps": 2}

def module(d):
    yield offline.Variant(address, TYPES, PLAIN, d, wide=False)
    yield offline.Variant(address, TYPES, {"CASE": "unknown", "num_warps": 2}, d, note="refused")
    yield offline.Variant(address, TYPES, PLAIN, d, wide=False, note="crashed")
    yield offline.Variant(address, TYPES, PLAIN, d, wide=False, note="last", archs=(90,))

compile_for = offline.compile_for
def crash(arch, variant, dtype):
    if variant.note == "crashed":
        os._exit(7)
    return compile_for(arch, variant, dtype)

offline.variants, offline.compile_for = module, crash
arguments = "--dim 4096 --arch 80 90 --dtype bfloat16 --markdown table.md --full --jobs 2"
raise SystemExit(offline.main(arguments.split()))
"""


def run(
    folder: Path, *arguments: str, cwd: Path = ROOT, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(folder), str(ROOT), str(ROOT / "kernels")]
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What each trial of CHECK came to."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "made.py").write_text(KERNELS)
    done = run(folder, "-c", CHECK.format(folder=folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compile_within_their_budgets(tmp_path):
    # The narrowest: `.ci/run` compiles all of them, which takes as long as a tenth of these tests.
    arguments = "-m benchmarks.offline --arch 90 --dtype bfloat16 --dim 1"
    done = run(tmp_path, *arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" s, 0 failed")
    for kernel in ("hadamard_reweight_bwd", "label_logits_bwd_weight", "calibrate_bwd"):
        assert kernel in done.stdout


def test_right_products_pass(rows):
    instructions = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    for arch, instruction in instructions.items():
        for dtype in ("bfloat16", "float32"):
            row = rows[f"{dtype} {arch}"]
            assert row["wrong"] == [] and row["matrix"] == instruction, row
            assert row["wide"] in ("read", "both") and 32 < row["registers"] <= 255
            assert row["shared"] > 0 and row["threads"] == 128
    for arch in (90, 100):
        row = rows[f"descriptor {arch}"]
        assert row["wrong"] == [] and row["matrix"] == instructions[arch], row


def test_a_missing_matrix_instruction_is_found(rows):
    assert rows["no matrix instruction"]["wrong"] == ["no matrix instruction: HMMA is missing"]
    assert rows["no matrix instruction 90"]["wrong"][0].startswith("no matrix instruction")
    assert rows["no matrix instruction asked"]["wrong"] == []


def test_a_missing_descriptor_load_is_found(rows):
    (wrong,) = rows["no descriptor"]["wrong"]
    assert "UTMALDG" in wrong


def test_spills_in_a_matrix_loop_are_found(rows):
    # 256 x 256 sums over 4 warps are 512 a thread, which has 255 registers.
    assert 0 < rows["spills"]["spilled"] <= 10**6
    loops = [fault for fault in rows["spills"]["wrong"] if "matrix loop" in fault]
    assert len(loops) == 1 and not loops[0].startswith("0 ")
    assert not any("bytes spilled" in fault for fault in rows["spills"]["wrong"])


def test_narrow_reads_are_found(rows):
    assert rows["unaligned"]["wrong"] == ["aligned rows are not read 16 bytes at a time"]
    assert rows["unaligned and not asked"]["wrong"] == []


def test_too_much_shared_memory_is_found(rows):
    # 11 or 12 stages of two tiles of 128 x 32 bfloat16, 16 KiB a stage; a block has 163 KiB.
    (wrong,) = rows["stages"]["wrong"]
    assert wrong == f"{rows['stages']['shared']} bytes of shared memory, of {163 << 10}"


def test_a_32_bit_offset_is_found(rows):
    wrong = rows["narrow"]["wrong"]
    assert len(wrong) == 2 and all(fault.startswith("32-bit product: %") for fault in wrong)
    wrong = rows["no product"]["wrong"]
    assert wrong[0].startswith("32-bit product: %") and wrong[1] == "no row offset in 64 bits"


def test_offsets_are_followed_to_their_products(rows):
    right = [name for name in rows if name.startswith("right: ")]
    wrong = [name for name in rows if name.startswith("wrong: ")]
    assert len(right) == 6 and len(wrong) == 13
    assert {name: rows[name]["wrong"] for name in right} == {name: [] for name in right}
    for name in wrong:
        (fault,) = rows[name]["wrong"] or ["nothing"]
        assert fault.startswith("32-bit product: %"), f"{name}: {fault}"


def test_one_failure_stops_no_other(tmp_path):
    (tmp_path / "made.py").write_text(KERNELS)
    page = tmp_path / "table.md"
    page.write_text("# A\n\n<!-- offline: begin -->\nold\n<!-- offline: end -->\n\nend\n")
    done = run(tmp_path, "-c", MAIN, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("7 kernels compiled in ") and lines[-1].endswith(" s, 4 failed")
    assert sum("FAILED: CompilationError" in line for line in lines) == 2
    assert sum("FAILED: its process died" in line for line in lines) == 2
    text = page.read_text()
    assert text.startswith("# A\n") and text.endswith("end\n") and "old" not in text
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in table] == [
        *("address", "address refused", "address crashed", "address last")
    ]
    assert "7 compiled, 4 failed" in text.replace("\n", " ")


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.offline")


def test_the_documentation_names_every_kernel(offline):
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    table = text.split("<!-- offline: begin -->")[1].split("<!-- offline: end -->")[0]
    named = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert named == {str(variant) for variant in offline.variants(4096)}
    assert "compiled, 0 failed." in " ".join(table.split())


# A loop over tiles around one over k; its wait for data stands last, and branches back into it.
MACHINE_CODE = """
.text.kernel:
        /*0000*/                   STL [R1], R2 ;
.L_x_0:
        /*0010*/                   LDL R3, [R1] ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0030*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/              {spill} ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   STL [R1+0x4], R4 ;
        /*0080*/                   BRA.U UP0, `(.L_x_0) ;
.L_x_4:
        /*0090*/                   FFMA R5, R5, R5, R5 ;
        /*00a0*/                   STL [R1+0x8], R5 ;
        /*00b0*/               @P3 BRA `(.L_x_4) ;
        /*00c0*/                   EXIT ;
.L_x_3:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*00e0*/              @!P1 BRA `(.L_x_3) ;
        /*00f0*/                   BRA `(.L_x_2) ;
"""


def test_loops_are_those_of_the_control_flow(offline):
    from benchmarks._machine_code import LOCAL, matrix_loops

    for line, spills in (("@P2 LDL.LU R6, [R1]", 1), ("@P2 MOV R6, R7", 0)):
        (loop,) = matrix_loops(MACHINE_CODE.format(spill=line), 90)
        assert [line.split(".")[0].split()[0] for line in loop].count("SYNCS") == 2
        assert sum(LOCAL.match(line) is not None for line in loop) == spills
        assert not matrix_loops(MACHINE_CODE.format(spill=line), 80)


def test_markdown_needs_its_marks(offline, tmp_path):
    from benchmarks._offline_table import splice

    page = tmp_path / "page.md"
    assert splice(page, "new").split("\n\n")[1] == "new"  # a page of its own
    for text in ("", "<!-- offline: end -->\n<!-- offline: begin -->"):
        page.write_text(text)
        with pytest.raises(ValueError, match="--markdown needs a page with one"):
            splice(page, "new")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
def test_refuses_to_run_interpreted(offline, capsys):
    with pytest.raises(SystemExit) as exit:
        offline.main([])
    assert exit.value.code == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err
