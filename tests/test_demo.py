"""The demo as a user runs it: one command, no network, a table, figures and JSON."""

import json
import math
import os
import subprocess
import sys

import pytest

from fastalign.demo import ablation, report
from fastalign.demo.base import build_processor, load_base
from fastalign.demo.dataset import SceneDataset
from fastalign.demo.evaluate import evaluate
from fastalign.demo.pretrain import pretrain
from fastalign.demo.run import ABLATION, DemoConfig, arm_config
from fastalign.demo.scenes import ATTRIBUTES, scenes

# Python loads this module at its start, in the workers too.
OFFLINE = """
import socket
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError(f"the demo opened a connection to {address}")
socket.socket.connect = refuse
"""
ARMS = {"base", "sft", "cal", "deepalign", "moca"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "sitecustomize.py").write_text(OFFLINE)
    command = [sys.executable, "-m", "fastalign", "demo", "--seeds", "2", "--steps", "2"]
    command += ["--train-scenes", "16", "--heldout-scenes", "32", "--batch-size", "4"]
    command += ["--output-dir", str(folder / "out"), "--json", str(folder / "r.json")]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "r.json").read_text()), done.stdout, folder / "out"


def test_json_holds_what_the_interface_names(outcome):
    result, _, _ = outcome
    for key in ("with_image", "shuffled_image"):
        assert set(result["accuracy"][key]) == set(ATTRIBUTES)
    assert set(result["arms"]) == ARMS == set(result["swapped_arms"])
    for arm in result["arms"].values():
        assert all(math.isfinite(arm[name]) for name in ("ce", "accuracy", "mir"))
    assert result["seeds"] == 2 and result["seconds"] > 0 and result["peak_mib"] > 100


def test_table_and_findings_are_printed(outcome):
    result, printed, _ = outcome
    for word in ("right image", "shuffled image", "deepalign", "swapped", "CAL's"):
        assert word in " ".join(printed.split())
    assert f"{result['accuracy']['with_image']['object']:.2f}" in printed


def test_figures_are_written(outcome):
    from PIL import Image

    result, _, folder = outcome
    names = {"summary", "mir_per_layer", "contrast", "patch_similarity", "learning_curve"}
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 500 and len(image.convert("L").getcolors(256)) > 10
    assert "<html" in (folder / "contrast.html").read_text()
    assert {os.path.basename(p) for p in result["figures"]} >= {f"{n}.png" for n in names}


def test_the_shipped_base_reads_images():
    """The demo's claim about its base, at its own bounds, on combinations never trained on."""
    heldout = SceneDataset(scenes(256, seed=1, split="heldout"), build_processor())
    right, wrong = evaluate(load_base(), heldout), evaluate(load_base(), heldout, shuffle=True)
    assert right["object"] >= 3 * wrong["object"]
    assert right["side"] > 0.8 and wrong["side"] < 0.65


def test_training_from_scratch_writes_a_base(tmp_path):
    pretrain(tmp_path, steps=2, progress=False)
    model = load_base(tmp_path)
    dataset = SceneDataset(scenes(4, seed=0), build_processor())
    assert math.isfinite(evaluate(model, dataset)["ce"])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2


def test_intervals_are_students():
    # Of 1, 2, 3: mean 2, standard deviation 1, t of 2 degrees of freedom 4.303.
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / 3**0.5)
    assert math.isnan(report.interval([1.0])[1])


def found(ce, sft=1.0, change=0.0, half=0.1):
    arm = {"mir": 2.0, "patch_correlation": 0.4, "accuracy": 0.5, "accuracy_interval": half}
    return {
        "accuracy": {"with_image": {"object": 0.6}, "shuffled_image": {"object": 0.05}},
        "cal_less_sft": {k: {"ce": ce - sft, "ce_interval": half} for k in ("clean", "swapped")},
        "arms": {
            "base": arm,
            "sft": arm,
            "deepalign": arm | {"accuracy": 0.5 + change},
            "moca": arm,
        },
    }


def test_findings_say_what_did_not_help():
    better, worse = report.findings(found(0.5)), report.findings(found(1.05))
    assert any("0.500 lower" in line and "excludes 0" in line for line in better)
    assert any("0.050 higher" in line and "holds 0" in line for line in worse)
    assert any("does not change accuracy" in line for line in worse)
    assert any(
        "DeepAlign changes accuracy" in line for line in report.findings(found(1, change=-0.3))
    )


def test_arms_train_as_they_say():
    config = DemoConfig()
    assert arm_config("sft", 1, config).trainable == "all"
    assert arm_config("deepalign", 1, config).trainable == "adapters"
    assert arm_config("cal", 1, config).objective == "cal"
    assert arm_config("cal", 2, config).seed == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must lie in 1..10: got 0"),
        ({"noise": 1.5}, "noise must lie in 0..1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"train_scenes": 3}, "train_scenes must be at least 16"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**changes)


# The ablation


def judged(accuracy, ce, mir, cosine):
    return {
        "accuracy": dict.fromkeys(ATTRIBUTES, accuracy),
        **{"ce": ce, "mir": mir, "patch_correlation": 0.5},
        **{"cos_global": cosine, "cos_instance": cosine},
    }


def test_ablation_pairs_seeds_and_says_what_moved():
    full = [judged(0.9, 0.2, 1.0, 0.3), judged(0.8, 0.4, 1.2, 0.5)]
    # Cross-entropy is 0.1 higher for both seeds, whose own spread is larger than that.
    other = [judged(0.9, 0.3, 1.1, None), judged(0.7, 0.5, 1.2, None)]
    arms = {"full": full, "w/o intervention": other}
    result = ablation.summarise(DemoConfig(seeds=2), judged(0.95, 0.1, 1.0, None), arms)
    row = result["arms"]["w/o intervention"]
    assert row["ce"] == pytest.approx(0.4) and row["ce_interval"] > 0.1
    assert row["ce_less_full"] == pytest.approx(0.1)
    assert row["ce_less_full_interval"] == pytest.approx(0.0, abs=1e-6)
    # -0 and -0.1: mean -0.05, standard deviation 0.0707, t of one degree of freedom 12.706.
    half = 12.706 * 0.0707107 / 2**0.5
    assert row["accuracy_less_full_interval"] == pytest.approx(half, rel=1e-4)
    assert row["cos_global"] is None and row["cos_global_less_full"] is None
    (line,) = result["findings"]
    assert line.startswith("w/o intervention: moved CE (nats) +0.100 ± 0.000; not beyond")
    assert "accuracy -0.050" in line and "cos" not in line


def test_ablation_command(tmp_path):
    command = ["demo", "--ablation", "--seeds", "1", "--steps", "1", "--train-scenes", "16"]
    command += ["--heldout-scenes", "16", "--batch-size", "4", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *command, "--json", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["arms"]) == list(ABLATION)
    for arm, row in result["arms"].items():
        intervenes = arm not in ("w/o intervention", "adapters, SFT only")
        assert (row["cos_global"] is not None) == intervenes
        assert math.isfinite(row["ce"]) and row["ce_interval"] is None, "one seed, no interval"
    assert "w/o distillation" in done.stdout and (tmp_path / "ablation.png").stat().st_size > 9000


def test_ablation_arms_switch_terms_off():
    settings = {arm: arm_config(arm, 0, DemoConfig()) for arm in ABLATION}
    assert all(s.objective == "deepalign" for s in settings.values())
    assert settings["full"].deepalign.without == ()
    alone = settings["adapters, SFT only"].deepalign
    assert not alone.intervenes and not alone.weight("visual")
    moca = arm_config("moca", 0, DemoConfig())
    assert moca.objective == "sft" and moca.adapter.calibration and not moca.adapter.shift_layers
    with pytest.raises(ValueError, match="choose one"):
        DemoConfig(real=True, ablation=True)
