"""Kernels compile for a GPU on a machine without one; `python -m benchmarks.offline` does them all.

It runs in its own process, because here the kernels are interpreted.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

NARROW = """
import triton
import triton.language as tl

@triton.jit
def zero_rows(x_ptr, d, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    tl.store(x_ptr + row * d + cols, 0.0, mask=cols < d)
"""

CHECK = """
import torch
from benchmarks.offline import Variant, faults
from narrow import zero_rows

types = {"x_ptr": "*", "d": "i32"}
variant = Variant(zero_rows, types, {"BLOCK": 128, "num_warps": 1}, 127)
_, wrong = faults(90, variant, torch.float32)
assert len(wrong) == 2 and wrong[0].startswith("32-bit product: %"), wrong
assert wrong[1] == "no row offset in 64 bits", wrong
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(folder), str(ROOT), str(ROOT / "kernels")]
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_kernels_compile_within_their_budgets(tmp_path):
    arguments = "-m benchmarks.offline --arch 90 --dtype bfloat16 --dim 4096"
    done = run(tmp_path, *arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 kernels compiled" in done.stdout and "0 failed" in done.stdout
    for kernel in ("hadamard_reweight_bwd", "label_logits_bwd_weight", "calibrate_bwd"):
        assert kernel in done.stdout


def test_a_32_bit_offset_is_found(tmp_path):
    (tmp_path / "narrow.py").write_text(NARROW)
    done = run(tmp_path, "-c", CHECK)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled, not interpreted")
def test_refuses_to_run_interpreted(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("offline", ROOT / "benchmarks/offline.py")
    offline = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "offline", offline)
    spec.loader.exec_module(offline)
    with pytest.raises(SystemExit) as exit:
        offline.main([])
    assert exit.value.code == 2 and "unset TRITON_INTERPRET" in capsys.readouterr().err
