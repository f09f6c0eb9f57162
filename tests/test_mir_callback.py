"""MIR in a Trainer: the value, the log, the course of training, its end, resuming, two ranks."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
import _mir_trainer as ranks
import _trainer_ranks as run
from transformers import Trainer, TrainerCallback

import fastalign as fa
from fastalign import diagnostics
from fastalign._run import mir_watch
from fastalign.integrations.transformers import AlignmentTrainer, MIRCallback
from fastalign.testing.families import family
from fastalign.testing.models import llava_batch

RUN = Path(__file__).with_name("_mir_trainer.py")

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular.*")


class Tracker(TrainerCallback):
    """The lines that a `report_to` would get."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append((state.global_step, dict(logs)))


def trained(folder, callback=None, *, cls=AlignmentTrainer, bind=True, **changes):
    """A trainer after its run; `changes` are those of `_trainer_ranks.trainer`."""
    changes = {"size": 64, "gradient_accumulation_steps": 1} | changes
    trainer = run.trainer(folder, "sft", cls=cls, **changes)
    if callback is not None:
        callback.trainer = trainer if bind else None
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def values(trainer):
    return [line["mir"] for line in trainer.state.log_history if "mir" in line]


# -- the value and the log -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AlignmentTrainer, Trainer])
def test_measures_every_few_steps_what_measure_mir_measures(tmp_path, cls):
    callback = MIRCallback(ranks.batches(), every=2, trainer=None)
    trainer = trained(tmp_path, callback, cls=cls, max_steps=5)
    assert [line["step"] for line in callback.history] == [2, 4]
    assert values(trainer) == [line["mir"] for line in callback.history]
    trainer = trained(tmp_path, cls=cls, max_steps=4)
    expected = diagnostics.measure_mir(fa.VLM(trainer.model), ranks.batches())
    assert callback.history[-1]["mir"] == pytest.approx(expected["mir"], abs=1e-6)
    assert callback.history[-1]["fid"] == pytest.approx(expected["fid"], rel=1e-5)
    figure = diagnostics.plot_mir_per_layer({str(h["step"]): h for h in callback.history})
    assert len(figure.axes[0].lines) == 2


def test_the_log_keeps_the_losses_and_trackers_see_the_value_and_its_cost(tmp_path):
    trainer = run.trainer(tmp_path, "sft", size=64, max_steps=4, logging_steps=2)
    tracker, callback = Tracker(), MIRCallback(ranks.batches(), every=2, trainer=trainer)
    for one in (tracker, callback):
        trainer.add_callback(one)
    trainer.train()
    seen = [(step, "mir" in line, "loss" in line) for step, line in tracker.lines[:-1]]
    assert seen == [(2, True, False), (2, False, True), (4, True, False), (4, False, True)]
    line = tracker.lines[0][1]
    assert line["mir"] == callback.history[0]["mir"]
    assert 0 < line["mir_seconds"] == callback.history[0]["seconds"] < 60


def test_without_a_trainer_values_stay_in_the_history(tmp_path):
    callback = MIRCallback(ranks.batches(), every=2)
    trainer = trained(tmp_path, callback, bind=False, max_steps=2)
    (line,) = [line for line in trainer.state.log_history if "mir" in line]
    assert line["step"] == 2 and line["mir"] == callback.history[0]["mir"]


def test_training_takes_the_same_course(tmp_path):
    loader = torch.utils.data.DataLoader(range(3), shuffle=True, collate_fn=lambda _: BATCH)
    callback = MIRCallback(loader, every=1)
    changes = {"max_steps": 3, "train_sampling_strategy": "random"}
    watched = trained(tmp_path, callback, **changes)
    alone = trained(tmp_path, **changes)
    assert len(callback.history) == 3 and watched.model.training == alone.model.training
    for name, parameter in alone.model.state_dict().items():
        assert torch.equal(parameter, watched.model.state_dict()[name]), name


BATCH = ranks.batches(1)[0]


# -- the data ------------------------------------------------------------------------------------


def test_batches_are_read_once_and_whole_until_there_are_enough_samples(tmp_path):
    read = []

    def batches():
        for batch in ranks.batches(5):  # of four samples
            read.append(batch)
            yield batch

    callback = MIRCallback(batches(), every=1, samples=9)
    trained(tmp_path, callback, max_steps=2)
    assert len(read) == 3 and len(callback.history) == 2
    assert callback.history[0]["vision_tokens"] == 3 * 4 * 16


def test_a_dataset_is_drawn_from_and_collated(tmp_path):
    drawn = []

    def collate(items):
        drawn.append(items)
        return llava_batch(["ttityyyy"] * len(items), seed=items[0])

    callback = MIRCallback(range(50), every=1, samples=7, collate=collate, batch_size=3, seed=1)
    trained(tmp_path, callback, max_steps=2)
    assert [len(items) for items in drawn] == [3, 3, 1] * 2
    assert drawn[:3] == drawn[3:] and len({i for items in drawn[:3] for i in items}) == 7
    assert callback.history[0]["vision_tokens"] == 7 * 16
    few = MIRCallback(range(2), every=1, samples=7, collate=collate)
    trained(tmp_path, few, max_steps=1)
    assert sorted(drawn[-1]) == [0, 1]


def test_options_reach_the_metric(tmp_path):
    options = {"method": "official_fast", "outliers": "median", "text": "after"}
    callback = MIRCallback(ranks.batches(), every=1, **options)
    trainer = trained(tmp_path, callback, max_steps=1)
    expected = diagnostics.measure_mir(fa.VLM(trainer.model), ranks.batches(), **options)
    assert callback.history[0]["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert callback.history[0]["text_tokens"] == 3 * 4 * 9


# -- the end of training -------------------------------------------------------------------------


def test_training_ends_where_mir_stands_still(tmp_path):
    callback = MIRCallback(ranks.batches(), every=2, patience=3)
    trainer = trained(tmp_path, callback, max_steps=20, learning_rate=0.0)
    # The first value is a minimum; then three that are none.
    assert [line["step"] for line in callback.history] == [2, 4, 6, 8]
    assert trainer.state.global_step == 8
    assert len(set(values(trainer))) == 1


@pytest.mark.parametrize(
    ("patience", "min_delta", "stop"),
    [
        (1, 0.0, 3),  # 2.0 again is no new minimum
        (2, 0.0, 4),  # nor is NaN
        (3, 0.0, 10),  # 1.5 at step 5 is
        (2, 0.3, 4),
        (3, 0.3, 8),  # 1.5 is 0.3 below 2.0, but 1.45 and 1.4 are not so far below 1.5
        (None, 0.0, 10),
    ],
)
def test_patience_counts_values_without_a_new_minimum(
    tmp_path, monkeypatch, patience, min_delta, stop
):
    series = iter([3.0, 2.0, 2.0, math.nan, 1.5, 1.6, 1.45, 1.4, 1.1, 1.0])
    monkeypatch.setattr(mir_watch, "measure_mir", lambda *a, **k: {"mir": next(series)})
    callback = MIRCallback([], every=1, patience=patience, min_delta=min_delta)
    trainer = trained(tmp_path, callback, max_steps=10)
    assert trainer.state.global_step == stop


def test_a_resumed_run_remembers_its_values(tmp_path):
    changes = {"max_steps": 20, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 4}
    first = MIRCallback(ranks.batches(), every=2, patience=3)
    trainer = trained(tmp_path, first, **changes)
    assert trainer.state.global_step == 8
    second = MIRCallback(ranks.batches(), every=2, patience=3)
    trainer = run.trainer(tmp_path, "sft", size=64, gradient_accumulation_steps=1, **changes)
    second.trainer = trainer
    trainer.add_callback(second)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [line["step"] for line in second.history] == [6, 8]
    assert trainer.state.global_step == 8


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be"),
        ({"samples": 0}, "samples must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"patience": 0}, "patience must be"),
        ({"min_delta": -1.0}, "min_delta must be at least 0: got -1.0"),
        ({"min_delta": math.nan}, "min_delta must be at least 0: got nan"),
        ({"method": "fast"}, "method must be one of"),
        ({"outliers": "drop"}, "outliers must be one of"),
        ({"text": "before"}, "text must be one of"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MIRCallback([], **options)


def begin(model, **changes):
    args = SimpleNamespace(**({"report_to": [], "fsdp": [], "deepspeed": None} | changes))
    state = SimpleNamespace(log_history=[])
    MIRCallback([]).on_train_begin(args, state, None, model=model)


def test_trainers_that_it_cannot_serve():
    model = run.model()
    begin(model)
    with pytest.raises(ValueError, match=r"trainer must be given, as report_to is \['wandb'\]"):
        begin(model, report_to=["wandb"])
    with pytest.raises(ValueError, match="the model must be whole on every rank"):
        begin(model, fsdp=["full_shard"])
    with pytest.raises(ValueError, match="the model must be whole on every rank"):
        begin(model, deepspeed="zero3.json")


def test_cross_attention_models_are_refused():
    with pytest.raises(ValueError, match="MllamaForConditionalGeneration reads them by cross-att"):
        begin(family("mllama"))


def test_no_image_tokens(tmp_path):
    with pytest.raises(ValueError, match="batches must hold image tokens and text tokens"):
        trained(tmp_path, MIRCallback([llava_batch(["tttyy"] * 3)], every=1), max_steps=1)


# -- ranks ---------------------------------------------------------------------------------------


def test_two_ranks_measure_what_one_measures(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(RUN), str(tmp_path)]
    processes = [
        subprocess.Popen([*command, str(rank), "2", port], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    alone = ranks.measured(tmp_path / "alone", 2)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [f["own"] for f in found] == [2, 1] and alone["own"] == 3
    assert found[0]["log"] == found[1]["log"] and len(found[0]["log"]) == 2
    assert found[0]["log"] == pytest.approx(alone["log"], abs=1e-5)
    for ours, whole in zip(found[0]["history"], alone["history"], strict=True):
        assert ours["fid"] == pytest.approx(whole["fid"], rel=1e-4)
        assert ours["text_tokens"] == whole["text_tokens"]
