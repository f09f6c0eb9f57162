"""The same settings on accelerate's engines: DDP and FSDP2 train as one process does."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from _compared import equal_lines
from _versions import INSTALLED, whole_graph_needed
from packaging.version import Version
from safetensors.torch import load_file

import fastalign as fa
from fastalign import checkpoint
from fastalign.testing.families import family, family_batch

RUN = Path(__file__).with_name("_engine_run.py")
spec = importlib.util.spec_from_file_location("_engine_run", RUN)
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

RUNS = run.TWO | run.FOUR
EXACT = [name for name, (equal, _, _) in RUNS.items() if equal not in ("all", "bf16")]
WEIGHTS, MOMENTS = "checkpoint-2/trained.safetensors", "checkpoint-2/optimizer.safetensors"
RESULT = "adapter/adapter_model.safetensors"
# Keys' biases have no gradient but rounding, which AdamW makes a step of.
NOISE = "k_proj.bias"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, of one, two and four processes."""
    if Version("5.23") > INSTALLED:
        pytest.skip("gradient_checkpointing with FSDP2 needs transformers >= 5.23")
    folder = tmp_path_factory.mktemp("engines")
    command = [sys.executable, "-W", "ignore", str(RUN), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def equal_files(actual, expected, file):
    """Names, shapes and types, and values to 1e-6 of each tensor's largest."""
    actual, expected = load_file(actual / file), load_file(expected / file)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape
        if not name.endswith(NOISE):
            distance = (actual[name].double() - tensor.double()).abs().max()
            assert distance <= 1e-6 * tensor.double().abs().max(), name


@pytest.mark.parametrize("name", EXACT, ids=lambda n: " ".join([RUNS[n][0], n, *RUNS[n][1]]))
def test_ranks_train_as_one_process(runs, name):
    """Logged terms, weights, moments, DeepAlign's state and the result, in whole files."""
    other, one = runs / name, runs / RUNS[name][0]
    equal_lines(other, one, 1e-6)
    for file in (WEIGHTS, MOMENTS, RESULT):
        equal_files(other, one, file)
    assert checkpoint.verify(other / "checkpoint-2") == []


@pytest.mark.parametrize("name", ["g", "h"], ids=["loaded by all", "loaded by the first rank"])
def test_a_whole_model_is_trained_and_written_whole(runs, name):
    from transformers import AutoModelForImageTextToText

    other, one = runs / name, runs / "all"
    equal_lines(other, one, 1e-6)
    equal_files(other, one, WEIGHTS)
    equal_files(other, one, "model/model.safetensors")  # tied weights stand once in both
    loaded = AutoModelForImageTextToText.from_pretrained(other / "model")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_masters_are_float32_over_a_sharded_base_in_bfloat16(runs):
    equal_lines(runs / "i", runs / "bf16", 0.05)
    weights, moments = (load_file(runs / "i" / file) for file in (WEIGHTS, MOMENTS))
    assert {t.dtype for t in [*weights.values(), *moments.values()]} == {torch.float32}


def test_one_process_reads_what_ranks_have_sharded(runs, tmp_path):
    """A checkpoint of FSDP2 into a plain model; a run of one process refuses another's division."""
    model = run.tiny_llava(dtype=torch.float64)
    fa.attach(model, run.ADAPTER).double()
    model.requires_grad_(False)
    model.fastalign_adapter.requires_grad_(True)
    tensors = checkpoint.trained_tensors(model, None)
    from fastalign._run.prepare import parameter_groups

    groups = parameter_groups(list(tensors.values()), fa.TrainConfig())
    optimizer = torch.optim.AdamW(groups)
    checkpoint.load(runs / "e" / "checkpoint-2", tensors, optimizer)
    stored = load_file(runs / "e" / WEIGHTS)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2}
    with pytest.raises(ValueError, match="batch_size: 2 then, 4 now"):
        run.run(runs / "e", 1, objective="cal")


# -- one process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sft", "cal", "deepalign"])
def test_layers_that_run_again_change_no_bit(tmp_path, objective):
    """With dropout, and of a frozen base: what no gradient needs does not run again."""
    calls = []
    for again in (False, True):
        model = dropping()
        counted = {"tower": model.model.vision_tower.encoder.layers[0]}
        counted["decoder"] = model.model.language_model.layers[1]
        seen = dict.fromkeys(counted, 0)
        for name, layer in counted.items():
            layer.mlp.register_forward_pre_hook(
                lambda *_, name=name, seen=seen: seen.update({name: seen[name] + 1})
            )
        config = settings(tmp_path / str(again), objective, gradient_checkpointing=again)
        fa.train(config, model=model, dataset=range(24), collate=collate)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        calls.append(seen)
    weights = [load_file(tmp_path / name / RESULT) for name in ("False", "True")]
    assert all(torch.equal(weights[1][k], weights[0][k]) for k in weights[0])
    assert calls[1]["decoder"] == calls[0]["decoder"] + 4  # two steps of two micro-batches
    assert calls[1]["tower"] == calls[0]["tower"]  # below the first adapter


def dropping():
    model = run.tiny_llava(head_scale=2.0)
    model.config.text_config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    return model


def collate(indices):
    return run._samples.collate(["ttityyy", "titytyy"], indices)


def settings(folder, objective, *, layer=2, **changes):
    return fa.TrainConfig(
        output_dir=str(folder),
        objective=objective,
        deepalign=run.DEEPALIGN,
        adapter=fa.AdapterConfig(shift_layers=(layer,), calibration=True),
        max_steps=2,
        batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        log_every=1,
        save_every=0,
        progress=False,
        **changes,
    )


def test_a_model_without_such_layers_is_named():
    from fastalign._run.engines import set_checkpointing

    with pytest.raises(ValueError, match="gradient_checkpointing needs .*: Linear has none"):
        set_checkpointing(torch.nn.Linear(1, 1), True)


@whole_graph_needed
def test_a_compiled_run_equals_an_eager_one(tmp_path):
    hooks = []
    for name, changes in {
        "eager": {},
        "graph": {"torch_compile": True, "torch_compile_backend": "eager"},
    }.items():
        config = settings(tmp_path / name, "sft", **changes)
        model = run.tiny_llava(head_scale=2.0)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "torch_compile")
            fa.train(config, model=model, dataset=range(24), collate=collate)
        hooks.append(sum(len(m._forward_hooks) for m in model.modules()))
    assert hooks[0] == hooks[1]
    equal_lines(tmp_path / "graph", tmp_path / "eager", 1e-5)
    graph, eager = (load_file(tmp_path / name / RESULT) for name in ("graph", "eager"))
    torch.testing.assert_close(graph, eager, rtol=1e-5, atol=1e-6)


def test_what_is_no_whole_graph_runs_without_compiling(tmp_path):
    model = family("llava_next")
    batch = family_batch("llava_next", model, ["tiyy", "tyyy"])
    config = settings(tmp_path, "sft", layer=1, torch_compile=True, torch_compile_backend="eager")
    with pytest.warns(UserWarning, match="LlavaNext.* runs without it .* no whole graph") as found:
        result = fa.train(config, model=model, dataset=range(24), collate=lambda _: dict(batch))
    assert len(result.history) == 2
    assert sum("torch_compile" in str(warning.message) for warning in found) == 1


def test_cal_is_not_compiled():
    with pytest.raises(ValueError, match='torch_compile goes with objective "sft" or "deepalign"'):
        fa.TrainConfig(objective="cal", torch_compile=True)


# -- engines that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "ZeRO must be 2: got 3, which gathers weights .* --use_fsdp --fsdp_version 2",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "got fp16 with bf16=False; set bf16: true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "got bf16 with bf16=False; set bf16: true"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "dynamo_backend .* set torch_compile: true"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}, "launcher must be .*: got 3 and 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_launches_that_cannot_be_are_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, environment, message
):
    from accelerate.state import AcceleratorState

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = settings(tmp_path / "run", "sft")
    with pytest.raises(ValueError, match=message):
        fa.train(config, dataset=range(4), collate=collate)  # there is no model to load
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version must be 2: got 1.*--fsdp_version 2"),
        ({"activation_checkpointing": True}, "must be false.*gradient_checkpointing: true"),
        ({"auto_wrap_policy": "NO_WRAP"}, "fsdp_auto_wrap_policy must be TRANSFORMER_BASED_WRAP"),
        ({"cpu_offload": True}, "fsdp_offload_params must be false"),
        ({"ignored_modules": ".*adapter"}, "fsdp_ignored_modules must be left out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_ways_to_shard_that_cannot_be_are_refused(tmp_path, changes, message):
    from accelerate.utils import FullyShardedDataParallelPlugin

    from fastalign._run.engines import _check_sharding

    given = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    plugin = FullyShardedDataParallelPlugin(**(given | changes))
    with pytest.raises(ValueError, match=message):
        _check_sharding(plugin, settings(tmp_path, "sft"))


def test_layers_whose_hooks_run_again_are_refused_with_fsdp2(tmp_path, monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin

    from fastalign._run import engines

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
    )
    config = settings(tmp_path, "sft", gradient_checkpointing=True)
    monkeypatch.setattr(engines, "_layers_run_hooks_again", lambda: False)
    engines._check_sharding(plugin, config)
    monkeypatch.setattr(engines, "_layers_run_hooks_again", lambda: True)
    with pytest.raises(ValueError, match="FSDP2 needs transformers >= 5.23"):
        engines._check_sharding(plugin, config)


def test_a_compiled_step_is_not_sharded(tmp_path):
    from accelerate.utils import FullyShardedDataParallelPlugin

    from fastalign._run.engines import _check_sharding

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP"
    )
    with pytest.raises(ValueError, match="torch_compile must be False with FSDP2"):
        _check_sharding(plugin, settings(tmp_path, "sft", torch_compile=True))
