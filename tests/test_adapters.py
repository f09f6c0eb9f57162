"""Adapters: identity until trained, gone after detach, and files that load whole or not at all."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.adapters import CONFIG, WEIGHTS, disabled
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

BOTH = fa.AdapterConfig(shift_layers=(1, 3), shift_hidden_dim=5, calibration=True)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def trained(model, config=BOTH):
    """An adapter that does something, with the same random weights every time."""
    adapter = fa.attach(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.fill_(float(name.endswith("scale")))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


def test_untrained_adapter_changes_no_bit():
    model, batch = tiny_llava(), llava_batch(["ttityy", "tyy"])
    before = logits(model, batch)
    fa.attach(model, BOTH)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "recorders-installed-before"])
def test_hidden_states_of_transformers_see_the_shift(warm):
    """The model's own recording hooks may be older than ours and must still see our output."""
    model, batch = tiny_llava(), llava_batch(["ttityy"])
    if warm:
        logits(model, batch)
    before = copy.deepcopy(model)
    trained(model, fa.AdapterConfig(shift_layers=(3,)))
    assert not torch.equal(logits(model, batch), logits(before, batch))


def test_shift_leaves_the_class_token():
    model = tiny_llava()
    batch = llava_batch(["tit"])
    outputs = {}
    tower = fa.VLM(model).vision_tower
    tower.encoder.layers[2].register_forward_hook(lambda m, a, out: outputs.update(x=out))
    logits(model, batch)
    before = outputs["x"]
    trained(model, fa.AdapterConfig(shift_layers=(3,)))
    logits(model, batch)
    after = outputs["x"]
    assert torch.equal(after[:, 0], before[:, 0])
    assert (after[:, 1:] != before[:, 1:]).any(-1).all()


def test_calibration_touches_vision_tokens_alone():
    model, batch = tiny_llava(), llava_batch(["ttit", "ttt"])
    (before,) = fa.VLM(model).hidden_states(batch, [1])
    adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(), calibration=True))
    with torch.no_grad():
        adapter.calibrations["1"].scale.fill_(2.0)
        adapter.calibrations["1"].shift.fill_(1.0)
    (after,) = fa.VLM(model).hidden_states(batch, [1])
    vision = fa.VLM(model).vision_mask(batch)
    assert torch.equal(after[~vision], before[~vision])
    assert torch.equal(after[vision], 2 * before[vision] + 1)


def test_text_only_batches_and_generation_work():
    model = tiny_llava()
    trained(model)
    text, image = llava_batch(["tttt"]), llava_batch(["ttit"])
    plain = tiny_llava()
    assert torch.equal(logits(model, text), logits(plain, text))
    image.pop("labels")
    out = model.generate(**image, max_new_tokens=3, do_sample=False)
    assert out.shape[1] == image["input_ids"].shape[1] + 3


def test_disabled_gives_the_base_and_restores():
    model, batch = tiny_llava(), llava_batch(["ttityy"])
    before = logits(model, batch)
    trained(model)
    with disabled(model):
        assert torch.equal(logits(model, batch), before)
    assert not torch.equal(logits(model, batch), before)


def test_detach_restores_the_model():
    model, batch = tiny_llava(), llava_batch(["ttityy"])
    before, keys = logits(model, batch), set(model.state_dict())
    trained(model)
    fa.detach(model)
    assert torch.equal(logits(model, batch), before) and set(model.state_dict()) == keys
    with pytest.raises(ValueError, match="got none; call fastalign.attach first"):
        fa.detach(model)


def test_a_deep_copy_runs_its_own_adapter():
    model, batch = tiny_llava(), llava_batch(["ttityy"])
    trained(model)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.fastalign_adapter.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, batch), expected)


def test_gradients_reach_every_part_under_checkpointing():
    # A label right after an image: without one, the last calibration reaches no label.
    batch = llava_batch(["ttiyyy", "tityy"])
    gradients = []
    for checkpointed in (False, True):
        model = tiny_llava()
        adapter = trained(model)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        fa.objectives.cal(fa.VLM(model), batch)["loss"].backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapter_gives_the_same_model(tmp_path, attached, dtype):
    model, batch = tiny_llava(dtype=dtype), llava_batch(["ttityy"], dtype=dtype)
    trained(model)
    fa.save_adapter(model, tmp_path)
    other = tiny_llava(dtype=dtype)
    if attached:
        fa.attach(other, BOTH)
    fa.load_adapter(other, tmp_path)
    assert torch.equal(logits(other, batch), logits(model, batch))
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, CONFIG}


def damaged(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("shifts.1.conv1.weight"), r"missing \['shifts.1.conv1.weight'\]"),
        (lambda t: t.update(extra=torch.ones(1)), r"unknown \['extra'\]"),
        (
            lambda t: t.update({"shifts.1.conv1.bias": torch.ones(6)}),
            r"shifts.1.conv1.bias .* must be \(5,\): got \(6,\)",
        ),
        (lambda t: t["calibrations.2.scale"].mul_(1.5), "calibrations.2 .* file is damaged"),
        (lambda t: t["shifts.3.conv2.weight"].fill_(torch.nan), "shifts.3 .* file is damaged"),
    ],
    ids=["missing", "unknown", "shape", "value", "nan"],
)
def test_a_damaged_file_is_refused_and_the_model_kept(tmp_path, change, message):
    model = tiny_llava()
    trained(model)
    fa.save_adapter(model, tmp_path)
    damaged(tmp_path, change)
    other = tiny_llava()
    with pytest.raises(ValueError, match=message):
        fa.load_adapter(other, tmp_path)
    assert not hasattr(other, "fastalign_adapter")


def test_wrong_files_are_refused(tmp_path):
    model = tiny_llava()
    trained(model)
    fa.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="saved from another model"):
        fa.load_adapter(tiny_llava(layers=2), tmp_path)
    with pytest.raises(ValueError, match="another configuration"):
        fa.attach(other := tiny_llava(), fa.AdapterConfig(shift_layers=(1,)))
        fa.load_adapter(other, tmp_path)
    about = json.loads((tmp_path / CONFIG).read_text())
    about["adapter"]["surprise"] = 1
    (tmp_path / CONFIG).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must hold an adapter of the keys"):
        fa.load_adapter(tiny_llava(), tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        fa.load_adapter(tiny_llava(), tmp_path)
    with pytest.raises(FileNotFoundError):
        fa.load_adapter(tiny_llava(), tmp_path / "nowhere")
    fa.save_adapter(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        fa.load_adapter(tiny_llava(), tmp_path)


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match="must hold something"):
        fa.AdapterConfig(shift_layers=())
    with pytest.raises(ValueError, match="must not repeat"):
        fa.AdapterConfig(shift_layers=(1, 1))
    with pytest.raises(ValueError, match=r"shift_layers must lie in 1..3.*got 4"):
        fa.attach(tiny_llava(), fa.AdapterConfig(shift_layers=(4,)))
    model = tiny_llava()
    fa.attach(model, BOTH)
    with pytest.raises(ValueError, match="must not have an adapter yet"):
        fa.attach(model, BOTH)
    embeds = torch.zeros(1, TOKENS, 32)
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=embeds)
