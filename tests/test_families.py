"""The contrast of every family of models against transformers' own logits without images.

Everything is in float64 that is float64 throughout: what differs by more than rounding, differs.
"""

import copy
from functools import cache

import pytest
import torch
import transformers
from _masked import dropped_contrast, masked_contrast
from _true64 import Narrow, true_float64
from _versions import applies_softcap
from torch import Tensor

import fastalign as fa
from fastalign.models._stand_in import stand_in_image
from fastalign.testing.families import (
    ENCODER_DECODER,
    FAMILIES,
    RECURRENT,
    family,
    family_batch,
    samples_for,
)

ALL = FAMILIES + RECURRENT
# Where LayerNorm and learned positions leave nothing to widen.
DOUBLE_AS_THEY_ARE = {"blip2", "instructblip_opt"}
TOLERANCE = {"rtol": 0.0, "atol": 1e-12}
MULTIMODAL_POSITIONS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@cache
def setup(name):
    """A float64 model and its mixed batch, which tests share and leave as they are."""
    model = family(name, dtype=torch.float64)
    return model, family_batch(name, model, samples_for(name))


@cache
def oracle(name, contrast):
    with true_float64():
        return contrast(*setup(name))


@cache
def ours(name, **options):
    model, batch = setup(name)
    with true_float64():
        delta = fa.VLM(model).contrast(batch, **options)
    assert delta.dtype == torch.float64
    return delta


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE)


# The models and batches


@pytest.mark.parametrize("name", ALL + ENCODER_DECODER)
def test_a_family_is_the_same_for_the_same_seed(name):
    one, two, other = family(name), family(name), family(name, seed=1)
    assert not one.training
    weights = [list(m.parameters()) for m in (one, two, other)]
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert not torch.equal(one.get_output_embeddings().weight, other.get_output_embeddings().weight)
    text = one.config.get_text_config()
    assert (text.num_hidden_layers, text.hidden_size, text.vocab_size) == (4, 64, 512)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_mixes_kinds(name):
    model, batch = setup(name)
    image = batch["input_ids"] == model.config.image_token_id
    attended, labels = batch["attention_mask"].bool(), batch["labels"]
    assert not (image & (~attended | (labels != -100))).any()
    assert (attended.diff(dim=1).int().sum(1) > 0).sum() == len(image) - 1  # all but one padded
    assert (labels[~attended] == -100).all() and (labels != -100).any(1).sum() >= 3
    assert torch.equal(labels[labels != -100], batch["input_ids"][labels != -100])
    first_image = torch.where(image.any(1), image.int().argmax(1), image.shape[1])
    first_label = (labels != -100).int().argmax(1)
    if "blip" in name or "paligemma" in name:
        assert (first_image == 0).all()
    else:
        assert (~image.any(1)).any() and (first_label < first_image)[image.any(1)].any()
    for value in batch.values():
        assert not value.is_floating_point() or value.dtype == torch.float64


@pytest.mark.parametrize("name", [n for n in ALL if "blip" not in n and "paligemma" not in n])
def test_a_batch_without_an_image_is_text(name):
    model = family(name)
    batch = family_batch(name, model, ["tty", "tyyyy"])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert not fa.VLM(model).contrast(batch, packed=name in FAMILIES).any()


@pytest.mark.parametrize("samples", [["tiy"], ["ity", "tty"], ["iity"], [""]])
def test_images_stand_at_the_front_where_the_family_has_one(samples):
    with pytest.raises(ValueError, match="samples of paligemma must each begin"):
        family_batch("paligemma", family("paligemma"), samples)


def test_unknown_families_are_refused():
    with pytest.raises(ValueError, match="name must be one of .*got 'llama'"):
        family("llama")


# Double precision


@pytest.mark.parametrize("name", ALL)
def test_true_float64_leaves_no_float32(name):
    model, batch = setup(name)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad(), Narrow() as plain:
        model(**inputs, use_cache=False)
    with torch.no_grad(), true_float64(), Narrow() as wide:
        exact = model(**inputs, use_cache=False).logits
    assert not wide.operators
    assert not plain.operators if name in DOUBLE_AS_THEY_ARE else plain.operators
    assert torch.get_default_dtype() == torch.float32
    # The same function as the float32 model, to its rounding.
    narrow = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        rounded = family(name)(**narrow, use_cache=False).logits
    attended = batch["attention_mask"].bool()
    error = (exact[attended] - rounded[attended]).abs().max()
    assert 1e-9 < error < 1e-2


# The oracles


@pytest.mark.parametrize("name", FAMILIES)
def test_hiding_and_dropping_images_agree(name):
    masked, dropped = oracle(name, masked_contrast), oracle(name, dropped_contrast)
    same = masked.active & ~masked.after_image
    assert same.sum() >= 10
    assert_equal(masked.delta[same], dropped.delta[same])
    if name != "mllama":  # whose text without an image attends to all images alike
        assert_equal(masked.delta[~masked.active], dropped.delta[~masked.active])


@pytest.mark.parametrize("name", RECURRENT)
def test_hiding_an_image_does_not_remove_it_from_a_recurrence(name):
    masked, dropped = oracle(name, masked_contrast), oracle(name, dropped_contrast)
    assert (masked.delta - dropped.delta)[masked.active].abs().max() > 0.1


@pytest.mark.parametrize("name", ALL)
def test_contrasts_lie_on_both_sides_of_the_clamps(name):
    found = oracle(name, dropped_contrast)
    delta = found.delta[found.active & found.defined]
    assert delta.min() < 1 < delta.max() and delta.max() > 5
    assert ((delta > 1) & (delta < 5)).any()


def test_dropping_equals_a_llama_written_out():
    model, batch = setup("llava")
    weights = {k: v for k, v in model.model.language_model.named_parameters()}
    head, width = model.lm_head.weight, 16
    image = batch["input_ids"] == model.config.image_token_id
    keep = batch["attention_mask"].bool() & ~image

    def norm(x, name):
        return weights[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    # Half of each head's features turns against the other half.
    position = torch.arange(image.shape[1], dtype=torch.float64)
    turn = position[:, None] * 1e4 ** -(torch.arange(8, dtype=torch.float64) / 8)

    def rotate(x, at):
        a, b = x.split(width // 2, -1)
        cos, sin = turn[at].cos()[:, None], turn[at].sin()[:, None]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(x, name):
        return (x @ weights[name].T).unflatten(-1, (-1, width))

    def logits(sample):
        at = keep[sample].nonzero()[:, 0]
        x = weights["embed_tokens.weight"][batch["input_ids"][sample, at]]
        causal = torch.ones(len(at), len(at)).tril().bool()
        for i in range(4):
            layer, h = f"layers.{i}", norm(x, f"layers.{i}.input_layernorm")
            q = rotate(project(h, f"{layer}.self_attn.q_proj.weight"), at)
            k = rotate(project(h, f"{layer}.self_attn.k_proj.weight"), at)
            v = project(h, f"{layer}.self_attn.v_proj.weight")
            k, v = (y.repeat_interleave(2, 1) for y in (k, v))  # two heads of q to one of k
            scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
            p = scores.masked_fill(~causal, -torch.inf).softmax(-1)
            h = torch.einsum("hqk,khd->qhd", p, v).flatten(1)
            x = x + h @ weights[f"{layer}.self_attn.o_proj.weight"].T
            h = norm(x, f"{layer}.post_attention_layernorm")
            gate, up = (h @ weights[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = (
                x
                + (torch.nn.functional.silu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
            )
        return norm(x, "norm") @ head.T, at

    with torch.no_grad(), true_float64():
        full = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        expected = []
        for row, col in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            without, at = logits(row)
            before, label = int((at <= col).sum()) - 1, batch["labels"][row, col + 1]
            delta = full[row, col, label] - without[before, label]
            expected.append(delta if before >= 0 else torch.zeros_like(delta))
    # The rotary frequencies of transformers are computed in float32: 1e-7 of each angle.
    torch.testing.assert_close(
        oracle("llava", dropped_contrast).delta, torch.stack(expected), rtol=0.0, atol=1e-4
    )


# Our contrast


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("packed", [True, False])
def test_contrast_equals_the_forward_without_images(name, packed):
    expected = oracle(name, dropped_contrast)
    # A label without an image before it has contrast 0 by definition, whatever the model computes.
    wanted = torch.where(expected.active, expected.delta, 0.0)
    assert_equal(ours(name, packed=packed), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_contrast_equals_hidden_images_except_right_after_one(name):
    expected = oracle(name, masked_contrast)
    same = expected.active & ~expected.after_image
    assert_equal(ours(name)[same], expected.delta[same])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_side_stream_gives_the_same_contrast(name):
    assert_equal(ours(name, interleave=True), ours(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_mode_mask_is_the_released_code(name):
    expected, delta = oracle(name, masked_contrast), ours(name, mode="mask")
    assert delta.isfinite().all()
    compared = expected.defined & (expected.active if name == "mllama" else True)
    assert_equal(delta[compared], expected.delta[compared])
    if name in ("llava", "llava_next", "llava_onevision", "mllama"):
        assert (compared & expected.after_image).any()


@pytest.mark.parametrize("name", ALL)
def test_contrast_is_zero_without_an_image_before(name):
    expected = oracle(name, dropped_contrast)
    delta = ours(name, packed=name in FAMILIES)
    assert (delta[~expected.active | ~expected.defined] == 0.0).all()
    assert (delta[expected.active & expected.defined] != 0.0).all()


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_decoders_are_not_packed(name):
    model, batch = setup(name)
    with pytest.raises(ValueError, match="recurrent|convolution"):
        fa.VLM(model).contrast(batch)
    expected = oracle(name, dropped_contrast)
    assert_equal(ours(name, packed=False), torch.where(expected.active, expected.delta, 0.0))


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_encoder_decoders_are_refused(name):
    model = family(name)
    batch = family_batch(name, model, samples_for(name))
    with pytest.raises((TypeError, ValueError), match="encoder-decoder"):
        fa.VLM(model).contrast(batch)


@pytest.mark.parametrize("name", MULTIMODAL_POSITIONS)
def test_multimodal_positions_need_token_types(name):
    model, batch = setup(name)
    batch = {k: v for k, v in batch.items() if k != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        fa.VLM(model).contrast(batch)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_a_softcap_counts_where_the_model_applies_it(name):
    shared, batch = setup(name)
    model = copy.deepcopy(shared)
    # Gemma 3 with images has the setting of its text model and does not read it.
    model.config.text_config.final_logit_softcapping = 5.0
    with true_float64():
        expected = dropped_contrast(model, batch)
        delta = fa.VLM(model).contrast(batch)
    assert (expected.delta - oracle(name, dropped_contrast).delta).any() == applies_softcap(name)
    assert_equal(delta, torch.where(expected.active, expected.delta, 0.0))


@pytest.mark.parametrize("name", ["mllama"])
def test_an_image_token_is_no_label(name):
    model, batch = setup(name)
    labels = torch.where(batch["input_ids"] == 512, 512, batch["labels"])
    with pytest.raises(ValueError, match="labels must not hold"):
        fa.VLM(model).contrast({**batch, "labels": labels})


@pytest.mark.parametrize("name", ALL)
def test_text_after_the_last_label_changes_nothing(name):
    model, batch = setup(name)
    longer = extended(batch, 3)
    padding = longer["attention_mask"] == 0
    longer["input_ids"] = torch.where(padding, 77, longer["input_ids"])
    longer["attention_mask"] = torch.ones_like(padding, dtype=torch.long)
    if "token_type_ids" in batch and "paligemma" in name:  # text after a label is of the suffix
        longer["token_type_ids"] = torch.where(padding, 1, longer["token_type_ids"])
    if "cross_attention_mask" in batch:  # and sees what the text before it sees
        last = batch["attention_mask"].sum(1) - 1
        seen = batch["cross_attention_mask"][torch.arange(len(last)), last]
        cross = longer["cross_attention_mask"]
        longer["cross_attention_mask"] = torch.where(padding[..., None, None], seen[:, None], cross)
    packed = name in FAMILIES
    with true_float64():
        delta = fa.VLM(model).contrast(longer, packed=packed)
    assert_equal(delta, ours(name, packed=packed))


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    model, batch = setup(name)
    packed = name in FAMILIES
    with true_float64():
        delta = fa.VLM(model).contrast(extended(batch, 5), packed=packed)
    assert_equal(delta, ours(name, packed=packed))


def extended(batch, columns):
    """`batch` with columns of padding at its end."""
    b, length = batch["input_ids"].shape

    def longer(key: str, value: Tensor) -> Tensor:
        if value.shape[:2] != (b, length):
            return value
        fill = -100 if key == "labels" else 0
        return torch.cat([value, value.new_full((b, columns, *value.shape[2:]), fill)], 1)

    return {k: longer(k, v) for k, v in batch.items()}


def test_a_sliding_window_counts_the_dropped_tokens():
    """The decoder makes its own window, in the masked forward from places in the full sequence."""
    whole = family("llava", dtype=torch.float64)
    config = whole.config.to_dict()
    text = {"model_type": "mistral", "sliding_window": 6, "layer_types": None}
    config["text_config"] = {**whole.config.text_config.to_dict(), **text}
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config))
    model.double().eval().load_state_dict(whole.state_dict())
    batch = family_batch("llava", model, samples_for("llava"), dtype=torch.float64)
    vlm = fa.VLM(model)
    with true_float64():
        where = masked_contrast(model, batch)
        kept = where.active & where.defined & ~where.after_image
        delta, masked = vlm.contrast(batch), vlm.contrast(batch, mode="mask")
        torch.testing.assert_close(delta[kept], masked[kept], **TOLERANCE)
        # The window hides something.
        assert (delta - fa.VLM(whole).contrast(batch)).abs().max() > 0.1
    with pytest.raises(ValueError, match="packed must be True .* window of 6"):
        vlm.contrast(batch, packed=False)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"mllama"}))
def test_stand_in_image_reaches_what_images_reach(name):
    """Ranks of a sharded model reduce gradients together: the same ones with and without images."""
    model = family(name)
    text = [model.get_decoder(), model.get_output_embeddings()]
    others = {p for module in text for p in module.parameters()}
    reached = []
    for loss in (
        lambda: model(**family_batch(name, model, samples_for(name))).loss,
        lambda: stand_in_image(model),
    ):
        model.zero_grad(set_to_none=True)
        loss().backward()
        named = model.named_parameters()
        reached.append({k for k, p in named if p not in others and p.grad is not None})
    assert reached[0] == reached[1] and reached[0]
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_model_that_cannot_run_an_image_alone_says_so():
    with pytest.raises(ValueError, match="every rank of a sharded Mllama"):
        stand_in_image(family("mllama"))
