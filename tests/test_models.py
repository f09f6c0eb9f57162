"""What `VLM` sees of a model: image tokens, hidden states, labels, and the pass without images."""

import types
import weakref

import pytest
import torch
from _versions import applies_softcap

import fastalign
from fastalign.models import VLM, gaussian_blur, patch_mask
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for
from fastalign.testing.models import IMAGE, TOKENS, llava_batch, tiny_llava

MIXED = ["ttityyy", "tyyy", "yityiyy", "tttiyyyyty"]


def test_masks_find_images_text_and_padding():
    vlm, batch = VLM(tiny_llava()), llava_batch(["ti", "tt"])
    vision, text = vlm.vision_mask(batch), vlm.text_mask(batch)
    assert vision.tolist() == [[False] + [True] * TOKENS, [False] * (TOKENS + 1)]
    assert text.tolist() == [[True] + [False] * TOKENS, [True, True] + [False] * (TOKENS - 1)]


def test_hidden_states_are_those_of_transformers():
    model, batch = tiny_llava(), llava_batch(MIXED)
    with torch.no_grad():
        ours = VLM(model).hidden_states(batch)
        theirs = model(**batch, output_hidden_states=True).hidden_states[1:]
        chosen = VLM(model).hidden_states(batch, layers=[3, 1])
    assert len(ours) == len(theirs) == 3
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(chosen[0], theirs[2]) and torch.equal(chosen[1], theirs[0])


def test_each_layer_shows_hidden_states_one_by_one():
    vlm, batch = VLM(tiny_llava()), llava_batch(MIXED)
    seen = []

    def visit(k, hidden):
        seen.append((k, hidden.clone()))
        return hidden + 1  # what a visitor returns changes nothing

    with torch.no_grad():
        expected = vlm.hidden_states(batch)
        vlm.each_layer(batch, visit)
    assert [k for k, _ in seen] == [1, 2, 3]
    assert all(torch.equal(a, b) for (_, a), b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", FAMILIES + RECURRENT)
def test_each_layer_of_every_family(name):
    model = family(name)
    vlm, batch = VLM(model), family_batch(name, model, samples_for(name))
    seen = []
    with torch.no_grad():
        vlm.each_layer(batch, lambda k, hidden: seen.append(hidden.clone()))
        expected = vlm.hidden_states(batch)
    assert len(seen) == vlm.num_layers
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_each_layer_keeps_no_layer():
    vlm, batch = VLM(tiny_llava()), llava_batch(MIXED)
    outputs, alive = [], []

    def visit(k, hidden):
        alive.append([output() is not None for output in outputs[:-1]])
        outputs.append(weakref.ref(hidden))

    with torch.no_grad():
        vlm.each_layer(batch, visit)
    # While layer k is shown, only its input, of layer k - 1, may still be in use.
    assert alive == [[], [], [False]]
    assert all(output() is None for output in outputs)

    def stop(k, hidden):
        raise RuntimeError("enough")

    before = [len(hooks) for m in vlm.model.modules() for hooks in _hooks(m)]
    with pytest.raises(RuntimeError, match="enough"):
        vlm.each_layer(batch, stop)
    assert [len(hooks) for m in vlm.model.modules() for hooks in _hooks(m)] == before


def test_a_view_leaves_the_model_untouched():
    model, batch = tiny_llava(), llava_batch(MIXED)
    model(**batch)  # transformers installs its own recorders at the first call
    before = {name: sum(map(len, _hooks(m))) for name, m in model.named_modules()}
    keys, training = set(model.state_dict()), [m.training for m in model.modules()]
    vlm = VLM(model)
    vlm.hidden_states(batch)
    vlm.contrast(batch)
    assert {name: sum(map(len, _hooks(m))) for name, m in model.named_modules()} == before
    assert set(model.state_dict()) == keys and [m.training for m in model.modules()] == training


def _hooks(module):
    return module._forward_hooks, module._forward_pre_hooks


def test_hooks_are_removed_when_the_model_fails():
    model, batch = tiny_llava(), llava_batch(["tiy"])
    model(**batch)
    before = [len(hooks) for m in model.modules() for hooks in _hooks(m)]
    batch["pixel_values"] = batch["pixel_values"][:, :, :4]
    with pytest.raises(ValueError):
        VLM(model).hidden_states(batch)
    assert [len(hooks) for m in model.modules() for hooks in _hooks(m)] == before


def true_float64(model):
    """Norms that stay in float64: transformers' own round to float32, which hides differences."""

    def forward(self, x):
        variance = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(forward, module)
    return model


def test_dropping_the_image_equals_masking_it_in_float64():
    model = true_float64(tiny_llava(dtype=torch.float64, head_scale=4.0))
    batch = llava_batch(MIXED, dtype=torch.float64)
    vlm = VLM(model)
    rows, cols, _ = vlm.label_rows(batch)
    after_image = vlm.vision_mask(batch)[rows, cols]
    assert after_image.any() and not after_image.all()
    difference = (vlm.contrast(batch, "mask") - vlm.contrast(batch, "drop")).abs()
    assert difference[~after_image].max() <= 1e-12
    assert difference[after_image].min() > 1e-3  # the released code's leak through the residual


def test_contrast_is_the_difference_of_two_plain_passes():
    model = tiny_llava(head_scale=4.0)
    batch = llava_batch(["ttityyy"])
    delta = VLM(model).contrast(batch)
    text = batch["input_ids"] != IMAGE
    positions = torch.arange(text.shape[1])[None][text][None]
    with torch.no_grad():
        with_image = model(**batch).logits
        without = model(input_ids=batch["input_ids"][text][None], position_ids=positions).logits
    labels = batch["labels"][0, -3:]
    expected = with_image[0, -4:-1].gather(1, labels[:, None]) - without[0, -4:-1].gather(
        1, labels[:, None]
    )
    torch.testing.assert_close(delta, expected[:, 0], atol=1e-4, rtol=1e-4)
    assert delta.abs().max() > 1


def test_contrast_is_zero_without_an_image_and_before_the_first():
    vlm = VLM(tiny_llava(head_scale=4.0))
    assert torch.equal(vlm.contrast(llava_batch(["tyyy", "ty"])), torch.zeros(4))
    delta = vlm.contrast(llava_batch(["tyyiyy", "iyy"]))
    assert torch.equal(delta[:2], torch.zeros(2))  # before the image
    assert delta[2] != 0 and delta[3] != 0
    assert delta[4] == 0  # no text before it: nothing to compare with
    assert delta[5] != 0


def test_contrast_does_not_depend_on_the_batch():
    vlm = VLM(tiny_llava(head_scale=4.0))
    batch = llava_batch(MIXED)
    whole = vlm.contrast(batch)
    images = [sample.count("i") for sample in MIXED]
    alone = []
    for i, count in enumerate(images):
        one = {k: batch[k][i : i + 1] for k in ("input_ids", "attention_mask", "labels")}
        if count:
            start = sum(images[:i])
            one["pixel_values"] = batch["pixel_values"][start : start + count]
        alone.append(vlm.contrast(one))
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_contrast_switches_dropout_off():
    model = tiny_llava(head_scale=4.0)
    batch = llava_batch(MIXED)
    expected = VLM(model).contrast(batch)
    model.config.text_config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.train()
    assert torch.equal(VLM(model).contrast(batch), expected)
    assert all(m.training for m in model.modules())


def test_no_label_gives_no_delta():
    assert VLM(tiny_llava()).contrast(llava_batch(["tit"])).shape == (0,)


def test_patches_come_image_by_image():
    model, batch = tiny_llava(), llava_batch(["ti", "t", "iti"])
    vlm = VLM(model)
    (hidden,) = vlm.hidden_states(batch, [1])
    assert vlm.patches(batch).grids == ((4, 4),) * 3
    patches = vlm.patches(batch).of(hidden).view(3, TOKENS, 32)
    assert torch.equal(patches[0], hidden[0, 1 : 1 + TOKENS])
    assert torch.equal(patches[1], hidden[2, :TOKENS])
    assert torch.equal(patches[2], hidden[2, TOKENS + 1 : 2 * TOKENS + 1])


def test_tied_embeddings_and_other_dtypes():
    for dtype in (torch.bfloat16, torch.float64):
        vlm = VLM(tiny_llava(tied=True, dtype=dtype))
        delta = vlm.contrast(llava_batch(MIXED, dtype=dtype))
        wide = torch.promote_types(dtype, torch.float32)
        assert delta.dtype == wide and delta.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("labels"), "labels, .* got none"),
        (lambda b: b.update(labels=b["labels"][:, 1:]), "shape of input_ids"),
        (lambda b: b.update(labels=b["input_ids"]), f"image token {IMAGE}"),
    ],
)
def test_bad_labels_are_named(change, message):
    batch = llava_batch(["tityy"])
    change(batch)
    with pytest.raises(ValueError, match=message):
        VLM(tiny_llava()).contrast(batch)


def test_bad_arguments_are_named():
    vlm = VLM(tiny_llava())
    with pytest.raises(ValueError, match=r"layers must lie in 1..3: got 4"):
        vlm.hidden_states(llava_batch(["tiy"]), [4])
    with pytest.raises(ValueError, match="mode must be one of .*: got 'erase'"):
        vlm.contrast(llava_batch(["tiyy"]), "erase")
    with pytest.raises(ValueError, match="no pixel_values"):
        vlm.patches(llava_batch(["ty"]))
    with pytest.raises(TypeError, match="Linear has no get_decoder"):
        fastalign.VLM(torch.nn.Linear(2, 2))


def test_a_text_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    with pytest.raises(TypeError, match="text-only"):
        VLM(LlamaForCausalLM(config))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("blur", lambda pixels: gaussian_blur(pixels, 1.0)),
        ("patch-mask", lambda pixels: patch_mask(pixels, 1.0)),  # every cell, so no chance
    ],
)
def test_corrupted_images_are_a_second_forward_of_the_whole_model(mode, change):
    model = family("llava")
    batch = family_batch("llava", model, samples_for("llava"))
    vlm = VLM(model)
    delta = vlm.contrast(batch, mode, ratio=1.0, sigma=1.0)
    rows, cols, labels = vlm.label_rows(batch)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        with_image = model(**inputs).logits
        inputs["pixel_values"] = change(batch["pixel_values"])
        without = model(**inputs).logits
    after = (vlm.vision_mask(batch).cumsum(1) > 0)[rows, cols]
    expected = (with_image - without)[rows, cols, labels]
    torch.testing.assert_close(delta[after], expected[after], atol=1e-3, rtol=1e-4)
    assert after.any() and delta[after].abs().max() > 1
    assert torch.equal(delta[~after], torch.zeros(int((~after).sum())))


def test_an_unknown_order_of_patches_is_refused():
    vlm, batch = VLM(tiny_llava()), llava_batch(["tiyy"])
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    with pytest.raises(ValueError, match="which order llava lays out"):
        vlm.contrast(batch, "blur")


def test_logits_are_those_of_the_model_where_a_softcap_is_not_applied():
    """Gemma 3 with images leaves its text model's softcap out, as PaliGemma did before 5.23."""
    for name, cap in (("gemma3", 3.0), ("paligemma2", None)):
        model = family(name)
        if cap is not None:
            model.config.text_config.final_logit_softcapping = cap
        batch = family_batch(name, model, samples_for(name))
        vlm = VLM(model)
        rows, cols, labels = vlm.label_rows(batch)
        with torch.no_grad():
            hidden = vlm.forward(batch, labels_only=True).hidden[rows, cols]
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits[rows, cols, labels]
        torch.testing.assert_close(vlm.label_logits(hidden, labels), logits, atol=1e-4, rtol=1e-4)
        assert vlm.softcap == (30.0 if applies_softcap(name) else None)
