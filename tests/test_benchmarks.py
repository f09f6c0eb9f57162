"""The benchmark harness runs, and writes the rows that it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_quick_run_writes_its_rows(tmp_path):
    file = tmp_path / "results/rows.json"
    done = run("--quick", "--op", "calibrate", "--json", str(file))
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {row["impl"] for row in rows} == {"fastalign", "eager", "bound"}
    for row in rows:
        assert list(row) == [
            *("op", "case", "impl", "device"),
            *("median_us", "p10_us", "p90_us", "peak_mib", "bound_us", "max_error"),
        ]
        assert row["op"] == "calibrate" and row["case"] in done.stdout
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        if row["impl"] == "bound":
            assert row["max_error"] is None and row["median_us"] == row["bound_us"]
        else:
            # bfloat16 has 8 bits, so rounding costs up to 2^-8; the peak holds at least y and dx.
            assert 0 < row["max_error"] <= 2**-8 * 1.01
            assert row["peak_mib"] >= 2 * 2 * 288 * 1024 * 2 / 2**20


@pytest.mark.parametrize("arguments", [("--op", "unknown")])
def test_unknown_op_names_the_known_ones(arguments):
    done = run(*arguments)
    assert done.returncode == 2 and "hadamard_reweight" in done.stderr
