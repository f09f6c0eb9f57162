"""The compiled kernels as a binary: what is chosen, what is exported, and why they are absent."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _paths import BEST, INSTRUCTIONS, UNUSABLE, compiled
from fastalign_kernels import native

import fastalign as fa
from fastalign.ops.calibrate import CalibrateNative
from fastalign.ops.hadamard_reweight import HadamardReweightNative
from fastalign.ops.label_logits import LabelLogitsNative
from fastalign.reference.calibrate import calibrate as reference
from fastalign.testing import value_and_grads

ROOT = Path(__file__).parents[1]
LIBRARY = Path(native.__file__).with_name("_C.abi3.so")
HALVES = (torch.float16, torch.bfloat16)
use = torch.ops.fastalign.native_use if native.OBSTACLE is None else None
each_set = pytest.mark.parametrize(
    "instructions", [pytest.param(name, marks=compiled(name)) for name in INSTRUCTIONS]
)


def shell(*command: object, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env}, cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- the choice of the instruction set -------------------------------------------------------------


@compiled()
def test_the_best_instructions_of_the_processor_are_in_use():
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        pytest.skip("the flags of the processor are not known")
    flags = set(re.findall(r"^flags.*?:(.*)$", info.read_text(), re.M)[0].split())
    needed = {
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c"},
        "avx2": {"avx2", "fma", "f16c"},
        "plain": set(),
    }
    expected = next(name for name, wanted in needed.items() if wanted <= flags)
    assert native.instructions() == BEST == expected
    assert (BEST == "avx512" and "avx512_bf16" in flags) == native.MULTIPLIES_BFLOAT16


@each_set
def test_another_can_be_chosen(instructions):
    use(instructions)
    assert native.instructions() == instructions
    products = torch.ops.fastalign.native_has_structure_distill()
    assert products == (native.MULTIPLIES_BFLOAT16 and instructions == "avx512")
    use("")
    assert native.instructions() == BEST


@compiled()
def test_unknown_instructions_are_refused():
    with pytest.raises(RuntimeError, match="no such instruction set: avx1024"):
        use("avx1024")
    for name in (n for n in INSTRUCTIONS if UNUSABLE[n] is not None):
        with pytest.raises(RuntimeError, match=f"this processor has no {name}"):
            use(name)
    assert native.instructions() == BEST


@compiled()
def test_products_of_another_set_are_refused():
    use("plain")
    rows = torch.ones(4, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no products of bfloat16 matrices"):
        native.structure_distill_fwd(rows, rows, None, 1, 4, True, "keep", 1)


# -- numbers ---------------------------------------------------------------------------------------


@each_set
@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_16_bits_is_read_and_rounded_as_torch_does(instructions, dtype):
    """Subnormal numbers, both zeros, infinities, NaN; rounded up and down, to 0 and to infinity."""
    use(instructions)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 64)
    mask = torch.ones(len(x), dtype=torch.bool)
    for factor in (1.0, 1.0009765625, 1 / 3, 3e-5, 1e-9, 700.0, 1e30, 1e-30):
        scale = torch.full((64,), factor)
        y = fa.ops.calibrate(x, mask, scale, torch.zeros(64))
        expected = (x.float() * scale).to(dtype)
        nan = expected.isnan()
        assert torch.equal(y.isnan(), nan)
        # + 0 gives -0 no sign, in both.
        assert torch.equal(
            (y + 0.0)[~nan].view(torch.int16), (expected + 0.0)[~nan].view(torch.int16)
        )


@compiled()
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_instructions_differ_in_no_bit_where_nothing_is_summed(dtype):
    x, scale, shift = torch.randn(37, 129).to(dtype), torch.randn(129), torch.randn(129)
    mask, found = torch.rand(37) < 0.7, []
    for name in (n for n in INSTRUCTIONS if UNUSABLE[n] is None):
        use(name)
        found.append(fa.ops.calibrate(x, mask, scale, shift))
    assert all(torch.equal(found[0], y) for y in found)
    assert torch.equal(found[0], reference(x, mask, scale, shift))


def calls(dtype: torch.dtype) -> list[tuple[object, tuple[torch.Tensor, ...]]]:
    """Functions and inputs, of as many rows as make every one use several threads."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    labels = torch.randint(-1, 7, (900,), generator=g)
    mask = torch.rand(900, generator=g) < 0.7
    return [
        (HadamardReweightNative.apply, (normal(900, 67), normal(900, 67))),
        (HadamardReweightNative.apply, (normal(900, 67), normal(67))),
        (CalibrateNative.apply, (normal(900, 67), mask, normal(67), normal(67))),
        (LabelLogitsNative.apply, (normal(900, 67), normal(7, 67), labels, normal(7))),
    ]


@each_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_change_no_bit(instructions, dtype):
    use(instructions)
    before = torch.get_num_threads()
    try:
        for fn, inputs in calls(dtype):
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(value_and_grads(fn, inputs))
            for other in found[1:]:
                assert all(map(torch.equal, found[0], other))
    finally:
        torch.set_num_threads(before)


@compiled()
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels_of_both_types_and_all_ignored(dtype):
    hidden, weight = torch.randn(5, 9), torch.randn(3, 9)
    for labels in (torch.tensor([0, 2, -1, 2, -100]), torch.full((5,), -100)):
        wide = value_and_grads(LabelLogitsNative.apply, (hidden, weight, labels, None))
        found = value_and_grads(LabelLogitsNative.apply, (hidden, weight, labels.to(dtype), None))
        assert all(map(torch.equal, wide, found))
    for beyond in (3, 2**31 - 1):
        labels[1] = beyond
        for operator, inputs in (
            (native.label_logits_fwd, (hidden, weight, labels.to(dtype), None)),
            (native.label_logits_bwd_hidden, (hidden[:, 0], weight, labels.to(dtype))),
            (native.label_logits_bwd_weight, (hidden[:, 0], hidden, labels.to(dtype), 3)),
        ):
            with pytest.raises(IndexError, match=f"labels must be below 3, .*: got {beyond}"):
                operator(*inputs)


@compiled()
def test_float64_and_integers_are_not_taken():
    x = torch.ones(2, 3)
    assert native.takes(x, None) and not native.takes(x, x.double()) and not native.takes(x.long())
    assert not native.takes(x.to("meta"))
    assert fa.ops.hadamard_reweight(x.double(), x).dtype == torch.float64
    with pytest.raises(RuntimeError, match="take float32, float16 and bfloat16"):
        native.hadamard_reweight_fwd(x.double(), x)


# -- absent ----------------------------------------------------------------------------------------

ABSENT = """
import torch
from fastalign_kernels import native
print(native.OBSTACLE)
assert native.instructions() is None and not native.takes(torch.ones(2))
assert not native.MULTIPLIES_BFLOAT16
import fastalign as fa
assert torch.equal(fa.ops.hadamard_reweight(torch.ones(2, 3), torch.ones(3)), torch.ones(2, 3))
try:
    native.hadamard_reweight_fwd(torch.ones(2, 3), torch.ones(3))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("broken", [False, True])
def test_absent_kernels_say_why(tmp_path, broken):
    copy = tmp_path / "fastalign_kernels"
    shutil.copytree(
        LIBRARY.parent, copy, ignore=shutil.ignore_patterns("_C.abi3.so", "__pycache__")
    )
    if broken:
        (copy / "_C.abi3.so").write_bytes(b"no library")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    why, refusal = shell(sys.executable, "-c", ABSENT, PYTHONPATH=path).splitlines()
    reason = "built, but not loaded: " if broken else "not built: pip install --no-build-isolation"
    assert why.startswith(reason)
    assert refusal == f"the compiled kernels are not in use: {why}"


@compiled()
def test_a_library_of_other_sources_says_so(monkeypatch):
    monkeypatch.setattr(native, "OPERATORS", (*native.OPERATORS, "of_tomorrow"))
    assert native._load() == "built from other sources: build again"


# -- the binary ------------------------------------------------------------------------------------


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and name of each symbol."""
    lines = shell("nm", "-C", "--format=posix", *options, path).splitlines()
    found = (re.match(r"(.+) ([A-Za-z])(?: [0-9a-f]+)*\s*$", line) for line in lines)
    return [(match[2], match[1]) for match in found if match]


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")


@needs_nm
@compiled()
def test_only_the_stable_abi_is_used():
    """So that one binary runs beside any torch from the one that it targets."""
    undefined = [name for _, name in symbols(LIBRARY, "-D", "--undefined-only")]
    assert len(undefined) > 50
    own = re.compile(
        r"(aoti_torch_|torch_|PyModule_Create2\b|__gmon_start__|_ITM_"  # and of the linker
        r"|.*@+(GLIBC|GLIBCXX|CXXABI|GCC)_)"
        r"|std::|operator (new|delete)|vtable for (__cxxabiv1|std)::|typeinfo for std::"
    )
    assert [name for name in undefined if not own.match(name)] == []
    assert [name for name in undefined if re.search(r"\b(c10|at|torch|caffe2)::", name)] == []


@needs_nm
@compiled()
def test_nothing_of_its_own_is_exported_but_the_module():
    defined = {name for kind, name in symbols(LIBRARY, "-D", "--defined-only") if kind == "T"}
    assert defined == {"PyInit__C"}


@needs_nm
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the units are those of x86-64")
@pytest.mark.parametrize("unit", [*INSTRUCTIONS, "avx512_bf16"])
def test_units_share_no_symbol(unit, tmp_path):
    """A weak one, as of an inline function, could be what every other unit then calls."""
    made = tmp_path / "unit.o"
    shell("c++", "-O0", "-std=c++17", "-w", "-c", ROOT / f"csrc/cpu/{unit}.cpp", "-o", made)
    shared = [name for kind, name in symbols(made, "--defined-only") if kind in "WVu"]
    assert shared
    foreign = [name for name in shared if f"fastalign::{unit}::" not in name]
    assert foreign == []
