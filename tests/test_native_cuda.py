"""The compiled CUDA kernels: run on the CPU by emulation, and their machine code as compiled."""

import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from _emulated import emulated, kernels
from _paths import compiled
from fastalign_kernels import native
from torch._subclasses.fake_tensor import FakeTensorMode

import fastalign as fa
from fastalign.ops import _path
from fastalign.ops.hadamard_reweight import HadamardReweightNative
from fastalign.ops.structure_distill import StructureDistillPortable, compute
from fastalign.reference.hadamard_reweight import hadamard_reweight as reference
from fastalign.testing import assert_matches_reference, cases, value_and_grads
from fastalign.testing.accuracy import relative_error

LIBRARY = Path(native.__file__).with_name("_C.abi3.so")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# One thread, a warp, more; a row of 16-byte pieces or not; the longest that a block holds.
WIDTHS = (1, 7, 8, 64, 129, 512, 520, 4099, 9000, 16384)


# -- run by emulation ------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_types_and_every_width(dtype, w_dtype):
    for d in WIDTHS:
        h, dy = torch.randn(2, 3, d).to(dtype)
        for w in (torch.randn(3, d).to(w_dtype), torch.randn(d).to(w_dtype)):
            y = kernels.hadamard_reweight_fwd(h, w)
            dh, dw = kernels.hadamard_reweight_bwd(dy, h, w, True)
            alone, none = kernels.hadamard_reweight_bwd(dy, h, w, False)
            assert torch.equal(alone, dh) and none.shape == (0,) and none.dtype == w_dtype
            wide = [x.double().requires_grad_() for x in (h, w)]
            exact = reference(*wide)
            gradients = torch.autograd.grad(exact, wide, dy.double())
            expected = zip((y, dh, dw), (exact, *gradients), (dtype, dtype, w_dtype), strict=True)
            for found, true, kind in expected:
                assert found.dtype == kind and found.shape == true.shape
                error = (found.double() - true).abs().max() / true.abs().max().clamp_min(1.0)
                assert error <= 2 * torch.finfo(kind).eps + 2e-6


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_threads_changes_no_bit(dtype):
    """It would if one read what another had yet to write."""
    for d in (40, 1000, 4096, 16384):
        h, dy, w = torch.randn(3, 2, d).to(dtype)
        h[1] *= 1e-4 if dtype == torch.float16 else 1e-25  # summed again, scaled
        found = []
        for reverse in (False, True):
            torch.ops.fastalign.emulation_reverse(reverse)
            shared = kernels.hadamard_reweight_bwd(dy, h, w[0], True)
            own = kernels.hadamard_reweight_bwd(dy, h, w, True)
            found.append([kernels.hadamard_reweight_fwd(h, w), kernels.inverse_norms(h)])
            found[-1] += [*shared, *own]
        torch.ops.fastalign.emulation_reverse(False)
        assert all(map(torch.equal, *found))
        expected = reference(h.double(), w.double())
        assert relative_error(found[0][0], expected) <= torch.finfo(dtype).eps + 2e-6


@emulated
@pytest.mark.parametrize("d", [5, 600])
def test_a_shared_w_sums_over_more_rows_than_blocks(d):
    h, dy, w = torch.randn(1300, d), torch.randn(1300, d), torch.randn(d)
    _, dw = kernels.hadamard_reweight_bwd(dy, h, w, True)
    wide = w.double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(h.double(), wide), wide, dy.double())
    assert relative_error(dw, exact) < 2e-6


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_rows_that_begin_anywhere(dtype, offset):
    """Contiguous, of a width of 16-byte pieces, at an address that is no multiple of 16."""
    h, w = (torch.randn(4 * 64 + offset).to(dtype)[offset:].view(4, 64) for _ in range(2))
    assert h.is_contiguous() and h.data_ptr() % 16
    found = kernels.hadamard_reweight_fwd(h, w), *kernels.hadamard_reweight_bwd(w, h, w, True)
    copies = [x.clone() for x in (h, w)]
    expected = kernels.hadamard_reweight_fwd(*copies)
    assert torch.equal(found[0], expected)
    again = kernels.hadamard_reweight_bwd(copies[1], *copies, True)
    assert all(map(torch.equal, found[1:], again))
    assert torch.equal(kernels.inverse_norms(h), kernels.inverse_norms(copies[0]))


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_inverse_norms(dtype):
    for d in WIDTHS:
        x = torch.randn(5, d).to(dtype)
        found = kernels.inverse_norms(x)
        assert found.shape == (5,) and found.dtype == torch.float32
        exact = 1 / x.double().norm(dim=1)
        assert ((found - exact) / exact).abs().max() < 4e-7
    for shape in ((0, 3), (3, 0)):
        assert torch.equal(
            kernels.inverse_norms(torch.ones(shape, dtype=dtype)), torch.zeros(shape[0])
        )
    torch.library.opcheck(kernels.inverse_norms, (x,))
    stacked = torch.randn(2, 3, 8).to(dtype)
    each = torch.stack([kernels.inverse_norms(part) for part in stacked])
    assert torch.equal(torch.vmap(kernels.inverse_norms)(stacked), each)


@emulated
def test_inverse_norms_of_rows_at_the_ends_of_the_range():
    x = torch.randn(1, 700).expand(8, 700).clone()
    factors = torch.tensor([1e30, 1e-17, 1e-19, 1e-30, 0.0, 1.0, 1.0, 3e-21])[:, None]
    x *= factors
    x[5, 3], x[6, 3] = float("nan"), float("inf")
    found, exact = kernels.inverse_norms(x), 1 / x.double().norm(dim=1)
    for row in (0, 1):
        assert abs(found[row].item() / exact[row].item() - 1) < 4e-7
    assert found[2] == 0.0 or exact[2] < 1e18  # |x| < 1e-18 counts as 0
    assert found[3] == found[4] == found[7] == 0.0
    assert found[5:7].isnan().all()


@emulated
def test_rows_that_no_block_holds_are_refused():
    wide = torch.ones(2, native.MAX_DIM + 1)
    for call in (
        lambda: kernels.hadamard_reweight_fwd(wide, wide),
        lambda: kernels.hadamard_reweight_bwd(wide, wide, wide, True),
        lambda: kernels.inverse_norms(wide),
    ):
        with pytest.raises(RuntimeError, match="rows must have at most 16384 numbers: got 16385"):
            call()
    with pytest.raises(RuntimeError, match="take float32, float16 and bfloat16"):
        kernels.hadamard_reweight_fwd(wide[:, :4].double(), wide[0, :4])


# -- the choice of the path ------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_structure_distill_takes_norms_of_the_kernel(dtype, monkeypatch):
    calls = []

    def norms(x):
        calls.append(x.shape)
        return kernels.inverse_norms(x)

    student, teacher = torch.randn(2, 19, 33).to(dtype), torch.randn(2, 19, 17).to(dtype)
    student[0, 3] = 0.0
    expected = value_and_grads(lambda h: fa.losses.structure_distill(h, teacher), (student,))
    monkeypatch.setattr(native, "takes_cuda", lambda x: True)
    monkeypatch.setattr(native, "inverse_norms", norms)
    found = value_and_grads(lambda h: compute(StructureDistillPortable, h, teacher), (student,))
    assert calls == [(38, 33), (38, 17), (38, 33)]  # and again in backward
    eps = torch.finfo(dtype).eps
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y.double()) <= 2 * eps + 2e-6


OPS = {
    "calibrate": lambda x: fa.ops.calibrate(x, x[..., 0] > 0, x[0, 0], x[0, 0]),
    "contrast_weights": lambda x: fa.losses.contrast_weights(x[0, :, 0]),
    "hadamard_reweight": lambda x: fa.ops.hadamard_reweight(x, x),
    "label_logits": lambda x: fa.ops.label_logits(x[0], x[1], (x[0, :, 0] > 0).long()),
    "linear_cross_entropy": lambda x: fa.losses.linear_cross_entropy(
        x[0], x[1], (x[0, :, 0] > 0).long()
    ),
    "structure_distill": lambda x: fa.losses.structure_distill(x, x),
    "syrk": lambda x: fa.ops.syrk(x),
}


class OnCuda(torch.Tensor):
    """Numbers on the CPU that say, as do all that are computed of them, that they are on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("name", OPS)
def test_ops_need_no_triton_on_cuda(name, monkeypatch):
    x = torch.randn(2, 8, 16)
    expected = OPS[name](x)
    monkeypatch.setattr(native, "OBSTACLE", "not those of the CPU")
    monkeypatch.setitem(sys.modules, f"fastalign_kernels.{name}", None)
    with pytest.raises(ImportError, match=f"fastalign_kernels.{name}"):
        OPS[name](x.as_subclass(OnCuda))
    monkeypatch.setattr(_path, "TRITON", False)
    found = OPS[name](x.as_subclass(OnCuda)).as_subclass(torch.Tensor)
    torch.testing.assert_close(found, expected)


@compiled()
def test_compiled_kernels_are_taken_where_triton_is_not(monkeypatch):
    calls = []

    def kernel(h, w):
        calls.append(h.shape)
        return torch.empty_like(h)

    monkeypatch.setattr(native, "CUDA_OBSTACLE", None)
    monkeypatch.setattr(native, "hadamard_reweight_fwd", kernel)
    for capability, triton, expected in (((8, 0), False, 1), ((7, 5), False, 0), ((9, 0), True, 0)):
        monkeypatch.setattr(_path, "TRITON", triton)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        calls.clear()
        with FakeTensorMode():
            fa.ops.hadamard_reweight(*torch.empty(2, 3, 16, device="cuda"))
            assert len(calls) == expected
            wide = torch.empty(2, 3, native.MAX_DIM + 1, device="cuda")
            double = torch.empty(2, 3, dtype=torch.float64, device="cuda")
            assert not native.takes_cuda(wide) and not native.takes_cuda(double)


# -- on a GPU --------------------------------------------------------------------------------------

on_cuda = pytest.mark.skipif(
    not torch.cuda.is_available() or native.CUDA_OBSTACLE is not None,
    reason=f"the compiled kernels of CUDA are not in use: {native.CUDA_OBSTACLE}",
)


@on_cuda
@pytest.mark.parametrize("case", cases("hadamard_reweight"), ids=str)
def test_on_cuda_it_matches_the_reference(case):
    assert_matches_reference(HadamardReweightNative.apply, reference, case.inputs("cuda"))


@on_cuda
@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_every_bit_is_that_of_the_emulation(dtype):
    for d in WIDTHS:
        h, dy, w = torch.randn(3, 5, d).to(dtype)
        of_cuda = [x.cuda() for x in (dy, h, w)]
        found = [native.hadamard_reweight_fwd(*of_cuda[1:]), native.inverse_norms(of_cuda[1])]
        found += native.hadamard_reweight_bwd(*of_cuda, True)
        expected = [kernels.hadamard_reweight_fwd(h, w), kernels.inverse_norms(h)]
        expected += kernels.hadamard_reweight_bwd(dy, h, w, True)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


@on_cuda
def test_on_cuda_streams_are_kept():
    """What another stream computes is waited for by that stream, which the kernel is on."""
    stream = torch.cuda.Stream()
    h, w = torch.randn(2, 4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(20):
            h = h * 1.01
        y = native.hadamard_reweight_fwd(h, w)
    stream.synchronize()
    assert torch.equal(y, native.hadamard_reweight_fwd(h, w))


# -- the binary ------------------------------------------------------------------------------------

built_for_cuda = pytest.mark.skipif(
    native.OBSTACLE is not None or native.CUDA_OBSTACLE == "built without nvcc",
    reason="the compiled kernels have no CUDA part",
)


@lru_cache
def cuobjdump(*options: str) -> str:
    """What is in the library, by the tool that Triton brings."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *options, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@compiled()
@built_for_cuda
def test_it_says_why_cuda_is_not_in_use():
    if torch.version.cuda is None:
        assert native.CUDA_OBSTACLE == "this torch was built without CUDA"
    driver = torch.ops.fastalign.native_cuda_obstacle()
    assert driver == "" if torch.cuda.is_available() else "driver" in driver


@compiled()
@built_for_cuda
def test_images_for_the_architectures_and_ptx_for_later_ones():
    machine_code = re.findall(r"sm_(\w+)\.cubin", cuobjdump("-lelf"))
    assert set(machine_code) == {"80", "90a", "100"}
    assert set(re.findall(r"sm_(\w+)\.ptx", cuobjdump("-lptx"))) == {"100"}


@compiled()
@built_for_cuda
def test_registers_are_in_budget():
    """Nothing spills but in rows beyond 8192, whose blocks have 64 registers a thread."""
    usage = re.findall(
        r"Function (\w+):\n.*REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("-res-usage")
    )
    rows = [(name, *map(int, numbers)) for name, *numbers in usage if "9fastalign4cuda" in name]
    assert len(rows) == 3 * (60 + 6)  # architectures by kernels
    for name, registers, stack, local in rows:
        threads = 512 if "Li512E" in name else 1024
        assert -(-registers // 8) * 8 * threads <= 65536, name
        spills = 16 if threads == 512 or "inverse_norms_of" in name else 400
        assert stack + local <= spills, name


@compiled()
@built_for_cuda
def test_aligned_rows_are_moved_by_16_bytes():
    """In the PTX, of which an access of 16 bytes is one instruction."""
    kernels_of = re.findall(r"\.entry (\w+)\((.*?)\n}", cuobjdump("-ptx"), flags=re.DOTALL)
    aligned = [
        code for name, code in kernels_of if re.search(r"(?:for|back)ward.*Lb1ELi\d+E", name)
    ]
    assert len(aligned) == 30
    for code in aligned:
        accesses = re.findall(r"\b(?:ld|st)\.global\.\S+", code)
        assert len(accesses) >= 5
        assert all(re.search(r"\.v4\.[bfu]32$", access) for access in accesses)
