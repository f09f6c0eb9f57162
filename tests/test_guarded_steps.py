"""Guards of a run: a step that is not finite changes nothing, and a healthy one costs one look."""

import json
import math

import _train_run as run
import pytest
import torch
from _faults import BAD, Fault, poison, train
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign as fa
from fastalign import checkpoint
from fastalign._run.guards import Guard
from fastalign._run.looks import unfit
from fastalign.config import learning_rate
from fastalign.teachers import CachedTeacher


@pytest.mark.filterwarnings("ignore:the modality classifier")
@pytest.mark.parametrize("objective", ["cal", "deepalign"])
def test_a_step_that_is_left_out_changes_nothing(tmp_path, objective):
    """Weights, moments and the running direction are those before; the run goes on, and resumes."""
    fault = Fault(poison("pixel_values"))
    changes = {"on_nonfinite": "skip", "keep_checkpoints": 9, "log_every": 2}
    result = train(tmp_path, fault, objective, **changes)
    tensors = [
        {
            file: load_file(tmp_path / f"checkpoint-{step}" / f"{file}.safetensors")
            for file in ("trained", "optimizer")
        }
        for step in (BAD - 1, BAD, BAD + 1)
    ]
    for file in ("trained", "optimizer"):
        before, same, after = (t[file] for t in tensors)
        assert all(torch.equal(same[k], v) for k, v in before.items())
        assert any(not torch.equal(after[k], v) for k, v in before.items())
    if objective == "deepalign":
        before, same, after = (t["trained"]["objective.direction.count"] for t in tensors)
        assert before == same < after
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 0]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    config = run.config(tmp_path, objective)
    assert lines[1]["learning_rate"] == learning_rate(3, config)
    # The line of steps 3 and 4 is that of step 4 alone; a resumed run writes the same one.
    for step in (4, 5, 6):
        for path in (tmp_path / f"checkpoint-{step}").iterdir():
            path.unlink()
        (tmp_path / f"checkpoint-{step}").rmdir()
    again = Fault(start=BAD)
    resumed = train(tmp_path, again, objective, **changes | {"on_nonfinite": "raise"})
    assert resumed.history[1]["loss"] == result.history[1]["loss"]
    for k, v in result.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[k], v)


def test_too_many_in_a_row_end_the_run(tmp_path):
    fault = Fault(lambda batch: batch.update(other=torch.tensor([math.nan])), last=99)
    with pytest.raises(FloatingPointError, match="at step 12: .*the last of 10 such in a row"):
        train(tmp_path, fault, on_nonfinite="skip", max_steps=20, save_every=0)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [line["skipped_steps"] for line in lines] == [0, 0] + 9 * [1]
    assert "loss" in lines[1] and "loss" not in lines[2]


@pytest.mark.filterwarnings("ignore:the modality classifier")
def test_the_classifier_is_given_no_bad_pair(tmp_path):
    def collate(indices):
        batch = run.collate(indices)
        if 7 in indices:
            poison("pixel_values")(batch)
        return batch

    found = "pixel_values of a batch of the classifier's pairs, sample . .index .* not finite: mend"
    with pytest.raises(FloatingPointError, match=found):
        train(tmp_path, Fault(), "deepalign", collate)
    assert not checkpoint.checkpoints(tmp_path)
    result = train(tmp_path, Fault(), "deepalign", collate, on_nonfinite="skip", max_steps=1)
    assert result.classifier.train_pairs >= 4


class Waits(TorchDispatchMode):
    """Counts how often a number is asked for, which waits for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_healthy_step_waits_once(tmp_path, monkeypatch):
    waits, accepts, begin = Waits(), Guard.accepts, Guard.begin
    shares = Guard.with_inputs

    def counted(method):
        def call(*args, **kwargs):
            with waits:
                return method(*args, **kwargs)

        return call

    for name, method in (("accepts", accepts), ("begin", begin), ("with_inputs", shares)):
        monkeypatch.setattr(Guard, name, counted(method))
    train(tmp_path, Fault(last=0), "cal", max_steps=4, save_every=0)
    assert waits.count == 4


def test_batches_are_looked_at_where_they_lie():
    fine = {"x": torch.full((4,), 3e38), "y": [torch.ones(2)], "ids": torch.ones(3).long(), "n": 1}
    assert unfit(fine) == 0.0  # whose sum overflows
    assert math.isnan(unfit(fine | {"y": [torch.ones(2), torch.tensor([1.0, -math.inf])]}))


def test_features_that_are_not_finite_are_not_kept(tmp_path):
    features = torch.ones(2, 4, 3)
    cached = CachedTeacher(lambda batch: features, tmp_path, name="mine")
    features[1, 0, 0] = math.nan
    assert cached({"pixel_values": torch.rand(2, 3, 8, 8)}).isnan().sum() == 1
    assert len(cached) == 0


@pytest.mark.filterwarnings("ignore:the modality classifier")
@pytest.mark.parametrize("objective", ["sft", "cal", "deepalign"])
def test_steps_without_labels_or_images_are_survived(tmp_path, objective):
    """Step 3 has no label at all, step 4 no image either."""
    fault = Fault(last=BAD + 1)

    def collate(indices):
        batch = fault(indices)
        if fault.on:
            batch["labels"] = torch.full_like(batch["labels"], -100)
        if fault.on and fault.step > BAD:
            ids = batch["input_ids"]
            batch = {k: batch[k] for k in ("attention_mask", "labels")}
            batch["input_ids"] = ids.masked_fill(ids == 3, 5)
        return batch

    result = train(tmp_path, fault, objective, collate, save_every=0)
    assert len(result.history) == run.STEPS
    assert all(math.isfinite(v) for line in result.history for v in line.values())
    assert result.history[BAD - 1]["ce"] == 0.0 and result.history[BAD]["images_per_s"] == 0.0


def test_settings_of_the_guards_are_checked():
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .*got 'warn'"):
        fa.TrainConfig(on_nonfinite="warn")
    with pytest.raises(ValueError, match="ddp_timeout must be positive, in seconds: got 0"):
        fa.TrainConfig(ddp_timeout=0)
