"""The training loop: what it computes, what it writes, and how it comes back after a crash."""

import importlib.util
import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastalign as fa
from fastalign import checkpoint
from fastalign.adapters import upper_half
from fastalign.config import StepSampler, learning_rate
from fastalign.testing.models import llava_batch

RUN = Path(__file__).with_name("_train_run.py")
spec = importlib.util.spec_from_file_location("_train_run", RUN)
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def train(folder, objective="sft", collate=run.collate, **changes):
    config = run.config(folder, objective, **changes)
    return fa.train(config, model=run.model(), dataset=range(20), collate=collate)


def parameters(result):
    return {k: v for k, v in result.model.state_dict().items() if "fastalign" in k}


@pytest.mark.parametrize(
    ("objective", "vision"),
    [("sft", None), ("sft", 2), ("cal", None), ("deepalign", None)],
    ids=["sft", "sft-vision", "cal", "deepalign"],
)
def test_killed_run_resumes_bit_equal(tmp_path, objective, vision):
    """SIGKILL in the middle, then the same command: the end is that of an undisturbed run."""
    whole = train(tmp_path / "whole", objective, train_vision_from=vision)
    # DeepAlign's classifier phase takes batches of its own first.
    fatal = 10 if objective != "deepalign" else 20
    command = [sys.executable, str(RUN), str(tmp_path / "killed"), objective]
    if vision is not None:
        command += ["--train-vision-from", str(vision)]
    killed = subprocess.run([*command, "--kill", str(fatal)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "killed")] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    files = ["adapter/adapter_model.safetensors"]
    files += ["model/model.safetensors"] if vision is not None else []
    for file in files:
        expected, actual = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[k], expected[k]) for k in expected)
    lines = (tmp_path / "killed/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == [line["loss"] for line in whole.history] and len(losses) == run.STEPS
    if objective == "deepalign":  # the classifier and the global direction go on too
        ends = [state_of(tmp_path / name) for name in ("whole", "killed")]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[1][k], v) for k, v in ends[0].items())
        pairs = whole.classifier.train_pairs + whole.classifier.heldout_pairs
        assert ends[0]["objective.direction.count"] > pairs


def state_of(folder):
    """What the last checkpoint holds of the objective."""
    tensors = load_file(checkpoint.checkpoints(folder)[-1] / "trained.safetensors")
    return {k: v for k, v in tensors.items() if k.startswith("objective.")}


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    train(tmp_path, max_steps=4)
    (tmp_path / "checkpoint-4/trainer.json").unlink()
    (tmp_path / ".checkpoint-6.partial").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over: trainer.json is missing"):
        again = train(tmp_path, max_steps=4)
    assert [line["step"] for line in again.history] == [1, 2, 3, 4]
    assert checkpoint.verify(tmp_path / "checkpoint-4") == []
    assert not (tmp_path / ".checkpoint-6.partial").exists()


def test_only_the_newest_checkpoints_stay(tmp_path):
    train(tmp_path, save_every=1, keep_checkpoints=3)
    names = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert names == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    stored = load_file(tmp_path / "checkpoint-6/trained.safetensors")
    assert all("fastalign_adapter" in name for name in stored)


def test_another_run_is_not_resumed(tmp_path):
    train(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"another run \(learning_rate: 0.01 then, 0.02 now\)"):
        train(tmp_path, max_steps=2, learning_rate=2e-2)
    train(tmp_path, max_steps=2, learning_rate=2e-2, resume=False)


@pytest.mark.parametrize("objective", ["sft", "cal"])
def test_accumulation_does_not_change_the_run(tmp_path, objective):
    """1 x 4, 2 x 2 and 4 x 1 samples a step: equal losses and weights, dropout off."""
    results = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        config = run.config(
            tmp_path / str(size),
            objective,
            batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            save_every=0,
        )
        model = run.model(dropout=0.0)
        results.append(fa.train(config, model=model, dataset=range(20), collate=run.collate))
    for other in results[1:]:
        for a, b in zip(results[0].history, other.history, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", ["cal", "deepalign"])
def test_two_ranks_train_as_one(tmp_path, objective):
    """2 x 2 samples on gloo ranks and 1 x 4 on one process: equal losses and adapters."""
    command = [str(RUN), "FOLDER", objective, "--no-dropout", "--batch-size"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, prefix, size in (("one", [sys.executable], "4"), ("two", launch, "2")):
        command[1] = str(tmp_path / name)
        done = subprocess.run([*prefix, *command, size], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("one", "two")
    )
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    weights = [
        load_file(tmp_path / n / "adapter/adapter_model.safetensors") for n in ("one", "two")
    ]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, atol=1e-4, rtol=1e-3)
    states = [state_of(tmp_path / name) for name in ("one", "two")]
    assert ("objective.direction.mean" in states[0]) == (objective == "deepalign")
    torch.testing.assert_close(states[1], states[0], atol=1e-4, rtol=1e-4)


def test_the_base_is_frozen_and_the_adapter_learns(tmp_path):
    before = {k: v.clone() for k, v in run.model().state_dict().items()}
    result = train(tmp_path, "deepalign", max_steps=4)
    after = result.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    moved = [v.abs().sum() for k, v in after.items() if "conv2.weight" in k]
    assert len(moved) == 2 and all(m > 0 for m in moved)
    assert result.classifier.heldout_pairs > 0 and result.path == tmp_path / "adapter"
    fresh = run.model()
    fa.load_adapter(fresh, result.path)
    batch = llava_batch(["ttity"])
    with torch.no_grad():
        torch.testing.assert_close(fresh(**batch).logits, result.model(**batch).logits)


def test_the_upper_half_of_the_tower_learns_beside_the_adapter(tmp_path):
    """Of a tower of 4 layers whose third is read: layer 3, and nothing else of the base."""
    from transformers import AutoModelForImageTextToText

    model, first = run.model(), upper_half(run.model())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = train(tmp_path, "deepalign", max_steps=4, train_vision_from=first)
    after = result.model.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(after[k], v)}
    assert first == 3 and len(moved) > 10
    assert all("vision_tower.encoder.layers.2." in k for k in moved)
    assert result.path == tmp_path / "model"
    stored = load_file(checkpoint.checkpoints(tmp_path)[-1] / "trained.safetensors")
    assert {f"model.{k}" for k in moved} <= stored.keys()
    loaded = AutoModelForImageTextToText.from_pretrained(result.path, dtype=torch.float32)
    fa.load_adapter(loaded, tmp_path / "adapter")
    batch = llava_batch(["ttity"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, result.model(**batch).logits)


def test_layers_of_the_tower_that_cannot_be_trained_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"train_vision_from must lie in 1..3.*got 4"):
        train(tmp_path, train_vision_from=4)
    with pytest.raises(ValueError, match=r"train_vision_from goes with trainable=\"adapters\""):
        fa.TrainConfig(trainable="all", train_vision_from=2)
    config = run.config(tmp_path, "sft", train_vision_from=2, bf16=True)
    with pytest.raises(ValueError, match=r"needs a model in float32.*got torch.bfloat16"):
        fa.train(config, model=run.model().bfloat16(), dataset=range(20), collate=run.collate)


def test_the_classifier_is_judged_before_and_after(tmp_path):
    config = run.config(tmp_path, "deepalign", max_steps=2)
    first = fa.train(config, model=run.model(dropout=0.0), dataset=range(20), collate=run.collate)
    judged = first.classifier_accuracy
    assert judged.before.accuracy == first.classifier.accuracy
    assert judged.pairs == first.classifier.heldout_pairs
    assert judged.after.margin != judged.before.margin
    names = {"global", "instance", "mutual", "cos_global", "cos_instance"}
    assert all(names <= set(line) for line in first.history)
    assert abs(first.history[0]["cos_global"]) < 1e-3 < abs(first.history[1]["cos_global"])
    # A finished run that is started again only reports.
    again = fa.train(config, model=run.model(dropout=0.0), dataset=range(20), collate=run.collate)
    assert again.classifier == first.classifier
    assert again.classifier_accuracy.pairs == judged.pairs
    plain = train(tmp_path / "sft", max_steps=1)
    assert plain.classifier is None and plain.classifier_accuracy is None


def test_every_parameter_can_be_trained(tmp_path):
    from transformers import AutoModelForImageTextToText

    result = train(tmp_path, "sft", trainable="all", max_steps=3)
    assert not hasattr(result.model, "fastalign_adapter")
    loaded = AutoModelForImageTextToText.from_pretrained(result.path, dtype=torch.float32)
    original = run.model().state_dict()
    moved = [not torch.equal(v, original[k]) for k, v in loaded.state_dict().items()]
    assert sum(moved) > 0.8 * len(moved)
    batch = llava_batch(["ttity"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, result.model(**batch).logits)


def test_bfloat16_run_keeps_float32_weights(tmp_path):
    model = run.model().to(torch.bfloat16)
    config = run.config(tmp_path, "deepalign", bf16=True, max_steps=2)
    result = fa.train(config, model=model, dataset=range(20), collate=run.collate)
    stored = load_file(result.path / "adapter_model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float32}
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        batch = llava_batch(["ttity"], dtype=torch.bfloat16)
        assert result.model(**batch).logits.isfinite().all()


def test_training_lowers_the_loss(tmp_path):
    collate = lambda indices: llava_batch(run.SAMPLES)
    result = train(tmp_path, "sft", collate, trainable="all", max_steps=15, save_every=0)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_lines_hold_rates_and_memory(tmp_path):
    result = train(tmp_path, "cal", max_steps=4, log_every=2)
    assert [line["step"] for line in result.history] == [2, 4]
    names = {"loss", "ce", "accuracy", "delta", "weight", "grad_norm", "learning_rate"}
    names |= {"step", "tokens_per_s", "images_per_s", "peak_mib"}
    assert set(result.history[0]) == names
    assert all(math.isfinite(v) for line in result.history for v in line.values())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_trackers_get_every_line_and_the_settings(tmp_path, monkeypatch):
    from accelerate import Accelerator

    started, logged, ended = [], [], []
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, name, config: started.append(config)
    )
    monkeypatch.setattr(Accelerator, "log", lambda self, line, step: logged.append((step, line)))
    monkeypatch.setattr(Accelerator, "end_training", lambda self: ended.append(True))
    result = train(tmp_path, max_steps=4, log_every=2, report_to=("all",))
    assert [step for step, _ in logged] == [2, 4] and ended == [True]
    assert [line for _, line in logged] == result.history
    assert started[0]["adapter.kernel_size"] == 3 and started[0]["learning_rate"] == 1e-2


def test_nan_stops_the_run_before_the_step(tmp_path):
    def poisoned(indices):
        batch = run.collate(indices)
        if 7 in indices and "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"] * torch.nan
        return batch

    with pytest.raises(FloatingPointError, match=r"loss.* not finite at step \d"):
        train(tmp_path, "sft", poisoned, max_steps=20, save_every=1)
    newest = load_file(checkpoint.checkpoints(tmp_path)[-1] / "trained.safetensors")
    assert all(v.isfinite().all() for v in newest.values())


def test_the_schedule_is_warm_up_then_cosine():
    config = fa.TrainConfig(max_steps=110, warmup_ratio=10 / 110, learning_rate=1.0)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.5)
    assert learning_rate(109, config) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_a_step_takes_the_same_samples_however_divided(ranks, steps):
    config = fa.TrainConfig(max_steps=5, batch_size=2, gradient_accumulation_steps=steps, seed=3)
    lists = [list(StepSampler(13, config, rank, ranks, 0)) for rank in range(ranks)]
    whole = list(
        StepSampler(13, replace(config, batch_size=8, gradient_accumulation_steps=1), 0, 1, 0)
    )
    for step in range(5):
        own = [lists[r][step * steps + m] for m in range(steps) for r in range(ranks)]
        assert sum(own, []) == whole[step]
    flat = sum(whole, [])
    assert sorted(flat[:13]) == list(range(13)) and flat[:13] != flat[13:26]
    later = list(StepSampler(13, config, 0, ranks, 3))
    assert later == lists[0][3 * steps :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dpo"}, "objective must be one of .*'dpo'"),
        ({"trainable": "head"}, "trainable must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1: got 0"),
        ({"warmup_ratio": 2.0}, "warmup_ratio must lie in 0..1"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fa.TrainConfig(**changes)


def test_missing_materials_are_named(tmp_path):
    config = run.config(tmp_path, "sft")
    with pytest.raises(ValueError, match="must name a model and data"):
        fa.train(config)
    with pytest.raises(ValueError, match="collate must be given"):
        fa.train(config, model=run.model(), dataset=range(4))
    with pytest.raises(ValueError, match="at least one sample"):
        fa.train(config, model=run.model(), dataset=range(0), collate=run.collate)
