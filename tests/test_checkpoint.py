"""Checkpoints: faults are found, named and passed over; no death, no full disk loses a run."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import _lives
import _saves
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign import checkpoint
from fastalign._run import random_states
from fastalign.config import StepSampler, check_same_place, schedule_state

HERE = Path(__file__).parent
LAST, BEFORE = f"checkpoint-{_lives.STEPS}", f"checkpoint-{_lives.STEPS - _lives.SAVE_EVERY}"
RATES = ("tokens_per_s", "images_per_s", "peak_mib")
pytestmark = pytest.mark.filterwarnings("ignore:the modality classifier is right")
made = {}


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    """A copy of an undisturbed run, which is made once; its twin stays whole."""
    if "whole" not in made:
        made["whole"] = tmp_path_factory.mktemp("whole") / "run"
        _lives.train(made["whole"])
    return shutil.copytree(made["whole"], tmp_path / "run")


def lines_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in RATES} for line in lines]


def assert_same_end(folder, whole):
    """Weights, running direction, moments, generators, running means, schedule, sampler, lines."""
    files = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(files) == 2 * 4 + 1  # two checkpoints and the adapter
    for file in files:
        actual, expected = load_file(folder / file), load_file(whole / file)
        for tensors in (actual, expected):
            tensors.pop("seconds", None)
        assert actual.keys() == expected.keys(), file
        differing = [k for k, v in expected.items() if not torch.equal(actual[k], v)]
        assert not differing, f"{file}: {differing}"
    for name in ("schedule.json", "sampler.json"):
        assert (folder / LAST / name).read_text() == (whole / LAST / name).read_text()
    assert lines_of(folder) == lines_of(whole)
    steps = [line["step"] for line in lines_of(folder)]
    assert steps == list(range(_lives.LOG_EVERY, _lives.STEPS + 1, _lives.LOG_EVERY))
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


# -- damage ---------------------------------------------------------------------------------------


def cut(name):
    def fault(path):
        os.truncate(path / name, (path / name).stat().st_size // 2)

    return fault


def remove(name):
    return lambda path: (path / name).unlink()


def flip(name, place=None):
    """Flip the lowest bit of a byte, the middle one unless told."""

    def fault(path):
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2 if place is None else place] ^= 1
        (path / name).write_bytes(content)

    return fault


def rewrite(name, change):
    """Change tensors and sign the result, so that sizes and checksums agree."""

    def fault(path):
        tensors = load_file(path / name)
        change(tensors)
        save_file(tensors, path / name)
        manifest = json.loads((path / "manifest.json").read_text())
        signed = {"bytes": (path / name).stat().st_size}
        manifest["files"][name] |= signed | {"sha256": checkpoint.sha256_of(path / name)}
        (path / "manifest.json").write_text(json.dumps(manifest))

    return fault


def poison(tensors):
    name = sorted(name for name in tensors if "conv2.weight" in name or "exp_avg" in name)[0]
    tensors[name].flatten()[3] = torch.nan


EIGHT = {
    "missing state": (remove("trainer.json"), "trainer.json is missing"),
    "truncated optimizer": (
        cut("optimizer.safetensors"),
        r"optimizer.safetensors is truncated: \d+ bytes instead of \d+",
    ),
    "truncated weights": (
        cut("trained.safetensors"),
        r"trained.safetensors is truncated: \d+ bytes instead of \d+",
    ),
    "missing optimizer": (remove("optimizer.safetensors"), "optimizer.safetensors is missing"),
    "missing scheduler": (remove("schedule.json"), "schedule.json is missing"),
    "missing RNG": (remove("rng.safetensors"), "rng.safetensors is missing"),
    "one flipped byte": (
        flip("trained.safetensors"),
        "trained.safetensors has changed: SHA-256 differs",
    ),
    "NaN weights": (
        rewrite("trained.safetensors", poison),
        r"trained.safetensors holds \S+conv2.weight, which is not finite",
    ),
}


@pytest.mark.parametrize("name", EIGHT)
def test_a_fault_is_named_and_the_run_falls_back(run, name):
    """To the checkpoint before, from which it ends bit-equal to the undisturbed run."""
    fault, message = EIGHT[name]
    assert checkpoint.verify(run / LAST) == []
    fault(run / LAST)
    assert len(checkpoint.verify(run / LAST)) == 1
    assert checkpoint.verify(run / BEFORE) == []
    with pytest.warns(UserWarning, match=f"{LAST} is passed over: {message}"):
        _lives.train(run)
    assert checkpoint.verify(run / LAST) == []
    assert_same_end(run, made["whole"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (remove("manifest.json"), "manifest.json is missing$"),
        (cut("manifest.json"), "manifest.json cannot be read"),
        (remove("sampler.json"), "sampler.json is missing"),
        (remove("log.safetensors"), "log.safetensors is missing"),
        (
            rewrite("optimizer.safetensors", poison),
            "optimizer.safetensors holds 0.exp_avg, which is not finite",
        ),
        (
            rewrite("optimizer.safetensors", lambda tensors: tensors.pop("0.exp_avg_sq")),
            "optimizer.safetensors lacks 0.exp_avg_sq",
        ),
        (
            rewrite("log.safetensors", lambda tensors: tensors.update(more=torch.ones(2))),
            "log.safetensors holds an unknown more",
        ),
        (
            rewrite("rng.safetensors", lambda tensors: tensors.update({"0.torch": torch.ones(2)})),
            r"rng.safetensors holds 0.torch as float32 \[2\] instead of uint8 \[5056\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_faults_are_named(run, fault, message):
    fault(run / LAST)
    with pytest.warns(UserWarning, match=message):
        assert checkpoint.newest_valid(run) == run / BEFORE


def test_no_flipped_bit_passes(run):
    draw = random.Random(0)
    for file in sorted((run / LAST).iterdir()):
        for place in draw.sample(range(file.stat().st_size), 8):
            flip(file.name, place)(run / LAST)
            problems = checkpoint.verify(run / LAST)
            assert problems, f"{file.name}, byte {place}"
            flip(file.name, place)(run / LAST)
    assert checkpoint.verify(run / LAST) == []


def test_a_copy_under_another_step_is_no_checkpoint_of_it(run):
    (run / LAST).rename(run / "checkpoint-14")
    assert checkpoint.verify(run / "checkpoint-14") == [
        "manifest.json is of step 12, and the folder's name of 14"
    ]


def test_where_none_verifies_the_run_does_not_start_over(run):
    for name in (LAST, BEFORE):
        flip("optimizer.safetensors")(run / name)
    before = sorted(path.name for path in run.rglob("*"))
    with (
        pytest.warns(UserWarning, match="is passed over"),
        pytest.raises(ValueError, match=r"all damaged .*optimizer.safetensors.*or resume=False"),
    ):
        _lives.train(run)
    assert sorted(path.name for path in run.rglob("*")) == before


def test_format_1_is_named(tmp_path):
    old = tmp_path / "checkpoint-2"
    old.mkdir()
    for name in ("trained.safetensors", "optimizer.safetensors"):
        save_file({"x": torch.ones(1)}, old / name)
    (old / "trainer.json").write_text('{"format": 1, "step": 2}')
    assert checkpoint.verify(old) == [
        "manifest.json is missing: the checkpoint is of format 1, and this version reads "
        "format 2 only"
    ]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"is of format 1.*delete them"):
        checkpoint.newest_valid(tmp_path)


# -- what is restored -----------------------------------------------------------------------------


def test_a_torn_line_of_metrics_is_written_again(run):
    shutil.rmtree(run / LAST)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    _lives.train(run)
    assert_same_end(run, made["whole"])


def test_generators_come_back():
    def draws():
        return [
            torch.rand(3).tolist(),
            [random.random(), random.gauss(0, 1)],
            np.random.standard_normal(3).tolist(),
        ]

    random.gauss(0, 1), np.random.standard_normal()  # each keeps the second of a pair
    stored = random_states.states(torch.device("cpu"))
    assert {state.dtype for state in stored.values()} == {torch.uint8}
    expected = draws()
    assert draws() != expected
    random_states.restore(stored, torch.device("cpu"))
    assert draws() == expected


def test_tensors_of_another_run_change_nothing(tmp_path):
    _saves.save(tmp_path, 2)
    tensors, optimizer = _saves.trained(7.0)
    other = {**tensors, "weight": torch.zeros(5)}
    with pytest.raises(ValueError, match=r"weight in .* must have the shape \(5,\): got \(2, 3\)"):
        checkpoint.load(tmp_path / "checkpoint-2", other, optimizer)
    small = torch.optim.AdamW([tensors["weight"]])
    with pytest.raises(ValueError, match=r"1.exp_avg\S* in .* must fit a parameter of this run"):
        checkpoint.load(tmp_path / "checkpoint-2", tensors, small)
    assert all((tensor == 7).all() for tensor in tensors.values())
    stored = checkpoint.load(tmp_path / "checkpoint-2", tensors, optimizer)
    assert all((tensor == 2).all() for tensor in tensors.values())
    assert stored["schedule.json"] == {"step": 2} and stored["log.safetensors"]["value"] == 2


@pytest.mark.parametrize(
    ("size", "ranks", "message"),
    [
        (21, 1, "sampler.samples: 20 then, 21 now"),
        (20, 2, "sampler.position: 16 then, 32 now, sampler.world_size: 1 then, 2 now"),
    ],
)
def test_another_order_of_samples_is_refused(tmp_path, size, ranks, message):
    config = fa.TrainConfig(batch_size=4, max_steps=10)
    first = StepSampler(20, config, 0, 1, 0)
    stored = {"sampler.json": first.state(4), "schedule.json": schedule_state(4, config)}
    stored = json.loads(json.dumps(stored))
    check_same_place(stored, StepSampler(20, config, 0, 1, 4), tmp_path)
    with pytest.raises(ValueError, match=rf"of another run \({message}\)"):
        check_same_place(stored, StepSampler(size, config, 0, ranks, 4), tmp_path)


# -- saves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_written(tmp_path, where):
    _saves.save(tmp_path, 2)
    tensors, optimizer = _saves.trained()
    moments = optimizer.state[tensors["bias"]]["exp_avg"]
    with torch.no_grad():
        (tensors["bias"] if where == "weight" else moments)[1] = torch.inf
    name = r"bias must be .* trained" if where == "weight" else r"1.exp_avg must be .* optimizer"
    with pytest.raises(FloatingPointError, match=rf"{name}.safetensors at step 4"):
        checkpoint.save(tmp_path, 4, tensors, optimizer, _saves.states(4), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_only_checkpoint_that_verifies_stays(tmp_path, monkeypatch):
    """A disk that damages what it is given, in silence."""
    _saves.save(tmp_path, 2, keep=1)
    replace = os.replace

    def damaging(source, target):
        if target.name == "checkpoint-4":
            flip("trained.safetensors")(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", damaging)
    with pytest.warns(UserWarning, match="checkpoint-4 does not verify: no older"):
        _saves.save(tmp_path, 4, keep=1)
    with pytest.warns(UserWarning, match="checkpoint-4 is passed over"):
        assert checkpoint.newest_valid(tmp_path) == tmp_path / "checkpoint-2"
    _saves.save(tmp_path, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def test_checkpoints_of_a_run_that_was_given_up_go_with_the_first_save(tmp_path):
    for step in (4, 6, 10):
        _saves.save(tmp_path, step, keep=3)
    _saves.save(tmp_path, 2, keep=3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_leftovers_of_this_run_only_are_removed(tmp_path):
    names = (
        ".checkpoint-4.partial",
        ".checkpoint-2.removed",
        ".checkpoint-2.other",
        "checkpoint-2",
    )
    for folder in (tmp_path / "run", tmp_path / "run/other", tmp_path):
        for name in names:
            (folder / name).mkdir(parents=True)
    checkpoint.remove_leftovers(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [*names[2:], "other"]
    assert len(list((tmp_path / "run/other").iterdir())) == 4
    assert len(list(tmp_path.iterdir())) == 5


# -- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*checkpoint.FILES, "manifest.json"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch, name):
    _saves.save(tmp_path, 2, keep=1)

    def full(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_flush", full)
    message = rf"{name} of checkpoint-4 could not be written: it needs \d+ bytes, \d+ are free"
    with pytest.raises(OSError, match=message) as caught:
        _saves.save(tmp_path, 4, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoint.verify(tmp_path / "checkpoint-2") == []


def test_an_error_of_safetensors_is_told_alike(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    # A matrix of 3 x 2 and a vector of 2, in float32.
    with pytest.raises(OSError, match="trained.safetensors of .* needs 32 bytes") as caught:
        _saves.save(tmp_path, 4)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_process_that_may_not_write_more_ends_with_an_error(tmp_path):
    command = [sys.executable, str(HERE / "_train_run.py"), str(tmp_path / "run"), "sft"]
    stopped = subprocess.run([*command, "--full", "6"], capture_output=True, text=True)
    assert stopped.returncode == 1
    assert "trained.safetensors of checkpoint-4 could not be written" in stopped.stderr
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-2", "metrics.jsonl"]
    assert checkpoint.verify(tmp_path / "run/checkpoint-2") == []


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode != 0,
    reason="a file system of its own needs unshare",
)
def test_a_disk_that_fills_up(tmp_path):
    """A file system with room for one checkpoint and half of the next."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size=450k tmpfs "{disk}" && "{sys.executable}" '
        f'"{HERE / "_train_run.py"}" "{disk}/run" sft; code=$?; '
        f'cp -r "{disk}/run" "{tmp_path}/kept"; exit $code'
    )
    stopped = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert stopped.returncode == 1, stopped.stderr
    assert "No space left on device" in stopped.stderr
    assert "of checkpoint-4 could not be written" in stopped.stderr
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "checkpoint-2",
        "metrics.jsonl",
    ]
    assert checkpoint.verify(tmp_path / "kept/checkpoint-2") == []


# -- kill -9 --------------------------------------------------------------------------------------


def result_of(script, *arguments):
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_save_may_die_at_any_of_its_operations(tmp_path):
    """There is always a checkpoint that verifies, and none that does not."""
    _saves.save(tmp_path / "run", 2)
    found = result_of("_save_deaths.py", tmp_path / "run")
    newest = [name for name, _ in found]
    assert newest == sorted(newest) and set(newest) == {"checkpoint-2", "checkpoint-4"}
    assert len(found) > 20 and found[-1] == ["checkpoint-4", ["checkpoint-4"]]
    both = ["checkpoint-2", "checkpoint-4"]
    assert all(there in (both[:1], both, both[1:]) for _, there in found)


def test_twenty_kills_end_bit_equal(tmp_path):
    """SIGKILL at 20 random moments, half of them aimed into a save."""
    told = result_of("_lives.py", tmp_path, 20, 0)
    assert told["kills"] == 20 and told["inside"] >= 3
    for number in range(told["runs"]):
        assert_same_end(tmp_path / f"run-{number}", tmp_path / "whole")
