"""LoRA trained beside an adapter is part of the result: PEFT's own files, loaded in every way."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fastalign as fa
from fastalign.testing.models import llava_batch, tiny_llava

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SAMPLES = ["ttityyy", "tiyyyy", "ttiyyty", "tiyyt"]
TEXT = r".*language_model.*\.(q_proj|v_proj)"  # the vision tower has such names too


def base():
    return tiny_llava(head_scale=2.0)


def lora(**changes):
    settings = {"target_modules": TEXT, "r": 2, "init_lora_weights": False}
    return peft.LoraConfig(**(settings | changes))


def with_lora(**changes):
    """A base, changed in place, and PEFT's wrapper."""
    torch.manual_seed(3)
    model = base()
    return model, peft.get_peft_model(model, lora(**changes))


def trained(folder, model):
    config = fa.TrainConfig(
        output_dir=str(folder),
        objective="sft",
        adapter=fa.AdapterConfig(shift_layers=(1, 2), calibration=True),
        max_steps=3,
        batch_size=2,
        learning_rate=1e-2,
        save_every=1,
        progress=False,
    )
    return fa.train(config, model=model, dataset=SAMPLES, collate=llava_batch)


def logits(model):
    with torch.no_grad():
        return model(**llava_batch(["ttityy", "tiyy"])).logits


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, wrapped = with_lora()
    start = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    done = trained(folder, model)
    assert start and not any(torch.equal(v, model.state_dict()[k]) for k, v in start.items())
    return folder, model, wrapped, done


def from_pretrained(model, folder):
    peft.PeftModel.from_pretrained(model, folder)


def load_adapter(model, folder):
    model.load_adapter(str(folder))  # transformers' own, through PEFT


def inject(model, folder):
    peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), model)
    stored = load_file(folder / "adapter_model.safetensors")
    stored = {key.removeprefix("base_model.model."): value for key, value in stored.items()}
    left = peft.set_peft_model_state_dict(model, stored)
    assert not left.unexpected_keys


@pytest.mark.parametrize("ours", ["first", "last"])
@pytest.mark.parametrize("load", [from_pretrained, load_adapter, inject])
def test_base_and_lora_and_adapter_are_the_trained_model(result, load, ours):
    folder, model, _, done = result
    assert done.path == folder / "adapter"
    fresh = base()
    assert not torch.equal(logits(fresh), logits(model))
    if ours == "first":
        fa.load_adapter(fresh, folder / "adapter")
    load(fresh, folder / "lora")
    if ours == "last":
        fa.load_adapter(fresh, folder / "adapter")
    assert torch.equal(logits(fresh.eval()), logits(model))


def test_the_files_are_those_that_peft_writes(result, tmp_path):
    folder, model, wrapped, _ = result
    before = model.peft_config["default"].inference_mode
    wrapped.save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder / "lora", tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    files = (folder / "lora/adapter_config.json", tmp_path / "adapter_config.json")
    about = [json.loads(file.read_text()) for file in files]
    assert about[0] == about[1] and about[0]["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is before is False


def test_a_resumed_run_writes_the_same_files(result, tmp_path):
    folder, _, _, _ = result
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    model, _ = with_lora()
    trained(tmp_path, model)
    for name in ("lora/adapter_model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_every_tuner_has_a_folder_and_biases_of_ours_stay_ours(tmp_path):
    model, wrapped = with_lora(bias="all")
    wrapped.add_adapter("second", lora(target_modules=r".*language_model.*\.o_proj"))
    trained(tmp_path, model)
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "lora/second")
    )
    assert any("q_proj.lora_A.weight" in key for key in first)
    assert all(".o_proj.lora_" in key for key in second if "lora_" in key)
    assert any(key.endswith(".bias") for key in first)
    assert not any("fastalign_adapter" in key for key in first)
    fresh = peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    fresh.load_adapter(tmp_path / "lora/second", "second")
    for name in ("default", "second"):
        fresh.set_adapter(name), wrapped.set_adapter(name)
        with fa.adapters.disabled(model):
            assert torch.equal(logits(fresh.get_base_model()), logits(model)), name


def test_a_part_with_lora_of_its_own_has_a_folder_of_its_name(tmp_path):
    model = base()
    part = "model.language_model"
    peft.inject_adapter_in_model(lora(target_modules=["q_proj"]), model.get_submodule(part))
    trained(tmp_path, model)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [part]
    fresh = base()
    inject(fresh.get_submodule(part), tmp_path / "lora" / part)
    fa.load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh), logits(model))


def test_without_lora_there_is_no_such_folder(tmp_path):
    trained(tmp_path, base())
    assert (tmp_path / "adapter").is_dir() and not (tmp_path / "lora").exists()
