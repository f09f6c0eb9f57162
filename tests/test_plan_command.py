"""Plans of whole runs: memory, time, what is refused, and `fastalign plan`."""

import dataclasses
import importlib
import json
import typing

import pytest
from _planned import (
    ADAPTER,
    ONE_LAYER,
    config_of,
    internvl_8b,
    llava_7b,
    prepared,
    qwen_7b,
)

import fastalign as fa
from fastalign import cli
from fastalign.commands.plan import PlanOptions
from fastalign.objectives import DeepAlignConfig
from fastalign.planning import DEVICES, PlanConfig, make_plan
from fastalign.planning._sizes import measure
from fastalign.testing.families import family

# -- memory, time --------------------------------------------------------------------------------


# The sizes that their model cards name, in parameters, and the image tokens of their papers.
@pytest.mark.parametrize(
    ("config", "billions", "options", "image_tokens"),
    [
        (llava_7b, 7.06, {}, 576),
        (qwen_7b, 8.29, {"image_size": (448, 672)}, 16 * 24),
        (internvl_8b, 7.94, {"tiles": 7}, 7 * 256),
    ],
    ids=["llava", "qwen2_5_vl", "internvl"],
)
def test_published_models(config, billions, options, image_tokens):
    plan = make_plan(config(), PlanConfig(objective="sft", **options))
    parts = {k: v for k, v in plan.parameters.items() if k != "adapter"}
    assert sum(parts.values()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert plan.tokens["image"] == image_tokens
    # 2 N t of the decoder's matrices, less all but the labels' rows of the last layer, plus 3 % or
    # so of attention.
    length = image_tokens + 170
    decoder = 2 * (parts["decoder"] - parts["head"]) * length
    assert plan.flops["decoder forward"] == pytest.approx(decoder, rel=0.06)


def test_the_papers_run():
    options = PlanConfig(gpus=2, gpu="a100-80")
    plan = make_plan(llava_7b(), options)
    assert plan.parameters["adapter"] == 200_553_088
    assert plan.parameters["teacher"] == pytest.approx(304.4e6, rel=1e-3)
    assert plan.fits and plan.largest_batch >= 8 and plan.bound_by == "compute"
    # 1e6 samples over two GPUs of 312 TFLOP/s in 48 h; the same by hand.
    implied = plan.flops_per_sample * 1e6 / (2 * 312e12 * 48 * 3600)
    assert plan.utilisation_for(48) == pytest.approx(implied)
    assert plan.hours == pytest.approx(48 * implied / 0.4)
    again = dataclasses.replace(options, utilisation=plan.utilisation_for(18))
    assert make_plan(llava_7b(), again).hours == pytest.approx(18)


def test_seconds_by_hand():
    options = PlanConfig(
        objective="sft", trainable="all", engine="fsdp2", gpus=4, gpu="h100", accumulation=2
    )
    plan = make_plan(llava_7b(), options)
    n, unread = sum(plan.parameters.values()), sum(plan.parameters.values()) - plan.trained
    # Layer 24 of the tower: 12 d^2 + 13 d with biases and norms; and the norm of its class token.
    assert unread == 12 * 1024**2 + 13 * 1024 + 2 * 1024
    compute = 2 * 8 * plan.flops_per_sample / (989e12 * 0.4)
    # Two micro-batches, each with two passes over bfloat16 weights; then AdamW on a quarter.
    memory = (2 * 2 * 2 * n + 28 * plan.trained / 4) / 3350e9
    interconnect = 2 * (2 * 2 * n + 4 * plan.trained) * 3 / 4 / 450e9
    expected = {"compute": compute, "memory": memory, "interconnect": interconnect}
    assert plan.seconds == pytest.approx(expected)
    assert plan.step_seconds == max(plan.seconds.values())
    assert plan.samples_per_second == pytest.approx(64 / plan.step_seconds)
    slow = make_plan(llava_7b(), dataclasses.replace(options, interconnect=1.0))
    assert slow.bound_by == "interconnect"
    assert slow.seconds["interconnect"] == pytest.approx(450 * interconnect)


def test_memory_shrinks_where_it_should():
    options = PlanConfig(objective="sft", trainable="all", gpus=8, gpu="h100")
    ddp = make_plan(llava_7b(), options)
    # 12 bytes a parameter and a copy of its gradient: no GPU of 80 GB.
    assert not ddp.fits and ddp.largest_batch == 0
    sharded = make_plan(llava_7b(), dataclasses.replace(options, engine="fsdp2"))
    for kind in ("weights", "gradients", "optimizer moments"):
        assert sharded.memory[kind] == -(-ddp.memory[kind] // 8)
    assert sharded.largest_batch > 0
    # A layer of Vicuna-7B; its embedding, last norm and head.
    layer, rest = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 2 * 32064 * 4096 + 4096
    assert sharded.memory["gathered weights"] == 2 * (2 * layer + rest)
    assert sharded.memory["unreduced gradients"] == 2 * (layer + rest)
    light = dataclasses.replace(options, engine="fsdp2", checkpointing=True)
    checkpointed = make_plan(llava_7b(), light)
    assert checkpointed.memory["activations"] < sharded.memory["activations"] / 4
    assert checkpointed.largest_batch > 4 * sharded.largest_batch
    assert sharded.memory["logits and their gradients"] < sharded.unfused_logits / 3
    at = dataclasses.replace(light, batch_size=checkpointed.largest_batch)
    assert make_plan(llava_7b(), at).fits
    above = dataclasses.replace(at, batch_size=checkpointed.largest_batch + 1)
    assert not make_plan(llava_7b(), above).fits


def test_a_cached_teacher_takes_neither_time_nor_memory():
    options = PlanConfig(samples=1000)
    live = make_plan(llava_7b(), options)
    cached = make_plan(llava_7b(), dataclasses.replace(options, teacher_cached=True))
    assert live.flops["teacher"] > 0 and cached.flops["teacher"] == 0
    assert live.memory["teacher"] == 4 * 304_368_640 and cached.memory["teacher"] == 0
    # DINOv2 at 518 pixels: 37 x 37 patches of 1,024 numbers in float32.
    assert cached.cache_bytes == live.cache_bytes == 1000 * 37**2 * 1024 * 4
    assert sum(cached.seconds.values()) < sum(live.seconds.values())


def test_only_what_is_trained_goes_backward():
    calibration = fa.AdapterConfig(shift_layers=(), calibration=True)
    config = config_of("llava")
    plans = {
        name: make_plan(config, PlanConfig(objective="sft", adapter=adapter))
        for name, adapter in (("calibration", calibration), ("shift", ADAPTER))
    }
    to = {name: plan.flops["backward to activations"] for name, plan in plans.items()}
    assert to["calibration"] < to["shift"]
    assert plans["calibration"].flops["backward to weights"] == 0  # it multiplies no matrix


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"objective": "dpo"}, "objective must be one of"),
        ({"gpu": "h20"}, "gpu must be one of"),
        ({"gpus": 0}, "gpus must be at least 1: got 0"),
        ({"utilisation": 1.1}, r"utilisation must lie in \(0, 1\]: got 1.1"),
        ({"headroom": 1.0}, r"headroom must lie in \[0, 1\): got 1.0"),
        ({"interconnect": 0.0}, "interconnect must be above 0 GB/s: got 0.0"),
        ({"image_tokens": -1}, "image_tokens must be at least 0: got -1"),
        ({"label_tokens": 200}, r"label_tokens must lie in 0..text_tokens = 170: got 200"),
        ({"prefix_tokens": 100}, "must together be at most text_tokens = 170: got 104 and 100"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        PlanConfig(**options)


def test_what_cannot_be_planned_is_named():
    tiny = {"adapter": ADAPTER, "teacher": "dinov2-small"}
    with pytest.raises(ValueError, match="image_size must be None for llava"):
        make_plan(config_of("llava"), PlanConfig(image_size=(56, 56), **tiny))
    with pytest.raises(ValueError, match="image_tokens must be given for llava_next"):
        make_plan(family("llava_next").config, PlanConfig(**tiny))
    with pytest.raises(TypeError, match="tower cannot be planned: got pixtral"):
        make_plan(family("mistral3").config, PlanConfig(**tiny))
    with pytest.raises(ValueError, match="must be of attention and dense MLPs"):
        make_plan(family("qwen3_5").config, PlanConfig(**tiny))
    with pytest.raises(ValueError, match=r"deepalign.layers must lie in 1..4: got 9"):
        settings = DeepAlignConfig(layers=(9,))
        make_plan(config_of("llava"), PlanConfig(deepalign=settings, **tiny))
    with pytest.raises(FileNotFoundError, match="teacher must be one of dinov2-small"):
        make_plan(config_of("llava"), PlanConfig(adapter=ADAPTER, teacher="dinov1"))
    with pytest.raises(ValueError, match="multiple of the teacher's patch size 14: got 500"):
        make_plan(config_of("llava"), PlanConfig(adapter=ADAPTER, teacher_image_size=500))
    with pytest.raises(ValueError, match="hours must be above 0: got 0"):
        make_plan(config_of("llava"), PlanConfig(**tiny)).utilisation_for(0)


# -- the command ---------------------------------------------------------------------------------


def test_the_command_plans_the_papers_run(tmp_path, capsys):
    llava_7b().save_pretrained(tmp_path)
    argv = ["plan", "--model", str(tmp_path), "--gpus", "2", "--gpu", "a100-80"]
    assert cli.main([*argv, "--json", str(tmp_path / "plan.json")]) == 0
    shown = capsys.readouterr().out
    plan = make_plan(llava_7b(), PlanConfig(gpus=2, gpu="a100-80"))
    assert f"1,000,000 samples: {plan.hours:.1f} h" in shown
    assert f"at most 18 h: no; from a utilisation of {plan.utilisation_for(18):.2f} on" in shown
    assert f"a utilisation of {plan.utilisation_for(48):.2f} of this plan's FLOPs" in shown
    assert "assumed: utilisation 0.40 of 312 TFLOP/s a GPU" in shown
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["parameters"] == plan.parameters and data["flops"] == plan.flops
    assert data["hours"] == pytest.approx(plan.hours)
    assert data["options"]["utilisation"] == 0.4 and data["device"]["tflops"] == 312
    assert cli.main([*argv, "--utilisation", "0.7"]) == 0
    assert "at most 18 h: yes" in capsys.readouterr().out
    assert cli.main([*argv, "--gpus", "1", "--samples", "100000000"]) == 0
    assert "at most 18 h: at no utilisation" in capsys.readouterr().out


def test_the_command_takes_a_saved_adapter(tmp_path, capsys):
    config = config_of("llava")
    config.save_pretrained(tmp_path / "model")
    model = prepared(config, everything=False, adapter=True)
    fa.save_adapter(model, tmp_path / "adapter")
    argv = ["plan", "--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
    assert cli.main([*argv, "--json", str(tmp_path / "p.json"), "--objective", "sft"]) == 0
    data = json.loads((tmp_path / "p.json").read_text())
    wanted = fa.adapters.adapter_parameters(ADAPTER, config)["total"]
    assert data["parameters"]["adapter"] == wanted == data["trained"]
    config_of("internvl").save_pretrained(tmp_path / "other")
    argv[2] = str(tmp_path / "other")
    assert cli.main(argv) == 1
    assert "was saved from llava, and this is internvl" in capsys.readouterr().err


def test_the_command_names_a_missing_model(tmp_path, capsys):
    assert cli.main(["plan", "--model", str(tmp_path)]) == 1
    assert "must be a folder with a config.json" in capsys.readouterr().err


def test_peaks_are_those_of_the_benchmarks(harness):
    peak_tflops = importlib.import_module("benchmarks._gpu_models").peak_tflops
    for device in DEVICES.values():
        assert device.tflops == peak_tflops(device.name)


def test_windows_and_overridden_tokens():
    # 84 x 140 pixels are 3 x 5 blocks of 2 x 2 patches; windows of 2 x 2 blocks cut them into
    # 4, 4, 2 and 2, 2, 1 blocks.
    config = config_of("qwen2_5_vl")
    sizes = measure(config, PlanConfig(image_size=(90, 138), tiles=2))
    picture = sizes.picture
    assert (picture.patches, picture.merged, picture.image_tokens) == (60, 15, 30)
    assert picture.spans == (
        *[(16, 16, 8, 8, 8, 4), (60,)],
        *[(16, 16, 8, 8, 8, 4)] * 2,
        (60,),
    )
    nexts = PlanConfig(objective="sft", tiles=3, image_tokens=52, adapter=ONE_LAYER)
    plan = make_plan(family("llava_next").config, nexts)
    # Three views of 4 x 4 patches and a class token.
    assert plan.tokens["image"] == 52 and plan.tokens["vision"] == 3 * 17


def test_the_command_offers_every_gpu():
    hints = typing.get_type_hints(PlanOptions)
    assert set(typing.get_args(hints["gpu"])) == set(DEVICES)
