"""The script behind the tables of docs/mir.md, on small sets."""

import importlib
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")


@pytest.fixture(scope="module")
def script(harness):
    return importlib.import_module("benchmarks.mir_invariance")


def test_every_table_has_its_rows(script, tmp_path, capsys):
    assert script.main(["--quick", "--json", str(tmp_path / "r.json")]) == 0
    rows = json.loads((tmp_path / "r.json").read_text())
    shown = capsys.readouterr().out
    counts = {name: sum(row["table"] == name for row in rows) for name in script.tables(True)}
    assert counts == {"data": 5, "settings": 5, "samples": 2, "moca": 3, "root": 11}
    assert all(f"\n{name}\n" in shown for name in counts)
    for row in rows:
        if row["table"] == "root":
            assert row["eigh"] < 1e-9 and row["newton_schulz, float32"] < 5e-5
        if row["table"] == "data":
            assert row["min"] < row["mean"] < row["max"]
    moca = [row for row in rows if row["table"] == "moca"]
    assert all(row["ce after"] < row["ce before"] for row in moca)
    # The arms that start a projector anew start it alike; u and v begin as the identity.
    assert moca[1]["mir before"] == moca[2]["mir before"]


def test_the_released_iteration_keeps_a_well_conditioned_input(script):
    values = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    x, y = script.pair(values, False)
    a, b = x @ x.mT, y @ y.mT
    assert script.released_fast(a, b) == pytest.approx(float((a @ b).trace()), rel=1e-3)
    assert script.released_accurate(a, b) == pytest.approx(
        float(torch.linalg.svdvals(x.mT @ y).sum()), rel=1e-5
    )
    assert float(x.square().sum()) == pytest.approx(4.0)
    assert float(y.square().sum()) == pytest.approx(1.0)


def test_only_the_tables_asked_for(script, capsys):
    assert script.main(["--quick", "--only", "root"]) == 0
    assert "moca" not in capsys.readouterr().out
