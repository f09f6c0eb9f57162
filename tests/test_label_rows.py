"""The last decoder layer on label rows only, and the image-free forward layer by layer."""

import copy

import pytest
import torch

from fastalign import objectives
from fastalign.models import VLM, _rows
from fastalign.testing.families import family, family_batch, samples_for
from fastalign.testing.models import llava_batch, tiny_llava

MIXED = ["ttityyy", "tyyy", "yityiyy", "tttiyyyyty"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def label_states(vlm, batch, **options):
    rows, cols, _ = vlm.label_rows(batch)
    return vlm.forward(batch, **options).hidden[rows, cols]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_label_rows_and_gradients_are_exact(checkpointed):
    model = tiny_llava(dtype=torch.float64).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm, batch = VLM(model), llava_batch(MIXED, dtype=torch.float64)
    found = {}
    for labels_only in (False, True):
        states = label_states(vlm, batch, labels_only=labels_only)
        found[labels_only] = states, gradients(model, states.square().sum())
    # transformers' norms and rotary round to float32, whatever the model's dtype.
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=1e-6)
    assert found[True][1].keys() == found[False][1].keys()
    for name, grad in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], grad, atol=1e-5, rtol=1e-5)


def test_other_rows_are_left_out():
    model, batch = tiny_llava(layers=1), llava_batch(MIXED)
    seen = []
    last = model.get_decoder().layers[-1]
    handle = last.mlp.down_proj.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    vlm = VLM(model)
    labels = len(vlm.label_rows(batch)[0])
    vlm.forward(batch, labels_only=True)
    vlm.forward(batch)
    vlm.forward(batch, [1], labels_only=True)  # somebody wants all rows of the last layer
    handle.remove()
    whole = (*batch["input_ids"].shape, 32)
    assert seen == [(1, labels, 32), whole, whole]


def test_checkpointing_comes_back_and_other_layers_keep_it():
    model, batch = tiny_llava().train(), llava_batch(MIXED)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.get_decoder().layers
    inside = []
    handle = layers[-1].register_forward_pre_hook(
        lambda m, args: inside.append([layer.gradient_checkpointing for layer in layers])
    )
    objectives.sft(VLM(model), batch)["loss"].backward()
    handle.remove()
    assert inside == [[True, True, False]]
    assert all(layer.gradient_checkpointing for layer in layers)


def test_wrapped_layers_run_whole():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, batch = tiny_llava().train(), llava_batch(MIXED)
    expected = gradients(model, objectives.sft(VLM(model), batch)["loss"])
    wrapped = copy.deepcopy(model)
    layers = wrapped.get_decoder().layers
    layers[-1] = checkpoint_wrapper(layers[-1])
    assert _rows.row_parts(layers[-1]) == [] and len(_rows.row_parts(layers[0])) == 3
    found = gradients(wrapped, objectives.sft(VLM(wrapped), batch)["loss"])
    for name, grad in found.items():
        plain = name.replace("_checkpoint_wrapped_module.", "")
        torch.testing.assert_close(grad, expected[plain], atol=1e-5, rtol=1e-4)


def test_labels_that_are_most_rows_are_not_gathered():
    model, batch = tiny_llava(), llava_batch(["t" + 15 * "y"])
    seen = []
    mlp = model.get_decoder().layers[-1].mlp
    handle = mlp.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    VLM(model).forward(batch, labels_only=True)
    handle.remove()
    assert seen == [(1, 16, 32)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_interleaved_contrast_is_bitwise_that_of_its_own_forward(checkpointed):
    model = tiny_llava(head_scale=4.0).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm, batch = VLM(model), llava_batch(MIXED)
    out, delta = vlm.forward_with_contrast(batch, interleave=False)
    expected = gradients(model, out.hidden.square().sum())
    out, interleaved = vlm.forward_with_contrast(batch, interleave=True)
    found = gradients(model, out.hidden.square().sum())
    assert torch.equal(delta, interleaved) and delta.abs().max() > 1
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
    assert all(module.training for module in model.modules())
    unpacked = vlm.contrast(batch, packed=False, interleave=True)
    torch.testing.assert_close(unpacked, delta, atol=1e-4, rtol=1e-4)


def test_interleaving_leaves_the_layers_in_place():
    model, batch = tiny_llava(), llava_batch(MIXED)
    layers = list(model.get_decoder().layers)
    vlm = VLM(model)
    expected = vlm.contrast(batch, interleave=True)
    assert all(a is b for a, b in zip(model.get_decoder().layers, layers, strict=True))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    layers[1].self_attn.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="stopped here"):
        vlm.contrast(batch, interleave=True)
    layers[1].self_attn._forward_pre_hooks.clear()
    assert all(a is b for a, b in zip(model.get_decoder().layers, layers, strict=True))
    assert hooks == [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(vlm.contrast(batch, interleave=True), expected)


def _fail(module, args):
    raise RuntimeError("stopped here")


def test_interleaving_without_an_image_is_a_plain_forward():
    vlm = VLM(tiny_llava())
    assert torch.equal(vlm.contrast(llava_batch(["tyy"]), interleave=True), torch.zeros(2))


def computed_rows(model, run):
    """Rows that the MLP of the first layer computes in each forward of `run`."""
    seen = []
    mlp = model.get_decoder().layers[0].mlp.down_proj
    handle = mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("interleave", [False, True])
def test_tokens_before_the_image_are_not_computed_twice(interleave):
    model = tiny_llava(head_scale=4.0, dtype=torch.float64)
    # The first label follows the image directly: its predictor, the last "t" before it, is needed.
    samples = ["ttttttiyyy", "ttttitty"]
    vlm, batch = VLM(model), llava_batch(samples, dtype=torch.float64)
    rows = computed_rows(model, lambda: vlm.contrast(batch, interleave=interleave))
    # Before the image 5 of 6 and 4 of 4; the last labels predict nothing.
    assert rows == [batch["input_ids"].numel(), 1 + 2 + 2]
    out = vlm.forward(batch)
    whole = computed_rows(model, lambda: vlm.contrast_from(batch, out))
    assert whole == [6 + 2 + 4 + 2]
    torch.testing.assert_close(
        vlm.contrast(batch, interleave=interleave),
        vlm.contrast_from(batch, out),
        atol=1e-5,  # transformers' norms round to float32
        rtol=1e-5,
    )
    assert vlm.contrast(batch).abs().max() > 1


def test_a_short_prefix_is_computed_again():
    model = tiny_llava()
    vlm, batch = VLM(model), llava_batch(["t" + "i" + "t" * 12 + "yy"])
    rows = computed_rows(model, lambda: vlm.contrast(batch))
    assert rows == [batch["input_ids"].numel(), 1 + 12 + 1]


def test_a_prefix_of_other_labels_is_not_taken():
    model = tiny_llava(head_scale=4.0)
    vlm, batch = VLM(model), llava_batch(["ttttttiyyy"])
    out, delta = vlm.forward_with_contrast(batch)
    assert torch.equal(vlm.contrast_from(batch, out), delta)
    later = {**batch, "labels": batch["labels"].clone()}
    later["labels"][0, :-2] = -100  # the last "t" before the image predicts nothing now
    rows = computed_rows(model, lambda: vlm.contrast_from(later, out))
    assert rows == [6 + 2]
    torch.testing.assert_close(vlm.contrast_from(later, out), delta[1:], atol=1e-4, rtol=1e-4)


def test_a_prefix_that_lacks_a_layer_is_not_taken():
    model = tiny_llava(head_scale=4.0)
    vlm, batch = VLM(model), llava_batch(["ttttttiyyy"])
    out, delta = vlm.forward_with_contrast(batch)
    assert computed_rows(model, lambda: vlm.contrast_from(batch, out)) == [1 + 2]
    out.prefix.inputs.popitem()
    assert computed_rows(model, lambda: vlm.contrast_from(batch, out)) == [6 + 2]
    torch.testing.assert_close(vlm.contrast_from(batch, out), delta, atol=1e-4, rtol=1e-4)


def test_layers_left_out_cannot_be_followed():
    model = family("blip2").train()
    model.get_decoder().get_decoder().layerdrop = 1.0  # OPT leaves layers out while it trains
    batch = family_batch("blip2", model, samples_for("blip2"))
    with pytest.raises(RuntimeError, match="left out 4 layer.*set layerdrop to 0"):
        VLM(model).forward_with_contrast(batch, interleave=True)


def test_no_hook_stays_where_a_stand_in_image_cannot_run(monkeypatch):
    model = family("mllama")
    monkeypatch.setattr("fastalign.models._vlm.is_sharded", lambda module: True)
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match="every rank of a sharded Mllama"):
        VLM(model).forward(batch, [1])
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert after == before
