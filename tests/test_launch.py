"""The command lines of torchrun and accelerate: one file of settings, two engines, one run."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fastalign.demo.base import build_model, save_base

# As docs/training.md has it.
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: "no"
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: true
"""


@pytest.fixture
def folder(tmp_path):
    save_base(build_model(0), tmp_path / "tiny")
    records = []
    for i, caption in enumerate(["two red cups", "a blue fish", "three keys", "a green hat"]):
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / f"{i}.png")
        records.append({"image": f"{i}.png", "caption": caption})
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    settings = {
        "model": str(tmp_path / "tiny"),
        "data": str(tmp_path / "data.json"),
        "objective": "sft",
        "adapter": {"shift_layers": [1], "shift_hidden_dim": 8},
        "max_steps": 2,
        "batch_size": 2,
        "learning_rate": 0.001,
        "log_every": 1,
        "save_every": 0,
        "progress": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_torchrun_and_accelerate_launch_take_the_command_line(folder):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch = ["accelerate.commands.accelerate_cli", "launch"]
    launch += ["--config_file", str(folder / "fsdp.yaml")]
    histories, weights = [], []
    for name, command in (("ddp", torchrun), ("fsdp", launch)):
        options = ["--config", str(folder / "c.yaml"), "--output-dir", str(folder / name)]
        options += ["--json", str(folder / f"{name}.json")]
        done = subprocess.run(
            [sys.executable, "-m", *command, "-m", "fastalign.train", *options],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("result in") == 1
        histories.append(json.loads((folder / f"{name}.json").read_text())["history"])
        weights.append(load_file(folder / name / "adapter/adapter_model.safetensors"))
    for a, b in zip(*histories, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert weights[0].keys() == weights[1].keys()
    moved = weights[0]["shifts.1.conv2.weight"]
    assert moved.abs().max() > 0
    torch.testing.assert_close(weights[1]["shifts.1.conv2.weight"], moved, rtol=0, atol=1e-4)
