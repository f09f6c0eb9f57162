"""The benchmark harness: the rows it promises, and that each column is what it says."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastalign_kernels import native
from torch.utils.flop_counter import FlopCounterMode

from fastalign.reference.hadamard_reweight import hadamard_reweight
from fastalign.testing import Case, cases

ROOT = Path(__file__).parents[1]
FIELDS = [
    *("op", "case", "impl", "device"),
    *("median_us", "p10_us", "p90_us", "peak_mib", "bound_us", "max_error"),
]


@pytest.fixture
def command(harness) -> ModuleType:
    return importlib.import_module("benchmarks.__main__")


@pytest.fixture
def structure(harness) -> ModuleType:
    return importlib.import_module("benchmarks.structure_distill")


@pytest.fixture
def small(harness, monkeypatch) -> Case:
    """One float32 case of hadamard_reweight in place of all the others."""
    case = Case("hadamard_reweight", (8, 16), model="small", quick=True)
    monkeypatch.setattr(harness, "cases", lambda *_, **__: [case])
    return case


def reweight(harness, **changes):
    functions = {"fastalign": hadamard_reweight, "eager": hadamard_reweight} | changes
    return harness.Benchmark(
        op="hadamard_reweight", bound=lambda xs: harness.copy_of(8, xs[0].device), **functions
    )


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


# The path without the compiled kernels, beside them; the commands run on a GPU where there is one.
PORTABLE_ON_CPU = ["portable"] if native.OBSTACLE is None else []
PORTABLE = [] if torch.cuda.is_available() else PORTABLE_ON_CPU


def test_quick_run_writes_its_rows(tmp_path):
    file = tmp_path / "results/rows.json"
    done = run("--quick", "--op", "calibrate", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["impl"] for row in rows} == {"fastalign", "eager", "bound", *PORTABLE}
    for row in rows:
        assert list(row) == FIELDS
        assert row["op"] == "calibrate" and row["case"] in done.stdout
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        if row["impl"] == "bound":
            assert row["max_error"] is None and row["median_us"] == row["bound_us"]
        else:
            # bfloat16 has 8 bits, so rounding costs up to 2^-8; the peak holds at least y and dx.
            assert 0 < row["max_error"] <= 2**-8 * 1.01
            assert row["peak_mib"] >= 2 * 2 * 288 * 1024 * 2 / 2**20


def test_every_op_has_a_quick_case_and_one_of_a_model(command):
    found = command.find()
    assert {"calibrate", "hadamard_reweight", "label_logits", "structure_distill"} <= set(found)
    for op, benchmark in found.items():
        assert benchmark.op == op
        assert [case.model for case in cases(op, bench=True, quick=True)] == ["quick"]
        assert len(cases(op, bench=True)) > 1


# -- errors, gradients, precision ------------------------------------------------------------------


def test_a_value_or_a_gradient_wrong_by_one_percent_shows(harness, small):
    def gradient(h, w):
        y = hadamard_reweight(h, w)
        return 1.01 * y - 0.01 * y.detach()

    for wrong in (lambda h, w: 1.01 * hadamard_reweight(h, w), gradient):
        rows = harness.measure(reweight(harness, fastalign=wrong), "cpu", quick=True)
        errors = {row["impl"]: row["max_error"] for row in rows}
        assert errors["fastalign"] == pytest.approx(1e-2, rel=1e-3)
        assert errors["eager"] < 1e-6 and errors["bound"] is None


def test_a_gradient_of_nan_shows(harness, small):
    def wrong(h, w):
        y = hadamard_reweight(h, w)
        y.register_hook(lambda dy: dy * float("nan"))
        return y

    rows = harness.measure(reweight(harness, fastalign=wrong), "cpu", quick=True)
    assert math.isnan(rows[0]["max_error"]) and rows[1]["max_error"] < 1e-6


def test_only_the_chosen_inputs_are_differentiated(harness, small):
    def eager(h, w):
        assert h.requires_grad and not w.requires_grad
        return hadamard_reweight(h, w)

    inputs = small.inputs()
    step = harness._step(eager, inputs, (0,))
    assert [grad.shape for grad in step()] == [inputs[0].shape]
    benchmark = reweight(harness, fastalign=eager, eager=eager, differentiate=(0,))
    assert len(harness.measure(benchmark, "cpu", quick=True)) == 3


@pytest.mark.parametrize("op", native.OPS)
def test_compiled_kernels_are_timed_beside_what_runs_without_them(
    op, command, harness, monkeypatch
):
    benchmark = command.find()[op]
    monkeypatch.setattr(native, "OBSTACLE", None)
    assert "portable" in benchmark.functions("cpu", quick=True)
    assert "portable" not in benchmark.functions("cuda", quick=True)
    monkeypatch.setattr(native, "OBSTACLE", "not built")
    assert "portable" not in benchmark.functions("cpu", quick=True)
    # With the obstacle in place the public function runs it.
    (case,) = cases(op, bench=True, quick=True)
    inputs = case.inputs("cpu")
    assert torch.equal(benchmark.portable(*inputs), benchmark.fastalign(*inputs))


def test_compiled_kernels_of_cuda_are_timed_beside_triton(command, monkeypatch):
    compiled = {op for op, b in command.find().items() if b.compiled is not None}
    assert compiled == set(native.CUDA_OPS)
    benchmark = command.find()["hadamard_reweight"]
    for obstacle, rows in ((None, 1), ("built without nvcc", 0)):
        monkeypatch.setattr(native, "CUDA_OBSTACLE", obstacle)
        assert [*benchmark.functions("cuda", quick=True)].count("compiled") == rows
        assert "compiled" not in benchmark.functions("cpu", quick=True)


def test_products_are_timed_in_other_precisions_too(structure, harness):
    names = [*structure.BENCHMARK.functions("cuda", quick=True)]
    assert names == ["fastalign", "eager", "peer:eager-tf32", "peer:eager-bf16"]
    names = [*structure.BENCHMARK.functions("cpu", quick=False)]
    assert names == ["fastalign", "eager", *PORTABLE_ON_CPU, "peer:eager-bf16", "compile"]
    assert [*reweight(harness).functions("cuda", quick=True)] == ["fastalign", "eager"]
    before = torch.get_float32_matmul_precision()
    for name, precision in (("peer:eager-tf32", "high"), ("eager", "highest")):
        with harness._precision(name):
            assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == before


def test_each_precision_errs_as_it_should(structure, harness):
    (case,) = cases("structure_distill", bench=True, quick=True)
    inputs = [x if x is None else x.float() for x in case.inputs()]
    benchmark = structure.BENCHMARK
    functions = benchmark.functions("cpu", quick=True)
    errors = harness._errors(benchmark, functions, inputs)
    # Similarities near 0.7 in bfloat16 are off by up to 2^-10, their differences are near 0.1.
    assert max(errors["fastalign"], errors["eager"]) < 1e-5 < 2e-3 < errors["peer:eager-bf16"] < 0.1


# -- peers, ratios ---------------------------------------------------------------------------------


def test_absent_peers_are_named_and_the_others_timed(harness, command, small, monkeypatch, capsys):
    peers = {
        "there": harness.Peer("math", lambda: hadamard_reweight),
        "gone": harness.Peer("no_such_package", lambda: importlib.import_module("no_such_package")),
    }
    benchmark = reweight(harness, peers=peers)
    assert benchmark.absent() == {"gone": "no_such_package"}
    rows = harness.measure(benchmark, "cpu", quick=True)
    assert [row["impl"] for row in rows] == ["fastalign", "eager", "peer:there", "bound"]
    monkeypatch.setattr(command, "find", lambda: {"hadamard_reweight": benchmark})
    command.print_table(rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["peer:gone", "absent:", "no", "package", "no_such_package"]


def row(case: str, impl: str, median_us: float, device: str = "a CPU") -> dict:
    times = {"median_us": median_us, "p10_us": median_us, "p90_us": median_us, "bound_us": 1.0}
    return (
        {"op": "x", "case": case, "impl": impl, "device": device, "peak_mib": 0.0}
        | times
        | {"max_error": None}
    )


def test_ratios_are_medians_over_that_of_fastalign(harness, command, capsys):
    rows = [
        *(row("1", "fastalign", 2.0), row("1", "eager", 5.0), row("1", "bound", 1.0)),
        *(row("2", "eager", 3.0), row("2", "fastalign", 4.0)),
        row("2", "eager", 9.0, device="another CPU"),  # fastalign was not timed there
    ]
    assert harness.ratios(rows) == {
        ("x", "1", "a CPU"): {"eager": 2.5, "bound": 0.5},
        ("x", "2", "a CPU"): {"eager": 0.75},
    }
    command.print_table(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "eager", "5.0", "5.0", "5.0", "2.50", "0.20", "0.0"] in lines
    command.print_table([])
    assert capsys.readouterr().out == ""


# -- bound and memory ------------------------------------------------------------------------------


def flops(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("shape", "least"),
    [
        ((1, 4, 6, 2), 4 * 4 * 20),  # n^2 (3 d + dt), as n = 4 <= 6 + 2
        ((3, 8, 6, 2), 3 * 8 * 8 * 20),
        ((1, 10, 3, 1), 10 * 4 * 10),  # n (d + dt)(3 d + dt): 400, where n^2 (3 d + dt) is 1000
    ],
)
def test_bound_does_the_least_products(structure, shape, least):
    b, n, d, dt = shape
    student, teacher, _ = inputs = Case("structure_distill", shape).inputs()
    assert flops(structure.bound(inputs)) == least
    assert sum(2 * m * k * p for m, k, p in structure.products(n, d, dt)) * b == least

    def eager():
        h = student.clone().requires_grad_()
        torch.autograd.grad(structure.gram_loss(h, teacher, None), h)

    # Both Gram matrices whole, 2 n^2 (d + dt), and two products in the gradient, 4 n^2 d.
    assert flops(eager) == b * n * n * (6 * d + 2 * dt) >= 2 * least


def test_bound_of_packed_images_is_the_sum_and_rounds_down(structure):
    student, teacher = torch.ones(7, 4), torch.ones(7, 1)
    cu_seqlens = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    # 4 and 3 patches; (4 + 1) / 2 rounds down to 2: 2 n^2 2 + 2 n^2 4 = 12 n^2, 12 (16 + 9).
    assert flops(structure.bound((student, teacher, cu_seqlens))) == 300


def test_eager_on_packed_images_is_the_mean_over_those_with_patches(structure):
    # Rows (1, 0) and (0, 1) of the student are orthogonal, those of the teacher are equal: of
    # [[1, 0], [0, 1]] - [[1, 1], [1, 1]] the mean square is 2 / 4. The image of one patch gives 0,
    # the empty one does not count: (1/2 + 0) / 2.
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    teacher = torch.tensor([[2.0], [5.0], [1.0]])
    cu_seqlens = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    for loss in (structure.gram_loss, structure.distill):
        assert float(loss(student, teacher, cu_seqlens)) == pytest.approx(0.25)
    dense = structure.gram_loss(student[None, :2], teacher[None, :2], None)
    assert float(dense) == pytest.approx(0.5)


def test_ragged_case_gives_all_rows(structure, harness, monkeypatch):
    case = Case("structure_distill", (5, 35, 33, 17), variant="ragged", model="x", quick=True)
    monkeypatch.setattr(harness, "cases", lambda *_, **__: [case])
    rows = harness.measure(structure.BENCHMARK, "cpu", quick=True)
    names = ["fastalign", "eager", *PORTABLE_ON_CPU, "peer:eager-bf16", "bound"]
    assert [r["impl"] for r in rows] == names
    assert all(list(r) == FIELDS and r["case"].endswith("-ragged") for r in rows)
    assert rows[0]["max_error"] < 1e-5


def test_peak_memory_counts_what_is_held_at_once(harness):
    x, out = torch.ones(1 << 18), torch.empty(1 << 18)  # 1 MiB each

    def in_turn():
        first = x + 1
        del first
        second = x + 2
        del second

    expected = {
        lambda: torch.add(x, x, out=out): 0,
        lambda: out.mul_(2): 0,
        lambda: x.clone().mul_(2): 1,
        in_turn: 1,
        lambda: torch.add(x, x, out=torch.empty(0)): 1,
        lambda: (x + 1) * 2: 2,
    }
    for fn, mib in expected.items():
        fn()
        assert harness._peak_mib(fn, "cpu") == pytest.approx(mib, abs=1e-3)


# -- inputs, command line --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["", "ragged"])
def test_features_look_like_features(variant):
    case = Case("structure_distill", (2, 256, 1024, 512), torch.bfloat16, variant, model="x")
    first, again = case.inputs(), case.inputs()
    for features, same in zip(first[:2], again[:2], strict=True):
        assert torch.equal(features, same) and features.dtype == torch.bfloat16
        unit = torch.nn.functional.normalize(features.double(), dim=-1).view(-1, features.shape[-1])
        image = unit[:256] @ unit[:256].T
        others = image[~torch.eye(256, dtype=torch.bool)]
        assert others.mean() == pytest.approx(0.7, abs=0.05) and others.std() > 0.02
        # Beside the mean there are 16 directions: the 18th singular value is that of the noise.
        values = torch.linalg.svdvals(unit[:256])
        assert values[16] > 1.5 * values[17] and values[17] < 1.5 * values[40]
    assert (first[2] is None) == (variant == "")


def test_test_cases_hold_the_corners():
    found = [case for case in cases("structure_distill") if case.dtype == torch.float32]
    dense = [case.shape for case in found if not case.variant]
    assert {0, 1} <= {b for b, *_ in dense} and {0, 1} <= {n for _, n, *_ in dense}
    assert {1, 3, 33, 65, 127} <= {d for _, _, d, _ in dense} & {dt for *_, dt in dense}
    assert max(n for _, n, *_ in dense) <= 70 and max(d for *_, d, _ in dense) <= 130
    for case in found:
        student, teacher, cu_seqlens = case.inputs()
        assert (cu_seqlens is not None) == (case.variant == "ragged")
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().tolist()
            assert len(lengths) == case.shape[0] and sum(lengths) == len(student) == len(teacher)
            assert cu_seqlens.dtype == torch.int32
            assert not lengths or {0, 1} <= set(lengths)


def test_results_are_filed_by_device(harness, monkeypatch):
    monkeypatch.setattr(harness, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    expected = ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3.json"
    assert harness.results_file("cuda") == expected


def test_save_replaces_the_rows_of_the_same_case(harness, command, monkeypatch, tmp_path, capsys):
    file = tmp_path / "results/device.json"
    monkeypatch.setattr(command, "results_file", lambda _: file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "find", lambda: {"hadamard_reweight": reweight(harness)})
    other = row("other", "eager", 1.0)
    command.write(file, [other])
    for _ in range(2):
        assert command.main(["--quick", "--save", "--case", "576X1024"]) == 0
    rows = json.loads(file.read_text())
    assert [r["impl"] for r in rows if r != other] == ["fastalign", "eager", "bound"]
    assert other in rows and len(rows) == 4
    assert "quick-576x1024-bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--op", "unknown"), "hadamard_reweight"), (("--case", "unknown"), "no case on ")],
)
def test_wrong_arguments_are_explained(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("module", "base", "rows"),
    [
        ("cal_step", "sft transformers", {"sft fastalign", "cal as published", "branch"}),
        ("deepalign_step", "sft of the adapters", {"deepalign", "base states", "teacher"}),
    ],
)
def test_whole_steps_are_timed_in_turn(harness, module, base, rows, tmp_path, capsys):
    file = tmp_path / "rows.json"
    benchmark = importlib.import_module(f"benchmarks.{module}")
    assert benchmark.main(["--quick", "--json", str(file)]) == 0
    found = {row["impl"]: row for row in json.loads(file.read_text())}
    assert rows <= set(found) and found[base]["ratio"] == 1.0
    for row in found.values():
        assert row["op"] == module and 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["peak_mib"] > 0 and "max_error" not in row
    printed = capsys.readouterr().out
    assert all(name in printed for name in found)


def test_the_loader_is_timed_by_source(harness, tmp_path, capsys):
    pytest.importorskip("datasets")
    file = tmp_path / "rows.json"
    benchmark = importlib.import_module("benchmarks.loader")
    threads = torch.get_num_threads()
    try:
        assert benchmark.main(["--quick", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    found = {row["impl"]: row for row in json.loads(file.read_text())}
    names = ("json", "tar", "parquet", "tar streamed", "parquet streamed")
    sources = {f"{name}, {n} workers" for name in names for n in (0, 1)}
    assert set(found) == {*sources, "decoded beforehand, 0 workers"}
    assert found["json, 0 workers"]["ratio"] == 1.0
    assert all(row["max_error"] == 0.0 and row["median_us"] > 0 for row in found.values())
    assert "images/s" in capsys.readouterr().out


def test_the_share_of_measuring_mir_follows_from_its_ratio(harness):
    module = importlib.import_module("benchmarks.mir_callback")
    row = importlib.import_module("benchmarks._turns").Row
    times = {"median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0}
    rows = [
        row("mir_callback", "c", name, "d", **times, ratio=r)
        for name, r in (("step", 1), ("MIR", 4))
    ]
    # 4 of 504 steps' time; and 4 / (n + 4) is 2 % at n = 196.
    assert module.shares(rows) == [
        "MIR: 0.79% of the time with one every 500 steps; below 2% from every 197 steps on"
    ]
