"""Adapters in every family of models, on batches with several images of several sizes."""

import copy
from functools import cache

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastalign as fa
from fastalign.adapters import AdapterConfig, adapter_of, attach, disabled
from fastalign.adapters._config import last_read_layer
from fastalign.models import layer_stack
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for
from fastalign.testing.models import llava_batch, tiny_llava

ALL = [name for name in FAMILIES + RECURRENT if name != "mllama"]
QFORMER = ("instructblip", "instructblip_opt", "blip2")
# Every picture of their batches has the same number of tokens.
ONE_GRID = (
    *("llava", "internvl", "two_towers", "idefics3", "smolvlm"),
    *("gemma3", "paligemma", "paligemma2", "lfm2_vl"),
)
# generate() keeps the sizes of the images from the model.
NO_SIZES = ("llava_next", "llava_onevision")


@cache
def setup(name):
    """A model and its mixed batch, which tests leave as they are."""
    model = family(name)
    return model, family_batch(name, model, samples_for(name))


def everything(name, **changes):
    """Every part, after every layer that the family lets it follow."""
    model, _ = setup(name)
    parts = {
        "shift_layers": tuple(range(1, last_read_layer(model.config) + 1)),
        "shift_hidden_dim": 6,
        "calibration": True,
        "decoder_shift_layers": () if name in QFORMER else (1, 3),
        "decoder_shift_hidden_dim": 6,
    }
    return AdapterConfig(**(parts | changes))


def stirred(model, config, seed=7):
    """An adapter that does something, with the same random weights every time."""
    torch.manual_seed(seed)
    adapter = attach(model, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return adapter


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def prompt(name, model):
    """Two samples of one length, without padding."""
    front = name in QFORMER or "paligemma" in name
    # Images take turns between two sizes: two of them make both samples equally long.
    batch = family_batch(name, model, ["ittt" if front else "tiitt"] * 2)
    batch.pop("labels")
    assert batch["attention_mask"].all()
    return batch


def generated(name, model, batch, **options):
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **options}
    options["suppress_tokens"] = [500, 501]  # a random model would say images, too
    out = model.generate(**batch, output_logits=True, **options)
    return out.sequences[:, -4:], torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", ALL)
def test_untrained_adapter_changes_no_bit(name):
    model, batch = setup(name)
    before, tokens = logits(model, batch), generated(name, model, prompt(name, model))
    twin = copy.deepcopy(model)
    attach(twin, everything(name))
    assert torch.equal(logits(twin, batch), before)
    if name not in NO_SIZES:
        for a, b in zip(generated(name, twin, prompt(name, twin)), tokens, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ALL)
def test_generation_with_a_cache_is_that_without(name):
    """With a cache the model sees new tokens alone, without pictures and with a shorter mask."""
    model = copy.deepcopy(setup(name)[0])
    batch = prompt(name, model)
    plain = generated(name, model, batch)[1]
    stirred(model, everything(name, **({"decoder_shift_layers": ()} if name in NO_SIZES else {})))
    tokens, scores = generated(name, model, batch)
    assert (scores - plain).abs().max() > 1e-2
    if name not in QFORMER:
        others, whole = generated(name, model, batch, use_cache=False)
        assert torch.equal(tokens, others)
        torch.testing.assert_close(scores, whole, rtol=1e-3, atol=1e-3)
    # The first step is the model's own forward, in which the adapter sees the whole batch.
    torch.testing.assert_close(scores[:, 0], logits(model, batch)[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", QFORMER)
def test_a_prompt_of_queries_is_calibrated_for_every_beam(name):
    """Their generate hands embeddings to the language model, which cannot do without a cache."""
    model = copy.deepcopy(setup(name)[0])
    batch = prompt(name, model)
    stirred(model, everything(name))
    tokens, scores = generated(name, model, batch)
    for step in range(1, 4):
        ids = torch.cat([batch["input_ids"], tokens[:, :step]], 1)
        grown = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(
            scores[:, step], logits(model, grown)[:, -1], rtol=1e-3, atol=1e-3
        )
    one = model.generate(**batch, max_new_tokens=4, do_sample=False)
    several = model.generate(
        **batch, max_new_tokens=4, do_sample=True, num_return_sequences=3, top_k=1
    )
    assert torch.equal(several, one.repeat_interleave(3, 0))


@pytest.mark.parametrize("name", ALL)
def test_calibration_leaves_text_bit_equal(name):
    model, batch = setup(name)
    model = copy.deepcopy(model)
    vlm = fa.VLM(model)
    base = vlm.hidden_states(batch)
    stirred(model, AdapterConfig(shift_layers=(), calibration=True))
    seen = []
    # Registered first, so that it runs last; prepended below, so that it runs before the adapter.
    for layer in vlm.layers:
        layer.register_forward_hook(lambda m, a, out: seen.append(["after", first(out)]))
        layer.register_forward_hook(
            lambda m, a, out: seen.append(["before", first(out)]), prepend=True
        )
    calibrated = vlm.hidden_states(batch)
    vision = vlm.vision_mask(batch)
    outputs = [value for _, value in seen]
    assert [kind for kind, _ in seen] == ["before", "after"] * 4
    for k in range(4):
        before, after = outputs[2 * k], outputs[2 * k + 1]
        assert torch.equal(after[~vision], before[~vision])
        part = model.fastalign_adapter.calibrations[str(k + 1)]
        assert torch.equal(after[vision], before[vision] * part.scale + part.shift)
    ahead = (vision.cumsum(1) == 0) & vlm.text_mask(batch)
    assert ahead.any() or "blip" in name or "paligemma" in name
    for old, new in zip(base, calibrated, strict=True):
        assert torch.equal(new[ahead], old[ahead])
    without = ~vision.any(1)
    if name not in ("lfm2_vl", "qwen3_5") and without.any():
        assert torch.equal(calibrated[-1][without], base[-1][without])


@pytest.mark.parametrize("name", [name for name in ALL if name not in QFORMER])
def test_a_decoder_shift_brings_the_neighbour_among_the_image_tokens(name):
    """h' = h + relu(first channel of the token to the left), in each picture; text is unchanged."""
    model, batch = setup(name)
    model = copy.deepcopy(model)
    vlm = fa.VLM(model)
    (before,) = vlm.hidden_states(batch, [1])
    config = AdapterConfig(shift_layers=(), decoder_shift_layers=(1,), decoder_shift_hidden_dim=1)
    part = attach(model, config).decoder_shifts["1"]
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()
        part.conv1.weight[0, 0, 1, 1] = part.conv2.weight[0, 0, 1, 0] = 1.0
    seen = []
    vlm.layers[0].register_forward_hook(lambda m, a, out: seen.append(first(out)))
    model(**batch)
    expected, patches = before[..., 0].flatten().clone(), vlm.patches(batch)
    start = 0
    for height, width in patches.grids:
        places = patches.places[start : start + height * width].view(height, width)
        expected[places[:, 1:]] += before[..., 0].flatten()[places[:, :-1]].relu()
        start += height * width
    assert len(set(patches.grids)) > 1 or name in ONE_GRID
    assert torch.equal(seen[0][..., 1:], before[..., 1:])
    torch.testing.assert_close(seen[0][..., 0].flatten(), expected)
    text = ~vlm.vision_mask(batch)
    assert torch.equal(seen[0][text], before[text])


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", ALL)
def test_training_reaches_every_part_and_nothing_below_the_first(name):
    model, batch = setup(name)
    model = copy.deepcopy(model)
    config = everything(name, calibration=False)
    shifts = (max(config.shift_layers),)
    adapter = attach(model, everything(name, calibration=False, shift_layers=shifts))
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    vlm = fa.VLM(model)
    layer = layer_stack(vlm.vision_tower)[shifts[0] - 1]
    graphs = []
    layer.register_forward_pre_hook(
        lambda m, args, kw: graphs.append((*args, *kw.values())[0].requires_grad), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, out: graphs.append(first(out).requires_grad))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        fa.objectives.sft(vlm, batch)["loss"].backward()
        gradients = {k: p.grad.abs().sum() for k, p in adapter.named_parameters()}
        optimizer.step()
    assert all(value > 0 for value in gradients.values()), gradients
    assert graphs == [False, True] * 2
    assert all(p.grad is None for k, p in model.named_parameters() if "fastalign" not in k)


@pytest.mark.parametrize("name", ALL)
def test_calibration_alone_builds_no_graph_below_the_decoder(name):
    model, batch = setup(name)
    model = copy.deepcopy(model)
    adapter = attach(model, AdapterConfig(shift_layers=(), calibration=True))
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    vlm = fa.VLM(model)
    fa.objectives.sft(vlm, batch)["loss"].backward()
    assert not vlm.forward(batch).decoder_inputs["inputs_embeds"].requires_grad
    # All but the last layer's: no label token reads an image token after it.
    for k in ("1", "2", "3"):
        part = adapter.calibrations[k]
        assert part.scale.grad.abs().sum() > 0 and part.shift.grad.abs().sum() > 0


def checkpointed(model):
    """Each layer in torch's wrapper: it runs again in the backward, with its hooks."""
    for stack in (layer_stack(fa.VLM(model).vision_tower), fa.VLM(model).layers):
        for i, layer in enumerate(stack):
            stack[i] = checkpoint_wrapper(layer)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "idefics3", "llava_next"])
def test_checkpointed_layers_run_again_on_the_same_grids(name):
    model, batch = setup(name)
    gradients = []
    for again in (False, True):
        twin = copy.deepcopy(model)
        adapter = stirred(twin, everything(name))
        if again:
            checkpointed(twin)
        twin.train()
        fa.objectives.cal(fa.VLM(twin), batch)["loss"].backward()
        gradients.append([p.grad for p in adapter.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def with_video(grid):
    """A batch of Qwen2.5-VL with two images and, in the second sample, a video."""
    model, _ = setup("qwen2_5_vl")
    batch = family_batch("qwen2_5_vl", model, ["titti", "tittt"])
    frames, height, width = grid
    ids, place = batch["input_ids"], 1
    tokens = frames * height * width // 4
    video = torch.tensor([502, *[501] * tokens, 503, 9, 9])
    ids = torch.cat([ids, torch.zeros(2, len(video), dtype=torch.long)], 1)
    place = int(batch["attention_mask"][1].sum())
    ids[1, place : place + len(video)] = video
    types = (ids == 500).long() + 2 * (ids == 501).long()
    values = torch.randn(frames * height * width, 3 * 2 * 14 * 14)
    mask = (ids != 0).long()
    labels = torch.where((ids > 3) & (ids < 490), ids, -100)
    return {
        **batch, "input_ids": ids, "attention_mask": mask, "labels": labels,
        "mm_token_type_ids": types, "pixel_values_videos": values,
        "video_grid_thw": torch.tensor([grid]),
    }  # fmt: skip


def test_videos_are_shifted_frame_by_frame_and_calibrated():
    model = copy.deepcopy(setup("qwen2_5_vl")[0])
    batch = with_video((2, 4, 6))
    before = logits(model, batch)
    adapter = stirred(model, everything("qwen2_5_vl"))
    assert not torch.equal(logits(model, batch), before)
    image, video = adapter._layouts
    assert video.grids == ((4, 6), (4, 6)) and len(image.grids) == 3
    vlm = fa.VLM(model)
    assert torch.equal(adapter._image, (batch["input_ids"] == 500) | (batch["input_ids"] == 501))
    assert vlm.vision_mask(batch).sum() == adapter._image.sum()


@pytest.mark.parametrize("grid", [(2, 4, 6), (1, 4, 14)])
def test_images_and_videos_are_told_apart_when_layers_run_again(grid):
    """Of equally many patches, on other grids, they cannot be: that is an error."""
    model, batch = copy.deepcopy(setup("qwen2_5_vl")[0]), with_video(grid)
    patches = {"image": batch["pixel_values"].shape[0], "video": grid[0] * grid[1] * grid[2]}
    stirred(model, everything("qwen2_5_vl")).requires_grad_(True)
    checkpointed(model)
    loss = fa.objectives.sft(fa.VLM(model), batch)["loss"]
    if patches["image"] != patches["video"]:
        loss.backward()
        assert all(p.grad is not None for p in adapter_of(model).parameters())
        return
    with pytest.raises(RuntimeError, match="not known for which pictures"):
        loss.backward()


@pytest.mark.parametrize("name", ALL)
def test_saved_adapter_gives_the_same_model(name, tmp_path):
    model, batch = setup(name)
    trained, other = copy.deepcopy(model), copy.deepcopy(model)
    stirred(trained, everything(name))
    fa.save_adapter(trained, tmp_path)
    fa.load_adapter(other, tmp_path)
    expected = logits(trained, batch)
    assert torch.equal(logits(other, batch), expected)
    assert not torch.equal(logits(model, batch), expected)
    with disabled(other):
        assert torch.equal(logits(other, batch), logits(model, batch))


def test_bfloat16_base_runs_float32_parts():
    model = family("qwen2_5_vl", dtype=torch.bfloat16)
    batch = family_batch("qwen2_5_vl", model, samples_for("qwen2_5_vl"))
    before = logits(model, batch)
    adapter = attach(model, everything("qwen2_5_vl"))
    assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
    adapter.float()
    assert torch.equal(logits(model, batch), before)
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    fa.objectives.sft(fa.VLM(model), batch)["loss"].backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2", "llava_next"])
def test_the_contrast_sees_the_adapter_with_the_image_alone(name):
    """The image-free forward equals the base's, whose text no calibration and no shift reaches."""
    model, batch = setup(name)
    vlm = fa.VLM(copy.deepcopy(model))
    before = vlm.contrast(batch)
    out = logits(vlm.model, batch)
    stirred(vlm.model, everything(name))
    after, moved = vlm.contrast(batch), logits(vlm.model, batch)
    rows, cols, labels = vlm.label_rows(batch)
    change = (moved - out)[rows, cols, labels]
    active = before != 0
    torch.testing.assert_close(after[active], (before + change)[active], rtol=1e-3, atol=2e-3)


def test_compiling_finds_no_more_to_break_at():
    model, batch = tiny_llava(layers=1), llava_batch(["ttitt", "ttt"])
    batch.pop("labels")
    reasons = []
    for attached in (False, True):
        twin = copy.deepcopy(model)
        if attached:
            stirred(twin, AdapterConfig(shift_layers=(1, 3), calibration=True))
        expected = logits(twin, batch)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.testing.assert_close(logits(torch.compile(twin, backend="eager"), batch), expected)
        reasons.append(dict(torch._dynamo.utils.counters["graph_break"]))
    torch._dynamo.reset()
    assert reasons[0] == reasons[1]
