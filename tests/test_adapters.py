"""Adapters: identity until trained, gone after detach, and files that load whole or not at all."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastalign as fa
from fastalign.adapters import CONFIG, WEIGHTS, _files, adapter_parameters, disabled, upper_half
from fastalign.testing.families import family
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
    with pytest.raises(
        ValueError, match=r"saved from another model, llava.*num_layers 3 and here 2"
    ):
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


def test_an_adapter_of_one_family_is_refused_by_another(tmp_path, monkeypatch):
    """Before anything is allocated: neither the adapter is made nor the weights are opened."""
    fa.attach(source := family("qwen2_5_vl"), fa.AdapterConfig(shift_layers=(1,)))
    fa.save_adapter(source, tmp_path)
    monkeypatch.delattr(_files, "Adapter")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=(
        r"saved from another model, qwen2_5_vl \(Qwen2_5_VLForConditionalGeneration\), and this is "
        r"qwen2_vl \(Qwen2VLForConditionalGeneration\): model_type qwen2_5_vl and here qwen2_vl, "
        r"vision_type qwen2_5_vl_vision and here qwen2_vl_vision$"
    )):  # fmt: skip
        fa.load_adapter(family("qwen2_vl"), tmp_path)


def test_an_adapter_goes_with_every_image_size(tmp_path):
    """Convolutions know no grid: what was trained on 4 x 4 patches runs on 6 x 6."""
    model = tiny_llava()
    adapter = trained(model)
    fa.save_adapter(model, tmp_path)
    config = copy.deepcopy(model.config)
    config.vision_config.image_size, config.image_seq_length = 24, 36
    larger = type(model)(config).eval()
    fa.load_adapter(larger, tmp_path)
    ids = torch.tensor([[5, *[3] * 36, 6]])
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        moved = larger(input_ids=ids, pixel_values=pixels).logits
        with disabled(larger):
            assert not torch.equal(larger(input_ids=ids, pixel_values=pixels).logits, moved)
    for a, b in zip(adapter.parameters(), larger.fastalign_adapter.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_part_is_probed(tmp_path):
    config = fa.AdapterConfig((1,), 5, calibration=True, decoder_shift_layers=(2,))
    model = tiny_llava()
    trained(model, config)
    fa.save_adapter(model, tmp_path)
    probes = {k for k in load_file(tmp_path / WEIGHTS) if k.startswith("probe.")}
    shifts = {"probe.shifts.1", "probe.decoder_shifts.2"}
    packed = {f"{name}.packed" for name in shifts}
    assert probes == shifts | packed | {f"probe.calibrations.{k}" for k in (1, 2, 3)}
    damaged(tmp_path, lambda t: t["decoder_shifts.2.conv2.bias"].add_(0.1))
    with pytest.raises(ValueError, match=r"decoder_shifts.2 .* file is damaged"):
        fa.load_adapter(tiny_llava(), tmp_path)


def llava_7b():
    """The configuration of LLaVA-1.5 7B, as far as sizes go."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    text = LlamaConfig(hidden_size=4096, num_hidden_layers=32)
    return LlavaConfig(vision_config=vision, text_config=text)


def test_the_published_size_is_200_million():
    model = llava_7b()
    config = fa.AdapterConfig.paper(model)
    assert config == fa.AdapterConfig(shift_layers=(4, 6), shift_hidden_dim=5440)
    # Two modules of two convolutions: 9 * 1024 * 5440 weights each, and biases 5440 + 1024.
    whole = 2 * (2 * 9 * 1024 * 5440 + 5440 + 1024)
    counts = {"shifts": whole, "decoder_shifts": 0, "calibrations": 0, "total": whole}
    assert adapter_parameters(config, model) == counts and whole == 200_553_088
    # MoCa: u and v of width 4096 after each of 32 layers.
    moca = fa.AdapterConfig(shift_layers=(), calibration=True)
    assert adapter_parameters(moca, model)["total"] == 32 * 2 * 4096
    assert upper_half(model) == 13
    with pytest.raises(ValueError, match=r"shift_layers must lie in 1..3.*got 4"):
        fa.AdapterConfig.paper(tiny_llava())


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "blip2"])
def test_parameters_are_counted_without_making_them(name):
    model = family(name)
    decoder = () if name == "blip2" else (2,)
    config = fa.AdapterConfig((1, 2), 7, 3, True, 0.0, decoder, 5)
    counts = adapter_parameters(config, model.config)
    parts = dict(fa.attach(model, config).named_children())
    for kind, part in parts.items():
        assert counts[kind] == sum(p.numel() for p in part.parameters())
    assert counts["total"] == sum(counts[kind] for kind in parts)


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("mllama", {"shift_layers": (1,)}, TypeError, "cannot be mllama_vision_model"),
        ("mllama", {"calibration": True}, ValueError, "calibration must be off for mllama"),
        ("mllama", {"decoder_shift_layers": (1,)}, ValueError, "no tokens of the decoder"),
        ("blip2", {"decoder_shift_layers": (1,)}, ValueError, "queries, which lie on no grid"),
        ("llava", {"decoder_shift_layers": (5,)}, ValueError, "must lie in 1..4: got 5"),
        ("qwen3_vl", {"shift_layers": (4,)}, ValueError, "must lie in 1..3.*got 4"),
    ],
)
def test_what_a_family_cannot_have_is_named(name, config, error, message):
    model = family(name)
    with pytest.raises(error, match=message):
        fa.attach(model, fa.AdapterConfig(**({"shift_layers": ()} | config)))
    assert not hasattr(model, "fastalign_adapter")


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
