"""DeepSpeed's ZeRO-2: two gloo ranks train as one process does.

Run as a script, this file makes all runs: test_deepspeed.py FOLDER.
"""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _compared import equal_lines
from safetensors.torch import load_file

import fastalign as fa
from fastalign import checkpoint
from fastalign._run import zero, zero_launch
from fastalign.adapters import adapter_of
from fastalign.testing.models import tiny_llava

RUN = Path(__file__).with_name("_engine_run.py")
spec = importlib.util.spec_from_file_location("_engine_run", RUN)
engines = importlib.util.module_from_spec(spec)
sys.path.insert(0, str(RUN.parent))
spec.loader.exec_module(engines)

LAUNCH = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "DS_ACCELERATOR": "cpu",
}
# Rows 11 and 12 are of the second step.
FAULT = {"on_nonfinite": "skip", "bad": (11,), "save_every": 1, "keep_checkpoints": 3}
ONE = {
    "sft": {"objective": "sft"},
    "cal": {"objective": "cal"},
    "deepalign": {"objective": "deepalign"},
    "clipped": {"objective": "sft", "max_grad_norm": 0.1, "learning_rate": 1e-3},
    "compiled": {"objective": "sft", "torch_compile": True, "torch_compile_backend": "eager"},
    "all": {"objective": "cal", "trainable": "all", "tied": True, "learning_rate": 1e-3},
    "bf16": {"objective": "sft", "bf16": True, "dtype": torch.bfloat16},
    "fault": {"objective": "cal", **FAULT},
    "first fault": {"objective": "sft", **FAULT, "bad": (3,)},
}
# The run of one process that one of two ranks is to equal, and the engines that it is on in turn.
TWO = {
    "sft, zero": ("sft", ["zero"]),
    "cal, zero": ("cal", ["zero"]),
    "deepalign, zero": ("deepalign", ["zero"]),
    "clipped, zero": ("clipped", ["zero"]),
    "compiled, zero": ("compiled", ["zero"]),
    "all, zero": ("all", ["zero"]),
    "bf16, zero": ("bf16", ["zero"]),
    "bf16, ddp": ("bf16", ["ddp"]),
    "fault, zero": ("fault", ["zero"]),
    "first fault, zero": ("first fault", ["zero"]),
    "sft, zero zero": ("sft", ["zero", "zero"]),
    "deepalign, zero ddp": ("deepalign", ["zero", "ddp"]),
    "cal, ddp zero": ("cal", ["ddp", "zero"]),
}
EXACT = [name for name, (equal, _) in TWO.items() if equal not in ("all", "bf16")]
WEIGHTS, MOMENTS = "checkpoint-2/trained.safetensors", "checkpoint-2/optimizer.safetensors"
RESULT = "adapter/adapter_model.safetensors"
NOISE = "k_proj.bias"  # which has no gradient but rounding


def run(folder, ranks, *, dtype=torch.float32, tied=False, bad=(), **changes):
    """Three steps of eight samples; a sample of `bad` has a picture that is not finite."""
    batches = 0

    def collate(indices):
        nonlocal batches
        batches += 1
        batch = engines._samples.collate(engines.SAMPLES, [abs(i) for i in indices])
        if set(indices) & set(bad) and "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"] * float("nan")
        return batch

    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "batch_size": 4 // ranks,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": ranks > 1 and "torch_compile" not in changes,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "log_every": 1,
        "save_every": 2,
        "adapter": engines.ADAPTER,
        "deepalign": engines.DEEPALIGN,
        "progress": False,
    }
    model = tiny_llava(head_scale=2.0, dtype=dtype, tied=tied)
    config = fa.TrainConfig(**(settings | changes))
    result = fa.train(config, model=model, dataset=range(24), collate=collate)
    if config.needs_adapter:
        given = {p.dtype for p in adapter_of(result.model).parameters()}
        # The rank that has written the result gives its adapter the dtype of the base.
        assert given == {
            dtype if ranks == 1 or torch.distributed.get_rank() == 0 else torch.float32
        }
    return batches


def rank(folder, number, ranks, runs):
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        meet = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", meet, rank=number, world_size=ranks)
    for name, (equal, used) in runs.items():
        taken = []
        for engine in used:
            for key in LAUNCH:
                os.environ.pop(key, None)
            engines.on(LAUNCH if engine == "zero" else {})
            taken.append(run(folder / name, ranks, **ONE[equal]))
        # The second engine goes on from the checkpoint of the second step.
        assert all(count < taken[0] for count in taken[1:]), "it started anew"
    if ranks > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, of one and of two processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    command = [sys.executable, "-W", "ignore", __file__, str(folder)]
    # The first time DeepSpeed compiles how processes of a CPU exchange.
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def equal_files(actual, expected, file, tolerance=1e-5):
    """Names, shapes, types, and values to `tolerance` of each tensor's largest, weights to 1e-6.

    AdamW's first steps are as large for a small gradient as for a large one, and with it what both
    are rounded by: DDP in float32 differs from one process by as much.
    """
    actual, expected = load_file(actual / file), load_file(expected / file)
    assert actual.keys() == expected.keys()
    least = 0.0 if file == MOMENTS else 1e-6
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        if not name.endswith(NOISE):
            distance = (actual[name].double() - tensor.double()).abs().max()
            assert distance <= tolerance * tensor.double().abs().max() + least, name


@pytest.mark.parametrize("name", EXACT)
def test_ranks_train_as_one_process(runs, name):
    """Logged terms, weights, moments, DeepAlign's state and the result, in whole files."""
    other, one = runs / name, runs / TWO[name][0]
    equal_lines(other, one, 1e-5)
    for file in (WEIGHTS, RESULT):
        equal_files(other, one, file)
    equal_files(other, one, MOMENTS, 5e-5)
    assert checkpoint.verify(other / "checkpoint-2") == []


def test_a_whole_model_is_trained_and_written_whole(runs):
    """The tower's last layer has no part in any step: it is neither moved nor decayed."""
    other, one = runs / "all, zero", runs / "all"
    equal_lines(other, one, 1e-5)
    for file in (WEIGHTS, "model/model.safetensors"):
        equal_files(other, one, file)
    moments = [load_file(folder / MOMENTS).keys() for folder in (other, one)]
    assert moments[0] == moments[1]
    start = dict(tiny_llava(head_scale=2.0, tied=True).named_parameters())
    name = "model.vision_tower.encoder.layers.3.mlp.fc1.weight"
    assert torch.equal(load_file(other / WEIGHTS)["model." + name], start[name])


def test_masters_are_float32_over_a_base_in_bfloat16(runs):
    """Two ranks round otherwise than one process, but DeepSpeed as DDP."""
    other, ddp = runs / "bf16, zero", runs / "bf16, ddp"
    equal_lines(other, ddp, 1e-5)
    for file in (WEIGHTS, MOMENTS, RESULT):
        equal_files(other, ddp, file)
    tensors = [*load_file(other / WEIGHTS).values(), *load_file(other / MOMENTS).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("name", ["fault, zero", "first fault, zero"])
def test_a_step_that_is_not_finite_is_left_out(runs, name):
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").open()]
    skipped = [line["skipped_steps"] for line in lines]
    number = 0 if name.startswith("first") else 1
    assert skipped == [float(i == number) for i in range(3)]
    if number:  # weights and moments stay as they were
        for file in ("trained.safetensors", "optimizer.safetensors"):
            before, after = (load_file(runs / name / f"checkpoint-{n}" / file) for n in (1, 2))
            assert all(torch.equal(after[key], before[key]) for key in before)


# -- without DeepSpeed ----------------------------------------------------------------------------


def test_what_is_handed_over_are_the_gradients():
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2,), (3, 1))]
    handover = zero.Handover(torch.nn.Identity(), parameters)
    for _ in range(2):
        handover([torch.tensor([1.0, 2.0]), torch.full((3, 1), 4.0)]).backward()
    assert parameters[0].grad.tolist() == [2.0, 4.0]
    assert parameters[1].grad.tolist() == [[8.0], [8.0], [8.0]]


def plugin(**changes):
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    return SimpleNamespace(deepspeed_config=given | changes)


def test_the_loop_clips_and_accumulates():
    config = fa.TrainConfig(batch_size=3, gradient_accumulation_steps=4, max_grad_norm=0.5)
    asked = plugin(gradient_clipping=0.5, gradient_accumulation_steps=4, bf16={"enabled": False})
    zero_launch.configure(asked, config)
    found = asked.deepspeed_config
    assert (found["gradient_clipping"], found["gradient_accumulation_steps"]) == (0.0, 1)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 1}}, "ZeRO must be 2: got 1; .*--use_fsdp"),
        ({"zero_optimization": {"stage": 3}}, "got 3, which gathers weights .*--use_fsdp"),
        ({"optimizer": {"type": "Adam"}}, r"got \['optimizer'\]; leave them out"),
        (
            {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
            r"got \['zero_optimization.zero_quantized_gradients'\]",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer must be left out.*--use_fsdp",
        ),
        ({"bf16": {"enabled": True}}, "bf16 of DeepSpeed must not .* set bf16: true"),
        ({"fp16": {"enabled": True}}, "fp16 of DeepSpeed must not"),
        ({"gradient_clipping": 2.0}, "gradient_clipping .*: got 2.0 and 1.0"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps .*: got 5 and 1"),
        ({"train_micro_batch_size_per_gpu": 1}, "micro_batch_size_per_gpu .*: got 1 and 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_run_cannot_be_on_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        zero_launch.configure(plugin(**changes), fa.TrainConfig())


def test_weights_that_would_be_rounded_are_refused():
    zero_launch.check_dtypes([torch.zeros(1)])
    with pytest.raises(ValueError, match=r"must be float32 .*: got \['torch.float64'\]"):
        zero_launch.check_dtypes([torch.zeros(1), torch.zeros(1, dtype=torch.float64)])


@pytest.mark.parametrize("found", ["0.18.9", "none"])
def test_a_missing_or_old_deepspeed_is_named(monkeypatch, found):
    import importlib.metadata

    def version(name):
        if found == "none":
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=f"deepspeed>=0.19: got {found}; pip install deepspeed"):
        zero_launch.check_installed()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rank(place, 0, 1, {name: (name, ["one"]) for name in ONE})
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(place, n, 2, TWO)) for n in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    sys.exit(any(process.exitcode for process in ranks))
