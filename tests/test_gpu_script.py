"""`python -m benchmarks.gpu`: its control flow without a GPU, and that each stage sees a fault."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastalign_kernels import native
from torch.utils.flop_counter import FlopCounterMode

import fastalign as fa
from fastalign.ops.calibrate import Calibrate
from fastalign.ops.hadamard_reweight import HadamardReweight
from fastalign.ops.label_logits import LabelLogits
from fastalign.testing.models import llava_batch, tiny_llava

ROOT = Path(__file__).parents[1]
STAGES = ["correctness", "attention", "tune", "benchmark", "step"]

# Stages of a test: each unit leaves its name in `log` when it begins.
FAULTY = """
import os
from benchmarks._gpu_stage import Unit, absent

def logged(name, end):
    def run():
        with open({log!r}, "a") as file:
            file.write(name + " ")
        return end()
    return Unit(name, run)

def units(options):
    yield logged("good", lambda: {{"value": 1}})
    yield logged("raises", lambda: [][0])
    yield logged("dies", lambda: os._exit(7))
    yield logged("lacks", lambda: absent("needs what is not there"))
"""
SLOW = """
import pathlib
import time
from benchmarks._gpu_stage import Unit

def sleep():
    if pathlib.Path({block!r}).exists():
        time.sleep(600)
    return {{}}

def units(options):
    yield Unit("sleeps", sleep)
    yield Unit("after", lambda: {{}})
"""


@pytest.fixture(scope="module")
def load():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield lambda name: importlib.import_module(f"benchmarks.{name}")
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.fixture
def stage(load):
    return load("_gpu_stage")


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def read(path):
    return json.loads(path.read_text())


# The whole command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, command(folder, "--tiny", "--minutes", "8")


def test_tiny_run_passes_and_writes_every_stage(tiny):
    folder, done = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{s}.json" for s in STAGES)
    for name in STAGES:
        report = read(folder / f"{name}.json")
        assert report["status"] == "passed" and report["running"] is None and report["results"]
        assert report["machine"]["tiny"] and report["machine"]["versions"]["torch"]
        for record in report["results"]:
            assert f"[{name}] {record['name']}" in done.stdout
    tables = read(folder / "benchmark.json")["results"]
    assert {row["op"] for table in tables for row in table["rows"]} >= {"calibrate", "label_logits"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is absent there")
def test_what_needs_cuda_says_so(tiny):
    folder, _ = tiny
    correctness = {r["name"]: r for r in read(folder / "correctness.json")["results"]}
    for name in ("graph calibrate", "compute-sanitizer memcheck", "compute-sanitizer racecheck"):
        assert correctness[name]["status"] == "absent"
        assert correctness[name]["reason"].startswith("needs CUDA")
    assert correctness["2^31 calibrate"]["elements"] == 5 * 64
    ran = correctness["pytest test_calibrate"]  # public, kernel, reference, three instruction sets
    assert ran["tests"] == 6 and ran["skipped"] == (3 if native.OBSTACLE else 0)
    tune = read(folder / "tune.json")["results"]
    assert all(record["reason"].startswith("needs CUDA") for record in tune)


def test_attention_runs_what_is_installed(tiny):
    folder, _ = tiny
    results = {r["name"]: r for r in read(folder / "attention.json")["results"]}
    names = ("varlen", "flash-attn", "flash-attn-4", "xformers", "flex", "sdpa")
    assert list(results) == [f"{name} bfloat16" for name in names]
    if not torch.cuda.is_available():
        assert "CUDA devices only" in results["varlen bfloat16"]["reason"]
    rows = results["sdpa bfloat16"]["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["passed"] and row["median_us"] > 0 and row["times_sdpa"] == 1.0
        assert row["errors"].keys() == {"output", "query", "key", "value"}
        assert 0 < max(row["errors"].values()) < 2**-6


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_attention_sees_a_wrong_back_end(load, stage, monkeypatch, fault):
    attention = load("_gpu_attention")
    right = attention.packed_attention

    def wrong(q, k, v, segments, **options):
        out = right(q, k, v, segments, **options)
        if fault == "output":
            return out + 0.02 * out.roll(1, 2)
        return out + (q - q.detach()).sum() * 0.02

    monkeypatch.setattr(attention, "packed_attention", wrong)
    options = stage.Options("cpu", True)
    (unit,) = (u for u in attention.units(options) if u.name == "sdpa bfloat16")
    record = unit.run()
    assert record["status"] == "failed" and "LLaVA-1.5-7B" in record["error"]
    monkeypatch.setattr(attention, "obstacle", lambda name, *a, windowed=False, **o: (
        "has no window" if windowed else None
    ))  # fmt: skip
    refused = {row["case"]: row["refused"] for row in unit.run()["rows"] if "refused" in row}
    assert refused == {
        name: "has no window" for name in ("window without gaps", "window over gaps")
    }


def test_step_reports_every_method(tiny):
    folder, _ = tiny
    results = {r["name"]: r for r in read(folder / "step.json")["results"]}
    assert len(results) == 4
    full = ["SFT, transformers", "SFT, fastalign", "CAL, as published", "CAL, fastalign"]
    for name, record in results.items():
        found = [row["method"] for row in record["rows"]]
        adapters = ["SFT, transformers", "DeepAlign, fastalign"]
        assert found == (adapters if name.endswith("adapters") else full)
        for row in record["rows"]:
            assert row["trained"] == ("adapters" if name.endswith("adapters") else "all")
            assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            seconds = row["median_ms"] / 1e3
            assert row["tokens_per_s"] == pytest.approx(row["tokens"] / seconds)
            assert row["model_tflop_per_s"] == pytest.approx(row["model_tflop"] / seconds)


def test_finished_stages_are_skipped_until_again(tiny):
    folder, _ = tiny
    before = {name: (folder / f"{name}.json").read_text() for name in STAGES}
    start = time.monotonic()
    done = command(folder, "--tiny")
    assert done.returncode == 0 and done.stdout.count("passed before") == len(STAGES)
    assert {name: (folder / f"{name}.json").read_text() for name in STAGES} == before
    again = command(folder, "--tiny", "--again", "--stage", "tune")
    assert again.returncode == 0 and "[tune] " in again.stdout and "before" not in again.stdout
    assert time.monotonic() - start < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="it runs there")
def test_needs_a_gpu_unless_tiny(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 2 and "--tiny" in done.stderr and not list(tmp_path.iterdir())


# Stages that fail, die or take too long


def prepare(tmp_path, monkeypatch, **sources):
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_a_failure_stops_neither_its_stage_nor_the_next(load, tmp_path, monkeypatch, capfd):
    gpu, log = load("gpu"), tmp_path / "log"
    prepare(
        tmp_path, monkeypatch, faulty=FAULTY.format(log=str(log)), later=SLOW.format(block="none")
    )
    stages = {
        "first": gpu.Stage("faulty", 1),
        "missing": gpu.Stage("no_such_module", 1),
        "last": gpu.Stage("later", 1),
    }
    assert not gpu.run(stages, tmp_path / "out", 300, tiny=True)
    first = {r["name"]: r for r in read(tmp_path / "out/first.json")["results"]}
    assert {name: r["status"] for name, r in first.items()} == {
        **{"good": "passed", "raises": "failed", "dies": "failed", "lacks": "absent"}
    }
    assert first["good"]["value"] == 1
    assert first["raises"]["error"] == "IndexError: list index out of range"
    assert first["dies"]["error"] == "the process ended in it"
    assert first["lacks"]["reason"] == "needs what is not there"
    missing = read(tmp_path / "out/missing.json")
    assert missing["status"] == "failed" and "status 1, see its output" in missing["error"]
    assert read(tmp_path / "out/last.json")["status"] == "passed"
    printed = capfd.readouterr().out
    assert "FAILED: raises: IndexError" in printed and "ended with status 7" in printed
    assert not gpu.run(stages, tmp_path / "out", 300, tiny=True)  # a failure is remembered
    assert log.read_text() == "good raises dies lacks "  # and nothing ran twice


def test_a_stage_is_stopped_and_goes_on(load, tmp_path, monkeypatch):
    gpu, block, out = load("gpu"), tmp_path / "block", tmp_path / "out"
    prepare(tmp_path, monkeypatch, slow=SLOW.format(block=str(block)))
    stages = {"slow": gpu.Stage("slow", 1)}
    block.touch()
    start = time.monotonic()
    assert not gpu.run(stages, out, 10, tiny=True)
    assert 10 <= time.monotonic() - start < 60
    report = read(out / "slow.json")
    assert report["status"] == "out of time" and report["error"] == "stopped after 10 s"
    assert all(r["status"] == "out of time" for r in report["results"])
    block.unlink()
    assert gpu.run(stages, out, 120, tiny=True)
    results = read(out / "slow.json")["results"]
    # What was cut off comes last.
    assert [r["status"] for r in results] == ["passed", "passed"]
    assert results[-1]["name"] == "sleeps" or not report["results"]


def test_no_time_is_no_result(load, tmp_path):
    gpu = load("gpu")
    assert not gpu.run({"late": gpu.Stage("never_imported", 1)}, tmp_path, 0)
    assert read(tmp_path / "late.json")["status"] == "out of time"


def test_an_unusable_process_asks_for_another(stage, tmp_path, capsys):
    ran = []
    units = [
        stage.Unit("breaks", lambda: {"status": "failed", "error": "illegal address"}),
        stage.Unit("rest", lambda: ran.append(1) or {}),
    ]
    report = stage.Report(tmp_path / "s.json")
    report.begin({"device": "a"})
    assert stage.work(report, units, usable=lambda: False) == stage.RESTART
    assert not ran and not stage.Report(tmp_path / "s.json").finished
    report = stage.Report(tmp_path / "s.json")
    report.begin({"device": "a"})
    assert stage.work(report, units, usable=lambda: False) == 0
    assert ran == [1] and stage.Report(tmp_path / "s.json").status == "failed"


def test_reports_of_two_machines_are_not_mixed(stage, tmp_path):
    stage.Report(tmp_path / "s.json").begin({"device": "A100"})
    with pytest.raises(ValueError, match=r"another machine .*A100.*H100.*another --out"):
        stage.Report(tmp_path / "s.json").begin({"device": "H100"})


def test_results_of_another_machine_stay_as_they_are(load, stage, tmp_path, capfd):
    report = stage.Report(tmp_path / "tune.json")
    report.begin({"device": "A100"})
    report.add("some", {})
    report.stop("out of time")
    before = (tmp_path / "tune.json").read_text()
    gpu = load("gpu")
    assert not gpu.run({"tune": gpu.STAGES["tune"]}, tmp_path, 120, tiny=True)
    assert (tmp_path / "tune.json").read_text() == before
    assert "ended with status 1" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}'])
def test_other_files_are_refused(stage, tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json must be"):
        stage.Report(tmp_path / "s.json")


# Tune


def test_candidates_fit_the_functions_they_replace(load):
    tune = load("tune")
    for op, tables in tune.CANDIDATES.items():
        module = importlib.import_module(f"fastalign_kernels.{op}")
        for table in tables:
            function = getattr(module, table.function)
            result = function(*[64] * len(inspect.signature(function).parameters))
            assert len(table.candidates) > 1
            for candidate in table.candidates:
                assert isinstance(candidate, dict) == isinstance(result, dict)
                if isinstance(candidate, dict):
                    assert candidate.keys() <= result.keys() | {"num_stages"}


def test_every_kernel_module_has_candidates(load):
    files = (ROOT / "kernels/fastalign_kernels").glob("[!_]*.py")
    kernels = {p.stem for p in files} - {"native"}  # which no launch configuration is for
    assert load("tune").CANDIDATES.keys() == kernels


def test_grid_bounds_the_elements_of_a_thread(load):
    # 64 elements by 2 warps are one a thread, by 1 warp two; 128 are two and four.
    found = load("tune").grid((2, 2), BLOCK=(64, 128), num_warps=(1, 2))
    assert found == ({"BLOCK": 64, "num_warps": 1}, {"BLOCK": 128, "num_warps": 2})


def test_a_configuration_holds_inside_its_context(load):
    tune = load("tune")
    module = SimpleNamespace(_config=lambda d: {"BLOCK": d, "num_warps": 4}, _block=lambda n: 128)
    with tune.configured(module, "_config", {"num_warps": 8}) as returned:
        assert module._config(512) == {"BLOCK": 512, "num_warps": 8}
    assert returned == [{"BLOCK": 512, "num_warps": 4}] and module._config(1)["num_warps"] == 4
    with tune.configured(module, "_block", 64):
        assert module._block(3) == 64
    with pytest.raises(RuntimeError), tune.configured(module, "_block", 64):
        raise RuntimeError
    assert module._block(3) == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="times Python, which no graph captures")
def test_winners_are_found_and_ready_to_paste(load, capsys):
    tune = load("tune")
    module = SimpleNamespace(_config=lambda d: {"ms": 20, "factor": 2})

    def double(x):
        config = module._config(x.shape[-1])
        if config["ms"] < 0:
            raise RuntimeError("out of resource: shared memory")
        time.sleep(config["ms"] / 1e3)
        return config["factor"] * x

    candidates = ({"ms": 20}, {"ms": 10}, {"ms": 5}, {"ms": 40}, {"ms": -1}, {"factor": 3})
    found = tune.tune(double, (torch.ones(3),), module, tune.Table(candidates), "cpu", seconds=0)
    assert found["current"] == {"ms": 20, "factor": 2}
    assert found["better"] == ['{"ms": 5}', '{"ms": 10}']
    rows = {row["config"]: row for row in found["rows"]}
    assert '{"ms": 20}' not in rows  # the current one
    assert rows["current"]["median_us"] >= 20e3 > rows['{"ms": 5}']["median_us"] >= 5e3
    assert rows['{"ms": -1}']["refused"] == "RuntimeError: out of resource: shared memory"
    assert rows['{"factor": 3}']["refused"] == "differs by 5.0e-01"
    tune.print_better("op", "_config", "some case", "some device", found)
    lines = capsys.readouterr().out.splitlines()
    assert "fastalign_kernels.op._config, some case on some device" in lines[0]
    pasted = lines[1].strip().removeprefix("return ").split("#")[0]
    assert ast.literal_eval(pasted.strip()) == {"ms": 5}
    tune.print_better("op", "_config", "some case", "cpu", {**found, "better": []})
    assert '{"ms": 20, "factor": 2} stays' in capsys.readouterr().out


def test_every_candidate_of_the_row_kernels_computes_the_same(load, device):
    tune = load("tune")
    d, v = 33, 7
    x, w, weight = torch.randn(5, d), torch.randn(d), torch.randn(v, d)
    cases = {
        "hadamard_reweight": (HadamardReweight, (x, w)),
        "label_logits": (LabelLogits, (x, weight, torch.tensor([1, 1, -100, 6, 1]), None)),
        "calibrate": (Calibrate, (x, torch.arange(5) % 2 == 0, w, w)),
    }
    for op, (function, inputs) in cases.items():
        module = importlib.import_module(f"fastalign_kernels.{op}")
        inputs = tuple(t if t is None else t.to(device) for t in inputs)
        for table in tune.CANDIDATES[op]:
            run = tune.step(function.apply, inputs, table.gradients)
            expected = run()
            for candidate in table.candidates:
                with tune.configured(module, table.function, candidate):
                    torch.testing.assert_close(run(), expected)


# Correctness


def test_a_wrong_row_past_the_limit_is_seen(load):
    correctness = load("_gpu_correctness")
    x = torch.randn(9, 4)

    class Overflow(torch.autograd.Function):
        """x, and its gradient forgets rows beyond the sixth."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            dx = dy.clone()
            dx[6:] = 0
            return dx

    def forgets(x):
        return x * (torch.arange(len(x)) < 6)[:, None]

    assert correctness.unequal_tail(torch.sigmoid, (x,), 3) == []
    assert correctness.unequal_tail(Overflow.apply, (x,), 3) == ["gradient 1"]
    assert correctness.unequal_tail(forgets, (x,), 3) == ["value", "gradient 1"]


def test_nan_and_other_bits_are_unequal(load):
    unequal = load("_gpu_correctness").unequal
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert unequal((one, one), (one, one.clone())) == []
    assert unequal((one, nan), (one, nan)) == ["gradient 1"]
    assert unequal((one + 2**-23, one), (one, one)) == ["value"]


@pytest.mark.parametrize(
    ("status", "output", "passed"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (0, "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", False),
        (86, "========= Invalid __global__ read\n========= ERROR SUMMARY: 1 error", False),
        (1, "========= ERROR SUMMARY: 0 errors", False),
        (0, "calibrate 2x1025", False),
    ],
)
def test_what_the_sanitizer_says_is_read(load, status, output, passed):
    record = load("_gpu_correctness").sanitizer_record(status, output)
    assert (record["status"] == "passed") == passed
    assert passed or str(status) in record["error"]


def test_pytest_failures_are_named(load, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    record = load("_gpu_correctness")._pytest(file, tiny=False)
    assert record["status"] == "failed" and record["failing"] == ["test_bad"]
    assert record["tests"] == 2 and "assert 1 == 2" in record["output"]
    file.write_text("")  # nothing collected proves nothing
    assert load("_gpu_correctness")._pytest(file, tiny=False)["status"] == "failed"


def test_every_op_and_its_kernel_tests_are_run(load):
    correctness = load("_gpu_correctness")
    names = {path.stem for path in correctness.test_files()}
    assert names >= {f"test_{op}" for op in correctness.ops()}
    assert {"test_calibrate", "test_structure_distill"} <= names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_replay_that_keeps_a_number_is_seen(load, device):
    correctness, benchmarks = load("_gpu_correctness"), importlib.import_module("benchmarks")
    x = torch.randn(8, 4, device=device)

    def make(fn):
        return benchmarks.Benchmark("some", fn, fn, lambda inputs: None)

    assert correctness.unequal_after_replay(make(torch.sigmoid), (x,)) == []
    kept = x.clone()
    stale = make(lambda x: kept * 1.0 + x if torch.cuda.is_current_stream_capturing() else 2 * x)
    assert "value" in correctness.unequal_after_replay(stale, (x,))


# Training steps


@pytest.fixture
def models(load):
    return load("_gpu_models")


@pytest.mark.parametrize("number", [0, 1])
def test_flops_are_those_of_the_products(models, number):
    shape = models.TINY_SHAPES[number]
    model = models.build(shape, "cpu", torch.float32).eval()
    batch = models.make_batch(shape, "cpu", torch.float32)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # no padding
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "teacher")}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "attention" not in str(op))
    b, length = batch["input_ids"].shape
    views = b * shape.views
    # Decoder: 3 layers of width 32, half of 4 d L^2; tower: 4 layers of width 24, 17 tokens.
    attention = b * 3 * 2 * 32 * length**2 + views * 4 * 4 * 24 * 17**2
    patch_of_class_token = views * 2 * 3 * 4 * 4 * 24
    expected = products + attention + patch_of_class_token
    assert models.forward_flops(model, shape, batch) == expected


def test_published_sizes(models):
    for shape, tokens in zip(models.SHAPES, (576, 2928), strict=True):
        model = models.build(shape, "meta", torch.bfloat16)
        parameters = list(model.parameters())
        # liuhaotian/llava-v1.5-7b: 7.06 B parameters.
        assert sum(p.numel() for p in parameters) == pytest.approx(7.063e9, rel=1e-3)
        assert {p.dtype for p in parameters} == {torch.bfloat16}
        assert shape.image_tokens == tokens


def test_batches_are_padded_right_and_answers_labelled(models):
    shape = models.TINY_SHAPES[1]
    batch = models.make_batch(shape, "cpu", torch.float32)
    ids, mask, labels = (batch[k] for k in ("input_ids", "attention_mask", "labels"))
    assert (ids == models.IMAGE).sum(1).tolist() == [shape.image_tokens] * 2
    assert (mask.diff(dim=1) <= 0).all() and mask.any(0).all()
    for row, kept, label in zip(ids, mask.bool(), labels, strict=True):
        answer = int((label != -100).sum())
        assert shape.answer[0] <= answer <= shape.answer[1]
        assert torch.equal(label[kept][-answer:], row[kept][-answer:])


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("AMD EPYC (2 threads)", None),
    ],
)
def test_peak_by_name(models, name, tflops):
    assert models.peak_tflops(name) == tflops


def test_published_cal_is_the_objective_in_its_official_mode(load, monkeypatch):
    step = load("_gpu_step")
    model, batch = tiny_llava(head_scale=8.0), llava_batch(["ttityyyy", "titytyy"])
    assert int(batch["input_ids"].eq(step.IMAGE).sum()) == 32
    official = {"compat": "official", "mode": "mask", "normalize": "official"}
    terms = fa.objectives.cal(fa.VLM(model), batch, **official)
    assert not torch.allclose(terms["loss"], terms["ce"], rtol=1e-3)  # weights differ from 1
    torch.testing.assert_close(step.hf_cal(model, batch), terms["loss"])
    sft = fa.objectives.sft(fa.VLM(model), batch)
    torch.testing.assert_close(step.hf_sft(model, batch), sft["loss"])


def test_less_is_trained_where_memory_is_short(load, models, stage, monkeypatch):
    step, options = load("_gpu_step"), stage.Options("cpu", True)
    tried = []

    def short(shape, group, rung, device):
        tried.append(rung)
        if len(tried) < fits:
            raise torch.OutOfMemoryError
        return [{"method": "some", "trained": rung.trained}]

    monkeypatch.setattr(step, "measure_group", short)
    fits = 3
    record = step._group(models.TINY_SHAPES[0], "full", options)
    assert record["rows"][0]["trained"] == "last"
    assert record["too_large"] == ["all", "all, checkpointed"]
    tried, fits = [], 9
    record = step._group(models.TINY_SHAPES[0], "adapters", options)
    assert record["status"] == "absent" and "adapters, checkpointed" in record["reason"]


def test_last_layers_train_checkpointed(load, models, capsys):
    step, shape = load("_gpu_step"), models.TINY_SHAPES[0]
    rows = step.measure_group(shape, "full", step.Rung("last", True), "cpu")
    # Two layers: 4 x 32 x 32 of attention, 3 x 32 x 48 of the MLP, two norms; the head 64 x 32.
    assert rows[0]["trained_parameters"] == 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 64 * 32
    assert all("median_ms" in row and row["checkpointed"] for row in rows)


def test_a_refusal_of_a_supported_model_is_a_failure(load, models, stage, monkeypatch, capsys):
    step = load("_gpu_step")

    def refuse(*_, **__):
        raise ValueError("no such mode")

    monkeypatch.setattr(step.objectives, "cal", refuse)
    record = step._group(models.TINY_SHAPES[0], "full", stage.Options("cpu", True))
    assert record["status"] == "failed"
    assert record["error"] == "CAL, fastalign: ValueError: no such mode"
    assert len(record["rows"]) == 4  # the others were timed
