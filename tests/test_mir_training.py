"""MIR while `fastalign.train` trains: the value, training's course, resuming, its end, ranks."""

import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _mir_run import collate, config, lines, run

pytest.importorskip("transformers")
import fastalign as fa
from fastalign import diagnostics
from fastalign._run import mir_watch
from fastalign.testing.families import family
from fastalign.testing.models import llava_batch, tiny_llava

RUN = Path(__file__).with_name("_mir_run.py")

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular.*")


def values(folder):
    return {line["step"]: line["mir"] for line in lines(folder) if "mir" in line}


def equal(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    return folder, run(config(folder, save_every=2, keep_checkpoints=9))


# -- the value -----------------------------------------------------------------------------------


def test_the_log_has_what_measure_mir_measures(tmp_path):
    done = run(config(tmp_path, mir_every=3, max_steps=3), make=collate)
    drawn = random.Random(0).sample(range(20), 7)  # the seed of the run
    batches = [collate(drawn[i : i + 2]) for i in range(0, 7, 2)]
    expected = diagnostics.measure_mir(fa.VLM(done.model), batches)["mir"]
    assert values(tmp_path) == {3: pytest.approx(expected, abs=1e-7)}
    assert done.history[-1]["mir"] == values(tmp_path)[3]
    assert 0 < done.history[-1]["mir_seconds"] < 60


def test_a_value_stands_in_the_line_of_its_step_or_in_one_of_its_own(watched):
    folder, done = watched
    found = [(line["step"], "mir" in line, "loss" in line) for line in lines(folder)]
    assert found == [(2, True, False), (3, False, True), (4, True, False), (6, True, True)]
    assert len({round(mir, 9) for mir in values(folder).values()}) == 3  # the model moved
    assert [line["step"] for line in done.history] == [2, 3, 4, 6]
    curve = diagnostics.learning_curve(folder)
    figure = diagnostics.plot_learning_curve({"run": curve}, terms=("mir", "loss"))
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [3, 2]


# -- the course of training ----------------------------------------------------------------------


def test_training_takes_the_same_course(watched, tmp_path):
    folder, done = watched
    alone = run(config(tmp_path, mir_every=0))
    assert equal(alone.model, done.model)
    plain = [line for line in lines(folder) if "loss" in line]
    assert [{k: v for k, v in line.items() if k != "mir"} for line in plain] == lines(tmp_path)


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_bit_equal(watched, tmp_path, step):
    folder, done = watched
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    resumed = run(config(tmp_path, save_every=2))
    assert equal(resumed.model, done.model)
    assert lines(tmp_path) == lines(folder)


def test_measuring_may_be_taken_up_and_left_by_a_resumed_run(watched, tmp_path):
    folder, done = watched
    for every in (0, 3):
        path = tmp_path / str(every)
        shutil.copytree(folder / "checkpoint-4", path / "checkpoint-4")
        assert equal(run(config(path, mir_every=every)).model, done.model)
        assert values(path).keys() == ({6} if every else set())


def test_a_checkpoint_without_a_value_begins_anew():
    watch = mir_watch.watch_of(fa.TrainConfig(mir_patience=2, mir_every=1), *given())
    watch.judge(1.0), watch.judge(2.0)
    kept = json.loads(json.dumps(watch.state()))
    again = mir_watch.watch_of(fa.TrainConfig(mir_patience=2, mir_every=1), *given())
    for state, stops in ((None, False), (kept | {"samples": 9}, False), (kept, True)):
        again.forget()
        again.restore(state)
        again.judge(1.5)
        assert again.stands_still is stops


def test_mixed_precision_measures_in_it(tmp_path):
    done = run(config(tmp_path, mir_every=3, max_steps=3, bf16=True), make=collate)
    vlm, drawn = fa.VLM(done.model), random.Random(0).sample(range(20), 7)
    batches = [collate(drawn[i : i + 2]) for i in range(0, 7, 2)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = diagnostics.measure_mir(vlm, batches)["mir"]
    assert values(tmp_path)[3] == pytest.approx(expected, abs=1e-7)
    assert abs(expected - diagnostics.measure_mir(vlm, batches)["mir"]) > 1e-6


# -- the end of training -------------------------------------------------------------------------


def test_training_ends_where_mir_stands_still(tmp_path):
    # The first value is a minimum; then two that are none.
    changes = {"learning_rate": 0.0, "mir_patience": 2, "max_steps": 20, "log_every": 10}
    done = run(config(tmp_path, save_every=2, keep_checkpoints=9, **changes))
    assert [line["step"] for line in done.history] == [2, 4, 6]
    assert "loss" in done.history[-1] and (tmp_path / "adapter").is_dir()
    before = lines(tmp_path)
    again = run(config(tmp_path, save_every=2, keep_checkpoints=9, **changes))
    assert lines(tmp_path) == before and len(again.history) == 3  # nothing was left to do
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    run(config(tmp_path, save_every=2, **changes))
    assert lines(tmp_path) == before


def test_a_minimum_must_lie_so_far_below(tmp_path, monkeypatch):
    series = iter([3.0, 2.9, math.nan, 2.5])
    monkeypatch.setattr(mir_watch, "measure_mir", lambda *a, **k: {"mir": next(series)})
    changes = {"mir_every": 1, "mir_patience": 2, "mir_min_delta": 0.2}
    assert run(config(tmp_path, **changes)).history[-1]["step"] == 3


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mir_every": -1}, "mir_every must be at least 0: got -1"),
        ({"mir_samples": 0}, "mir_samples must be at least 1: got 0"),
        ({"mir_every": 1, "mir_patience": 0}, "mir_patience must be at least 1: got 0"),
        ({"mir_min_delta": math.nan}, "mir_min_delta must be at least 0: got nan"),
        ({"mir_patience": 3}, "mir_patience needs measurements: set mir_every too, got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        fa.TrainConfig(**changes)


def given(engine="NO", model=None, make=collate):
    """What `watch_of` takes beside the settings."""
    kind = SimpleNamespace(value=engine)
    accelerator = SimpleNamespace(distributed_type=kind, process_index=0, num_processes=1)
    return fa.VLM(model or tiny_llava()), range(20), make, accelerator


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_engines_that_shard_the_weights_are_refused_with_the_way_out(engine):
    asked = fa.TrainConfig(mir_every=1)
    with pytest.raises(ValueError, match=f"sharded weights .{engine}.*or measure checkpoints with"):
        mir_watch.watch_of(asked, *given(engine))
    mir_watch.watch_of(fa.TrainConfig(), *given(engine))
    mir_watch.watch_of(asked, *given("MULTI_CPU"))


def test_data_and_models_without_image_tokens_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="mir_every needs samples with images: none of 7"):
        run(config(tmp_path), make=lambda indices: llava_batch(["ttyy"] * len(indices)))
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="reads them by cross-att"):
        mir_watch.watch_of(fa.TrainConfig(mir_every=1), *given(model=family("mllama")))


# -- ranks ---------------------------------------------------------------------------------------


def test_two_ranks_measure_what_one_measures_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(RUN), str(tmp_path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    still = {"learning_rate": 0.0, "mir_patience": 1, "mir_every": 1}
    run(config(tmp_path / "alone", **still), make=collate, dropout=0.0)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert values(tmp_path / "stopped") == pytest.approx(values(tmp_path / "alone"), abs=1e-6)
    assert values(tmp_path / "both").keys() == {2, 4}
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first["sum"] == second["sum"] and first["steps"] == [1, 2] and second["steps"] == []
