"""The soak finds what it looks for: a run keeps its rules, one that leaks breaks them."""

import dataclasses
import importlib
import json

import pytest
import torch

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def soak(harness):
    return importlib.import_module("benchmarks.soak")


@pytest.fixture(scope="module")
def case(soak):
    """MoCa's vectors alone are trained, which is the cheapest arm of the demo."""
    return soak.Soak("moca", steps=60, every=10, warm_up=20, scenes=16, batch_size=1, log_every=5)


@pytest.fixture(scope="module")
def runs(soak, case, tmp_path_factory):
    """Of one seed; the last one traced."""
    folder = tmp_path_factory.mktemp("soak")
    threads = torch.get_num_threads()
    found = [soak.live(case, folder / str(i), traced=i == 2) for i in range(3)]
    torch.set_num_threads(threads)
    return found


def names(broken):
    """Of the rules; a test's machine is not idle, so not that of the throughput."""
    return {text.split(" ")[0].rstrip(":") for text in broken} - {"throughput"}


def test_three_runs_keep_every_rule(soak, case, runs, tmp_path, capsys):
    found, broken = soak.judged(case, runs)
    assert names(broken) == set(), broken
    assert [len(run["seconds"]) for run in runs] == [59] * 3
    assert [x.step for x in runs[0]["looks"]] == list(range(10, 60, 10))
    assert found["heap"][0] < 100_000 and 0 < found["log_bytes"][0] < 50_000
    assert len(runs[0]["sha256"]) == 3 and len(runs[0]["lines"]) == 12
    soak.finish(case, runs, tmp_path / "rows.json", save=False)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["impl"] for row in rows] == ["run 1", "run 2", "run 3"]
    assert rows[0]["memory"] == found["memory"][0] and rows[2]["heap"] == found["heap"][0]
    assert "KB from the warm-up to the end" in capsys.readouterr().out


def test_what_is_kept_breaks_the_rules(soak, case, runs, tmp_path):
    kept = []

    def make(batch):
        kept.append((torch.ones(25_000), [[None] for _ in range(1000)]))  # a tensor of 100 KB
        return batch

    leaking = soak.live(case, tmp_path / "leak", True, make)
    assert leaking["sha256"] == runs[0]["sha256"]
    found, broken = soak.judged(case, [leaking, runs[1], leaking])
    assert names(broken) == {"memory", "heap", "tensors", "tensor_bytes", "objects"}
    # Medians of two looks, which are 20 steps apart.
    assert found["tensors"][0] == 20 and found["tensor_bytes"][0] == pytest.approx(2e6, rel=0.01)
    assert found["memory"][0] > 2e6 + found["heap"][0] * 0.9
    assert found["objects"][0] == pytest.approx(20 * 1002, abs=50)
    assert found["heap"][0] > 20 * 1000 * 60


def test_an_exit_status_tells_a_broken_rule(soak, case, runs, capsys):
    steady = [{**run, "seconds": [0.1] * 59} for run in runs]
    assert soak.finish(case, steady, None, save=False) == 0
    assert "every rule holds" in capsys.readouterr().out
    slower = [{**run, "seconds": [0.1] * 40 + [0.12] * 19} for run in runs]
    lines = [dict(line) for line in runs[0]["lines"]]
    lines[-1]["loss"] += 1e-9
    for broken, rule in (
        (slower, "BROKEN: throughput: steps take 1.200 times"),
        ([steady[0], {**steady[1], "sha256": {}}, steady[2]], "sha256 of runs of one seed differ"),
        ([steady[0], {**steady[1], "lines": lines}, steady[2]], "lines of runs of one seed differ"),
        ([steady[0], {**steady[1], "looks": grown(runs[1]["looks"])}, steady[2]], "memory grew by"),
    ):
        assert soak.finish(case, broken, None, save=False) == 1
        assert rule in capsys.readouterr().out


def grown(looks):
    """By a tenth of a megabyte a step."""
    return [x._replace(rss=x.rss + 100_000 * x.step) for x in looks]


def test_rates_are_of_medians(soak, case):
    assert soak.slowdown([1.0] * 10 + [9.0] * 20 + [2.0] * 10) == 2.0
    # Step times that grow from 1 by 0.001 a step: 1 s in 1,000 steps, of a median of 1.1 s.
    assert soak.slope([1 + 0.001 * i for i in range(201)]) == pytest.approx(1 / 1.1, rel=0.01)
    pause = [1.0] * 50 + [100.0] + [1.0] * 50
    assert soak.slope(pause) == pytest.approx(0.0)
    looks = [soak.Look(step, step * step, 0, 0, 0, 0) for step in range(10, 110, 10)]
    # The looks from 30 on are eight: medians of (30, 40, 50, 60) and (70, 80, 90, 100), squared.
    late = dataclasses.replace(case, warm_up=30)
    assert soak.drift(late, looks, "rss") == (80**2 + 90**2 - 40**2 - 50**2) / 2
