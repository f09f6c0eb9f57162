"""Objectives against plain transformers, against the released CAL, and across micro-batches."""

import pytest
import torch
from torch.nn import functional as F

import fastalign as fa
from fastalign import objectives
from fastalign.objectives import DeepAlignConfig, DeepAlignState, counts, fit_classifier
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

MIXED = ["ttityyy", "tyyy", "yityiyy", "tttiyyyyty"]


def teacher_for(batch, width=5, n=TOKENS):
    generator = torch.Generator().manual_seed(1)
    images = len(batch["pixel_values"])
    return {**batch, "teacher": torch.randn(images, n, width, generator=generator)}


def gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_sft_is_the_loss_of_transformers():
    model, batch = tiny_llava(), llava_batch(MIXED)
    terms = objectives.sft(fa.VLM(model), batch)
    plain = model(**batch).loss
    torch.testing.assert_close(terms["loss"], plain)
    for ours, theirs in zip(gradients(model, terms["loss"]), gradients(model, plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def released_cal(model, batch, alpha=1.0, beta=5.0, eps=1e-6):
    """The released loss, from its description: masked second pass, pooling over the flat batch."""
    ids, labels = batch["input_ids"], batch["labels"]
    image = ids == fa.VLM(model).image_token_id
    hidden = batch["attention_mask"] * ~image
    out = model(**batch, output_hidden_states=True)
    with torch.no_grad():
        embeds = out.hidden_states[0]
        positions = torch.arange(ids.shape[1])[None]
        decoder = model.get_decoder()
        without = decoder(
            inputs_embeds=embeds, attention_mask=hidden, position_ids=positions, use_cache=False
        )[0]
        without = model.get_output_embeddings()(without)[:, :-1].flatten(0, 1)
    logits, target = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    valid = target != -100
    index = target.clamp_min(0)[:, None]
    delta = (logits.detach() - without).gather(1, index)[:, 0]
    clamped = delta.clamp(alpha, beta)[None]
    weights = F.avg_pool1d(clamped, 3, stride=1, padding=1, count_include_pad=False)[0]
    ce = F.cross_entropy(logits[valid], target[valid], reduction="none")
    return (ce * weights[valid]).sum() / (weights[valid].sum() + eps)


def test_official_cal_is_the_released_loss():
    model, batch = tiny_llava(head_scale=4.0), llava_batch(MIXED)
    ours = objectives.cal(fa.VLM(model), batch, compat="official", normalize="official")["loss"]
    theirs = released_cal(model, batch)
    torch.testing.assert_close(ours, theirs)
    assert (ours - objectives.cal(fa.VLM(model), batch)["loss"]).abs() > 1e-3
    for a, b in zip(gradients(model, ours), gradients(model, theirs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_cal_weights_each_label_by_its_contrast():
    model, batch = tiny_llava(head_scale=4.0), llava_batch(["ttityyy", "tiyy"])
    vlm = fa.VLM(model)
    delta = vlm.contrast(batch).clamp(1, 5)
    # Averages over the neighbours that exist, sample by sample: labels 0-2 and 3-4.
    a, b, c, d, e = delta
    weights = torch.stack([(a + b) / 2, (a + b + c) / 3, (b + c) / 2, (d + e) / 2, (d + e) / 2])
    logits = model(**batch).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    ce = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")
    terms = objectives.cal(vlm, batch)
    torch.testing.assert_close(terms["loss"], (weights * ce).sum() / weights.sum())
    torch.testing.assert_close(terms["weight"], weights.mean())
    assert weights.std() > 0.1
    sample = objectives.cal(vlm, batch, normalize="sample")["loss"]
    first = (weights[:3] * ce[:3]).sum() / weights[:3].sum()
    second = (weights[3:] * ce[3:]).sum() / weights[3:].sum()
    torch.testing.assert_close(sample, (first + second) / 2)
    tokens = objectives.cal(vlm, batch, normalize="tokens")["loss"]
    torch.testing.assert_close(tokens, terms["loss"])


def test_without_an_image_cal_is_sft():
    vlm, batch = fa.VLM(tiny_llava()), llava_batch(["tyyy", "ttyyyy"])
    torch.testing.assert_close(
        objectives.cal(vlm, batch)["loss"], objectives.sft(vlm, batch)["loss"]
    )


def deepalign_setup(config=None, samples=("ttityyy", "tiyy", "tyy", "ttityy")):
    model = tiny_llava()
    adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(1, 2), shift_hidden_dim=6))
    torch.manual_seed(0)
    with torch.no_grad():
        for shift in adapter.shifts.values():
            shift.conv2.weight.normal_(0, 0.1)
    vlm = fa.VLM(model)
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    state = DeepAlignState(vlm, config or DeepAlignConfig())
    report = fit_classifier(
        state, vlm, [llava_batch(["ttity", "tiyy"] * 8, seed=s) for s in (1, 2)]
    )
    return vlm, state, teacher_for(llava_batch(list(samples))), report


def test_deepalign_is_the_weighted_sum_of_its_terms():
    config = DeepAlignConfig(alpha=0.5, beta=2.0, gamma=0.25, mu=3.0)
    vlm, state, batch, report = deepalign_setup(config)
    vlm.model.train()
    terms = objectives.deepalign(vlm, batch, state=state)
    expected = terms["ce"] + 0.5 * terms["global"] + 2.0 * terms["instance"]
    expected = expected + 0.25 * terms["mutual"] + 3.0 * terms["visual"]
    torch.testing.assert_close(terms["loss"], expected)
    assert report.accuracy == 1.0 and report.warning is None
    assert all(terms[name] != 0 for name in ("global", "instance", "mutual", "visual"))
    assert all(g.abs().sum() > 0 for g in gradients(vlm.model, terms["loss"]))


def test_deepalign_terms_are_the_published_formulas():
    vlm, state, batch, _ = deepalign_setup(DeepAlignConfig(layers=(1, 2, 3)))
    vlm.model.train()
    direction, seen = state.direction.value, state.direction.count.clone()
    terms = objectives.deepalign(vlm, batch, state=state)
    rows = [0, 1, 3]  # the samples with image and text
    with torch.no_grad():
        shifted = [h[rows] for h in vlm.hidden_states(batch)]
        with fa.adapters.disabled(vlm.model):
            base = [h[rows] for h in vlm.hidden_states(batch)]
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    image = ids == vlm.image_token_id
    positions = torch.arange(ids.shape[1])
    last_v = (image * positions).argmax(1)
    last_t = ((mask.bool() & ~image) * positions).argmax(1)
    each = torch.arange(3)
    h_v = torch.stack([h[each, last_v] for h in base]).mean(0)
    h_t = torch.stack([h[each, last_t] for h in base]).mean(0)
    moved = torch.stack([h[each, last_v] for h in shifted]).mean(0) - h_v

    def specific(h, label):
        h = h.clone().requires_grad_()
        (w,) = torch.autograd.grad(state.classifier(h)[:, label].sum(), h)
        u = w * h
        return (u * (h.square().sum(-1) / u.square().sum(-1)).sqrt()[:, None]).detach()

    instance = specific(h_t, 0) - specific(h_v, 1)
    expected = 1 - F.cosine_similarity(moved, instance)
    torch.testing.assert_close(terms["instance"], expected.mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["cos_instance"], 1 - expected.mean(), atol=1e-4, rtol=1e-4)
    expected = 1 - F.cosine_similarity(moved, direction[None])
    torch.testing.assert_close(terms["global"], expected.mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["cos_global"], 1 - expected.mean(), atol=1e-4, rtol=1e-4)
    after = (seen * direction + instance.sum(0)) / (seen + 3)
    torch.testing.assert_close(state.direction.value, after, atol=1e-5, rtol=1e-4)
    patches = vlm.patches(batch).of(vlm.hidden_states(batch, [1])[0])
    student = F.normalize(patches.unflatten(0, (-1, TOKENS)), dim=-1)
    teacher = F.normalize(batch["teacher"], dim=-1)
    visual = F.mse_loss(student @ student.mT, teacher @ teacher.mT)
    torch.testing.assert_close(terms["visual"], visual.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("without", "gone"),
    [
        (("intervention",), {"global", "instance", "mutual"}),
        (("distillation",), {"visual"}),
        (("global",), {"global"}),
        (("mutual",), {"mutual"}),
        (("instance", "global"), {"global", "instance"}),
        (("intervention", "distillation"), {"global", "instance", "mutual", "visual"}),
    ],
)
def test_every_term_can_be_switched_off(without, gone):
    vlm, state, batch, _ = deepalign_setup(DeepAlignConfig(without=without))
    terms = objectives.deepalign(vlm, batch, state=state)
    assert {"global", "instance", "mutual", "visual"} - set(terms) == gone
    cosines = {"cos_global", "cos_instance"}
    assert cosines & set(terms) == (set() if "intervention" in without else cosines)
    summed = ("ce", "global", "instance", "mutual", "visual")
    expected = sum((terms[k] for k in summed if k in terms), torch.zeros(()))
    torch.testing.assert_close(terms["loss"], expected)


def test_evaluation_leaves_the_global_direction():
    vlm, state, batch, _ = deepalign_setup()
    vlm.model.train()
    objectives.deepalign(vlm, batch, state=state)
    before = state.direction.value.clone()
    vlm.model.eval()
    objectives.deepalign(vlm, batch, state=state)
    assert torch.equal(state.direction.value, before) and before.abs().sum() > 0


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
def test_every_option_gives_a_finite_loss(pool, kind, estimator):
    config = DeepAlignConfig(pool=pool, kind=kind, estimator=estimator, student_layers=(1, 3))
    vlm, state, batch, _ = deepalign_setup(config)
    terms = objectives.deepalign(vlm, batch, state=state)
    assert all(value.isfinite() for value in terms.values())
    assert all(g.isfinite().all() for g in gradients(vlm.model, terms["loss"]))


def test_the_teachers_grid_is_resampled_or_refused():
    vlm, state, batch, _ = deepalign_setup()
    coarse = teacher_for(batch, n=4)
    assert objectives.deepalign(vlm, coarse, state=state)["visual"] > 0
    batch.pop("teacher")
    with pytest.raises(ValueError, match="needs teacher features"):
        objectives.deepalign(vlm, batch, state=state)
    state._teacher = [lambda b: torch.ones(len(b["pixel_values"]), TOKENS, 2)]
    assert objectives.deepalign(vlm, batch, state=state)["visual"] > 0


def test_batches_without_pairs_images_or_labels():
    vlm, state, _, _ = deepalign_setup()
    vlm.model.train()
    text = objectives.deepalign(vlm, llava_batch(["tyy", "tyyy"]), state=state)
    torch.testing.assert_close(text["loss"], text["ce"])
    assert text["global"] == text["visual"] == 0
    batch = teacher_for(llava_batch(["i", "i"]))
    images = objectives.deepalign(vlm, batch, state=state)
    torch.testing.assert_close(images["loss"], images["visual"])
    for objective in (objectives.sft, objectives.cal):
        terms = objective(vlm, llava_batch(["tit", "tt"]))
        assert terms["loss"] == 0
        terms["loss"].backward()
    one = objectives.deepalign(vlm, teacher_for(llava_batch(["tiy"])), state=state)
    assert one["loss"].isfinite()


@pytest.mark.parametrize("name", ["sft", "cal", "tokens", "sample", "deepalign"])
def test_micro_batches_add_up_to_one_batch(name):
    """Shares of 1 x 4, 2 x 2 and 4 x 1 samples give one loss and one gradient."""
    # Without mutual_shares, which tests/test_divisions.py has, the mutual term goes by the batch.
    vlm, state, _, _ = deepalign_setup(DeepAlignConfig(without=("mutual",)))
    samples = ["ttityyy", "tiyyyyyyy", "tyy", "ttityy"]
    whole = teacher_for(llava_batch(samples))
    if name == "deepalign":
        objective = lambda b, t: objectives.deepalign(vlm, b, state=state, totals=t)
    elif name == "sft":
        objective = lambda b, t: objectives.sft(vlm, b, totals=t)
    else:
        normalize = "mean" if name == "cal" else name
        objective = lambda b, t: objectives.cal(vlm, b, normalize=normalize, totals=t)
    totals = counts(vlm, whole)
    results = []
    for size in (4, 2, 1):
        parts = [split(whole, samples, i, i + size) for i in range(0, 4, size)]
        terms = [objective(part, totals) for part in parts]
        weight = sum(t.get("weight_sum", torch.zeros(())) for t in terms) or 1.0
        loss = sum(t["loss"] for t in terms) / weight
        results.append((loss, gradients(vlm.model, loss)))
    # "tokens" scales weights within the micro-batch: near, by design, not equal.
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if name != "tokens" else {"atol": 0.1, "rtol": 0.1}
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], **tolerance)
        if name != "tokens":
            for a, b in zip(found, results[0][1], strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def split(batch, samples, start, stop):
    part = {k: batch[k][start:stop] for k in ("input_ids", "attention_mask", "labels")}
    first = sum(s.count("i") for s in samples[:start])
    images = sum(s.count("i") for s in samples[start:stop])
    if images:
        for name in ("pixel_values", "teacher"):
            part[name] = batch[name][first : first + images]
    return part


def test_a_weak_classifier_is_reported(monkeypatch):
    """Vision and text that cannot be told apart: accuracy near one half, and a warning."""
    vlm, state, _, _ = deepalign_setup()
    noise = torch.randn(2, 64, vlm.hidden_size, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(objectives._classifier, "representations", lambda *_: noise.unbind())
    report = fit_classifier(state, vlm, [llava_batch(["ti"])])
    assert report.accuracy < 0.9 and "below 90 %" in report.warning


def test_bad_options_are_named():
    vlm, batch = fa.VLM(tiny_llava()), llava_batch(["tiyy"])
    with pytest.raises(ValueError, match="normalize must be one of .*'batch'"):
        objectives.cal(vlm, batch, normalize="batch")
    with pytest.raises(ValueError, match="without must name terms of .*'shift'"):
        DeepAlignConfig(without=("shift",))
    with pytest.raises(ValueError, match='pool must be "last" or "mean"'):
        DeepAlignConfig(pool="max")
    state = DeepAlignState(vlm)
    with pytest.raises(ValueError, match="at least 5 image-text pairs: got 2"):
        fit_classifier(state, vlm, [llava_batch(["tit", "tit"])])
    with pytest.raises(ValueError, match="image-text pairs: got none"):
        fit_classifier(state, vlm, [])
    with pytest.raises(ValueError, match="must have an adapter: got none"):
        objectives.deepalign(vlm, teacher_for(batch), state=state)
