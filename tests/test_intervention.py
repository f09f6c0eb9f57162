"""DeepAlign's intervention: which tokens are pooled, directions over steps, judging, channels."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastalign as fa
from fastalign import objectives
from fastalign.losses import mutual_information
from fastalign.nn import ShiftDirection
from fastalign.objectives import (
    DeepAlignConfig,
    DeepAlignState,
    classifier_accuracy,
    counts,
    fit_classifier,
)
from fastalign.objectives._intervention import pooled, representations
from fastalign.testing.families import family, family_batch, samples_for
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

# Image in front, in the middle, last, two of them, none, no text; the longest is not padded.
KINDS = ["itt", "ttityy", "tyi", "titityyyy", "tyyy", "i"]
FIT = [["ttity", "tiyy"] * 8, ["titt", "ttiyy"] * 8]


def adapted(config=None, *, dtype=torch.float32, layers=3, trained=False, fit=True):
    """A tiny LLaVA with a fresh or moved adapter, and a fitted state."""
    model = tiny_llava(dtype=dtype, layers=layers)
    torch.manual_seed(0)
    adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(1, 2), shift_hidden_dim=6))
    model.requires_grad_(False)
    adapter.float().requires_grad_(True)
    if trained:
        move(adapter)
    vlm = fa.VLM(model)
    config = config or DeepAlignConfig(without=("distillation",))
    state = DeepAlignState(vlm, config)
    if fit:
        fit_classifier(state, vlm, [llava_batch(s, seed=1, dtype=dtype) for s in FIT])
    model.train()
    return vlm, adapter, state


def move(adapter):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for shift in adapter.shifts.values():
            weight = shift.conv2.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def places(vlm, batch):
    """Last image token and last text token of each sample, read off the ids one by one."""
    found = []
    for ids, mask in zip(
        batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True
    ):
        image = [j for j, token in enumerate(ids) if token == vlm.image_token_id]
        text = [j for j, t in enumerate(ids) if mask[j] and t != vlm.image_token_id]
        found.append((image, text))
    return found


# -- pooling ---------------------------------------------------------------------------------------


def test_the_last_token_of_each_modality():
    vlm, batch = fa.VLM(tiny_llava()), llava_batch(KINDS)
    h_v, h_t = representations(vlm, batch, (1, 3), "last")
    with torch.no_grad():
        states = [vlm.hidden_states(batch)[k - 1] for k in (1, 3)]
    expected = [
        [torch.stack([h[i, column[-1]] for h in states]).mean(0) for column in columns]
        for i, columns in enumerate(places(vlm, batch)) if all(columns)
    ]  # fmt: skip
    assert len(expected) == 4  # not the text and not the image alone
    torch.testing.assert_close(h_v, torch.stack([v for v, _ in expected]))
    torch.testing.assert_close(h_t, torch.stack([t for _, t in expected]))
    # "titityyyy": its last image token belongs to the second image.
    assert places(vlm, batch)[3][0][-1] == 1 + 2 * TOKENS


def test_the_mean_over_the_tokens_of_each_modality():
    vlm, batch = fa.VLM(tiny_llava()), llava_batch(KINDS)
    h_v, h_t = representations(vlm, batch, (2,), "mean")
    with torch.no_grad():
        (hidden,) = vlm.hidden_states(batch, (2,))
    columns = [(i, *c) for i, c in enumerate(places(vlm, batch)) if all(c)]
    torch.testing.assert_close(h_v, torch.stack([hidden[i, v].mean(0) for i, v, _ in columns]))
    torch.testing.assert_close(h_t, torch.stack([hidden[i, t].mean(0) for i, _, t in columns]))


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pooling_is_float32_also_under_autocast(pool, dtype):
    hidden = [torch.randn(2, 5, 4).to(dtype), torch.randn(2, 5, 4).to(dtype)]
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    with torch.autocast("cpu", torch.bfloat16):
        found = pooled(hidden, mask, pool)
    rows = ([2, 3] if pool == "last" else [0, 2, 3]), [1]
    rows = ([3] if pool == "last" else rows[0], rows[1])
    wide = torch.stack(hidden).double().mean(0)
    expected = torch.stack([wide[i, r].mean(0) for i, r in enumerate(rows)]).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_last_keeps_no_copy_of_a_layer_for_the_backward():
    hidden = torch.randn(2, 50, 8, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, 50, dtype=torch.bool)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pooled([hidden], mask, "last").sum().backward()
    assert all(t.numel() < 2 * 50 for t in saved)
    expected = torch.zeros_like(hidden)
    expected[:, -1] = 1
    assert torch.equal(hidden.grad, expected)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_sample_without_the_modality_is_zero_with_gradient_zero(pool):
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[False] * 3, [True, False, False]])
    found = pooled([hidden], mask, pool)
    found.sum().backward()
    assert torch.equal(found[0], torch.zeros(4))
    assert not hidden.grad[0].any() and torch.equal(hidden.grad[1, 0], torch.ones(4))


def test_layers_are_the_first_fifth_unless_named():
    chosen = {
        layers: DeepAlignState(fa.VLM(tiny_llava(layers=layers))).layers for layers in (1, 4, 9, 10)
    }
    assert chosen == {1: (1,), 4: (1,), 9: (1,), 10: (1, 2)}
    vlm = fa.VLM(tiny_llava())
    assert DeepAlignState(vlm, DeepAlignConfig(layers=(2, 3))).layers == (2, 3)


def test_representations_of_the_base_have_no_dropout_and_leave_the_mode():
    vlm, _, _ = adapted()
    vlm.model.config.get_text_config().attention_dropout = 0.5
    for module in vlm.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    batch = llava_batch(["ttityy", "tiyy"])
    first, second = (representations(vlm, batch, (3,), "last")[1] for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert vlm.model.training and vlm.layers[0].self_attn.training


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "paligemma2", "blip2"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_the_pass_of_a_step_gives_the_same_vectors(name, pool):
    """It computes the deepest layer for the pooled rows only."""
    model = family(name)
    fa.attach(model, fa.AdapterConfig(shift_layers=(1,), shift_hidden_dim=4))
    vlm, batch = fa.VLM(model), family_batch(name, model, samples_for(name))
    state = DeepAlignState(vlm, DeepAlignConfig(layers=(1, 2), pool=pool))
    pair, *masks = objectives._terms.pair_masks(vlm, batch)
    found = objectives._intervention.base_vectors(vlm, batch, state, tuple(masks))
    expected = representations(vlm, batch, state.layers, pool)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[pair], theirs, atol=1e-4, rtol=1e-4)
        assert ours.dtype == torch.float32 and ours.abs().sum() > 0


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("term", ["global", "instance", "mutual"])
def test_each_term_alone_moves_a_fresh_adapter(term, kind, dtype):
    """The displacement is exactly 0 then, where a plain cosine has no gradient."""
    others = {"global", "instance", "mutual", "distillation"} - {term}
    config = DeepAlignConfig(without=tuple(sorted(others)), kind=kind)
    vlm, adapter, state = adapted(config, dtype=dtype)
    # Without labels, so that nothing else has a gradient.
    batch = llava_batch(["ttitttt", "titt", "ttt", "tittt"], dtype=dtype)
    parameters = [shift.conv2.weight for shift in adapter.shifts.values()]
    terms = objectives.deepalign(vlm, batch, state=state)
    rounding = 1e-3 if dtype == torch.float32 else 0.2  # of the base's pruned layer
    assert abs(terms["cos_global"]) < rounding and abs(terms["cos_instance"]) < rounding
    if term == "mutual" or kind == "cosine":
        assert abs(terms[term] - (0.0 if term == "mutual" else 1.0)) < rounding
    for gradient in torch.autograd.grad(terms["loss"], parameters):
        assert gradient.isfinite().all() and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_training_turns_the_displacement_towards_the_direction(kind):
    config = DeepAlignConfig(without=("distillation", "mutual", "instance"), kind=kind)
    vlm, adapter, state = adapted(config)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    batch = llava_batch(["ttitttt", "titt", "tittt"])
    history = []
    for _ in range(30):
        terms = objectives.deepalign(vlm, batch, state=state)
        history.append(terms)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert history[-1]["cos_global"] > 0.3 and history[-1]["loss"] < 0.9 * history[0]["loss"]


# -- the global direction --------------------------------------------------------------------------


def test_the_direction_starts_with_the_pairs_of_the_classifier():
    vlm, _, state = adapted()
    pairs = sum(map(len, FIT))
    assert state.direction.count == pairs
    found = [representations(vlm, llava_batch(s, seed=1), state.layers, "last") for s in FIT]
    h_v, h_t = (torch.cat(side) for side in zip(*found, strict=True))  # the adapter is fresh
    expected = objectives._intervention.instance_direction(state.classifier, h_v, h_t).mean(0)
    torch.testing.assert_close(state.direction.value, expected, atol=1e-4, rtol=1e-4)


def test_a_step_is_pulled_along_the_direction_before_it_however_divided():
    """1 x 4, 2 x 2 and 4 x 1 samples: the same terms, the same direction afterwards."""
    samples = ["ttityyy", "tiyyyyyyy", "tyy", "ttityy"]
    results = []
    for size in (4, 2, 1):
        config = DeepAlignConfig(without=("distillation", "mutual"))
        vlm, _, state = adapted(config, trained=True)
        before = state.direction.value
        for seed in (0, 1):
            whole = llava_batch(samples, seed=seed)
            totals, sums = counts(vlm, whole), {}
            for start in range(0, 4, size):
                part = one_part(whole, samples, start, start + size)
                assert torch.equal(state.direction.value, before) or seed
                for name, value in objectives.deepalign(
                    vlm, part, state=state, totals=totals
                ).items():
                    sums[name] = sums.get(name, 0) + value.detach()
            assert not state.direction.pending.any()
        assert state.direction.count == sum(map(len, FIT)) + 6
        results.append((sums, state.direction.mean))
        assert (state.direction.value - before).abs().max() > 1e-3
    for sums, mean in results[1:]:
        torch.testing.assert_close(mean, results[0][1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(sums, results[0][0], atol=1e-5, rtol=1e-5)


def one_part(batch, samples, start, stop):
    part = {k: batch[k][start:stop] for k in ("input_ids", "attention_mask", "labels")}
    first = sum(s.count("i") for s in samples[:start])
    images = sum(s.count("i") for s in samples[start:stop])
    if images:
        part["pixel_values"] = batch["pixel_values"][first : first + images]
    return part


def test_rows_wait_for_their_step():
    # Steps of 3 pairs: means 2, then (6 + 12) / 6 = 3. A row outside the mask is no pair.
    direction = ShiftDirection(1)
    for row in (1.0, 2.0):
        direction.update(torch.tensor([[row]]), step_pairs=3)
        assert direction.value == 0 and direction.count == 0
    rows, mask = torch.tensor([[3.0], [9.0]]), torch.tensor([True, False])
    direction.update(rows, mask=mask, step_pairs=torch.tensor(3.0))
    assert direction.value == 2 and direction.count == 3
    # A row that is not finite counts towards the step, and not in the mean.
    direction.update(torch.tensor([[5.0], [math.inf]]), step_pairs=3)
    assert direction.value == 2
    direction.update(torch.tensor([[7.0]]), step_pairs=3)
    assert direction.value == (6 + 12) / 5 and direction.count == 5
    direction.restart(torch.tensor([[1.0], [math.nan], [4.0]]))
    assert direction.value == 2.5 and direction.count == 2


def test_what_waits_is_no_part_of_a_checkpoint_and_stays_float64():
    direction = ShiftDirection(2).bfloat16()
    direction.update(torch.ones(1, 2), step_pairs=2)
    assert set(direction.state_dict()) == {"mean", "count"}
    assert direction.pending.dtype == direction.mean.dtype == torch.float64


# -- batches of every kind -------------------------------------------------------------------------


def test_samples_without_a_pair_change_nothing():
    vlm, _, state = adapted(trained=True)
    vlm.model.eval()
    pairs = [s for s in KINDS if s not in ("tyyy", "i")]
    batch = llava_batch(pairs)
    mixed = llava_batch([*pairs, "tyyy", "i"])
    # Pixels follow the text in the generator: the same ones for the same images.
    mixed["input_ids"][:4, : batch["input_ids"].shape[1]] = batch["input_ids"]
    mixed["pixel_values"][:5] = batch["pixel_values"]
    alone, beside = (objectives.deepalign(vlm, b, state=state) for b in (batch, mixed))
    for name in ("global", "instance", "mutual", "cos_global", "cos_instance"):
        torch.testing.assert_close(beside[name], alone[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", ["deepalign", "sft", "cal"])
def test_text_alone_has_a_backward(objective):
    """Nothing that is trained takes part in it, and other ranks may wait for its gradient."""
    vlm, adapter, state = adapted()
    run = getattr(objectives, objective)
    options = {"state": state} if objective == "deepalign" else {}
    terms = run(vlm, llava_batch(["tyy", "tyyy"]), **options)
    terms["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in adapter.parameters())
    assert any(p.grad is not None for p in adapter.parameters())


def test_the_classifier_takes_the_first_pairs_and_no_others():
    config = DeepAlignConfig(classifier_pairs=10, without=("distillation",))
    vlm, _, state = adapted(config, fit=False)
    report = fit_classifier(state, vlm, [llava_batch(s, seed=1) for s in FIT])
    assert (report.train_pairs, report.heldout_pairs) == (8, 2)
    assert state.direction.count == 10


# -- mutual information over a mask ----------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["infonce", "gaussian"])
@pytest.mark.parametrize("kept", [[0, 2, 3, 5, 6], [4], []])
def test_a_mask_is_a_selection(estimator, kept):
    x, y = torch.randn(2, 7, 3, dtype=torch.float64)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[kept] = True
    x[~mask] = math.nan
    x.requires_grad_()
    y.requires_grad_()
    found = mutual_information(x, y, estimator=estimator, mask=mask)
    gradients = torch.autograd.grad(found, (x, y))
    expected = torch.zeros((), dtype=torch.float64)
    if kept:
        expected = mutual_information(x[kept], y[kept], estimator=estimator)
        wanted = torch.autograd.grad(expected, (x, y))
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a[kept], b[kept])
            assert not a[~mask].any()
    torch.testing.assert_close(found, expected)


def test_a_mask_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"mask must have the shape \(m,\)"):
        mutual_information(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3).bool())


# -- before and after ------------------------------------------------------------------------------


def test_classifier_accuracy_before_and_after():
    vlm, adapter, state = adapted()
    vlm.model.eval()
    batches = [llava_batch(s, seed=5) for s in FIT]
    same = classifier_accuracy(state, vlm, batches)
    assert same.before == same.after and same.pairs == 32 and same.before.accuracy > 0.9
    # The vision vectors now are where text is: the classifier takes them for text.
    original = objectives._classifier.representations

    def aligned(vlm, *rest):
        h_v, h_t = original(vlm, *rest)
        return (h_t, h_t) if adapter.enabled else (h_v, h_t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives._classifier, "representations", aligned)
        moved = classifier_accuracy(state, vlm, batches)
    assert moved.before == same.before
    assert moved.after.vision == 1 - moved.after.text and moved.after.accuracy == 0.5
    assert moved.after.margin == pytest.approx(0.0, abs=1e-5) and moved.before.margin > 0
    h_v, h_t = representations(vlm, batches[0], state.layers, "last")
    by_hand = []
    for batch in batches:
        h_v, h_t = representations(vlm, batch, state.layers, "last")
        with torch.no_grad():
            text, vision = state.classifier(h_t), state.classifier(h_v)
        by_hand += [text[:, 0] - text[:, 1], vision[:, 1] - vision[:, 0]]
    assert same.before.margin == pytest.approx(float(torch.cat(by_hand).mean()), rel=1e-5)


def test_only_the_held_out_pairs_are_judged(monkeypatch):
    vlm, _, state = adapted(fit=False)
    batches = [llava_batch(["tity", "tiy", "tyy"], seed=s) for s in range(5)]  # 10 pairs
    report = fit_classifier(state, vlm, batches, heldout=0.3)
    assert (report.train_pairs, report.heldout_pairs) == (7, 3)
    seen = []
    original = objectives._classifier.representations
    monkeypatch.setattr(
        objectives._classifier,
        "representations",
        lambda vlm, batch, *rest: seen.append(batch) or original(vlm, batch, *rest),
    )
    judged = classifier_accuracy(state, vlm, [*batches, llava_batch(["tity"])], report=report)
    assert judged.pairs == 3
    assert [b is batches[3] or b is batches[4] for b in seen] == [True] * 4
    with pytest.raises(ValueError, match="image-text pairs: got none"):
        classifier_accuracy(state, vlm, [llava_batch(["tyy"])])


# -- two ranks -------------------------------------------------------------------------------------

RANK = """
import os
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import test_intervention as tests
from fastalign import objectives

folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
tests.joint_step(folder, rank)
dist.barrier()
dist.destroy_process_group()
# What follows is the interpreter's teardown, in which torch's threads now and then abort.
os._exit(0)
"""
SPLITS = {"pairs on both": 2, "pairs on one": 3}
RANKED = ["ttityyy", "tiyyyyyyy", "titityy", "tyyy"]


def joint_step(folder, rank):
    """What one step gives on this rank, its gradients averaged as DDP does; all rows for None."""
    torch.manual_seed(0)
    found = {}
    for name, cut in SPLITS.items():
        vlm, adapter, state = adapted(trained=True)
        whole = llava_batch(RANKED)
        bounds = {None: (0, 4), 0: (0, cut), 1: (cut, 4)}[rank]
        part = one_part(whole, RANKED, *bounds)
        ranks = 1 if rank is None else 2
        terms = objectives.deepalign(vlm, part, state=state, totals=counts(vlm, whole))
        (terms["loss"] * ranks).backward()
        gradients = []
        for parameter in adapter.parameters():
            gradient = parameter.grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient / ranks
            if rank is not None:
                torch.distributed.all_reduce(gradient)
            gradients.append(gradient)
        values = torch.stack([terms[n].detach() for n in sorted(terms)])
        if rank is not None:
            torch.distributed.all_reduce(values)
        found[name] = [values, gradients, state.direction.mean, state.direction.count]
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_ranks_are_one_batch(tmp_path):
    """Terms, the mutual one included, gradients and direction; also with a rank without images."""
    joint_step(tmp_path, None)
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank), here])
        for rank in range(2)
    ]
    assert [process.wait(timeout=180) for process in ranks] == [0, 0]
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in (None, 0, 1)
    )
    for name in SPLITS:
        torch.testing.assert_close(first[name], one[name], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(second[name], first[name], atol=0.0, rtol=0.0)


# -- figures ---------------------------------------------------------------------------------------


def test_modality_channels_by_hand(monkeypatch):
    """A linear classifier whose weights are known: w is its row, whatever h is."""
    from fastalign import diagnostics

    config = DeepAlignConfig(classifier_hidden_dims=(), without=("distillation",))
    vlm, _, state = adapted(config, fit=False)
    text, vision = (torch.zeros(32) for _ in range(2))
    text[:3], vision[2:4] = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 2.0])
    with torch.no_grad():
        state.classifier.layers[0].weight.copy_(torch.stack([text, vision]))
    h_v, h_t = torch.ones(2, 32), torch.ones(2, 32)
    h_t[1, 0] = 0.0  # energies 9 1 4 and 0 1 4: shares (9, 1, 4) / 14 and (0, 1, 4) / 5
    monkeypatch.setattr(diagnostics._intervention, "representations", lambda *_: (h_v, h_t))
    found = diagnostics.modality_channels(state, vlm, [llava_batch(["ti", "ti"])], top=2)
    assert found.pairs == 2 and found.text.top == [2, 0]
    assert found.text.mean[:4].tolist() == pytest.approx([9 / 28, 19 / 140, 19 / 35, 0.0])
    assert found.text.spread[:2].tolist() == pytest.approx([9 / 28, 9 / 140])
    assert (found.text.half, found.text.ninety) == (1, 3)
    # Vision: 1/5 and 4/5.
    assert found.vision.top == [3, 2] and found.overlap == 0.5
    assert (found.vision.half, found.vision.ninety) == (1, 2)
    assert found.vision.mean[2:4].tolist() == pytest.approx([0.2, 0.8])
    assert found.vision.spread.abs().max() == pytest.approx(0.0, abs=1e-12)


def test_modality_channels_are_those_of_the_base():
    from fastalign import diagnostics

    vlm, adapter, state = adapted()
    batches = [llava_batch(KINDS, seed=s) for s in range(2)]
    fresh = diagnostics.modality_channels(state, vlm, batches, top=5)
    move(adapter)
    moved = diagnostics.modality_channels(state, vlm, batches, top=5)
    assert torch.equal(fresh.text.mean, moved.text.mean) and fresh.pairs == 8
    for energy in (fresh.text, fresh.vision):
        assert float(energy.mean.sum()) == pytest.approx(1.0) and len(energy.top) == 5
        assert 1 <= energy.half <= energy.ninety <= 32
        held = energy.mean.sort(descending=True).values.cumsum(0)
        assert held[energy.half - 1] >= 0.5 > (held[energy.half - 2] if energy.half > 1 else 0)
    with pytest.raises(ValueError, match=r"top must lie in 1\.\.32"):
        diagnostics.modality_channels(state, vlm, batches, top=33)
    with pytest.raises(ValueError, match="image-text pairs: got none"):
        diagnostics.modality_channels(state, vlm, [llava_batch(["tyy"])])


def test_figures_of_the_intervention(tmp_path):
    pytest.importorskip("matplotlib")
    from fastalign import diagnostics

    vlm, _, state = adapted()
    channels = diagnostics.modality_channels(state, vlm, [llava_batch(KINDS)], top=5)
    figure = diagnostics.plot_modality_channels(channels)
    text, vision, sums = figure.axes
    heights = [100 * float(channels.text.mean[c]) for c in channels.text.top]
    assert [bar.get_height() for bar in text.patches] == pytest.approx(heights)
    assert [label.get_text() for label in vision.get_xticklabels()] == [
        str(c) for c in channels.vision.top
    ]
    assert all(line.get_ydata()[-1] == pytest.approx(100.0) for line in sums.lines)
    diagnostics.save_figure(figure, tmp_path / "channels.png")
    curves = {
        "run": {"step": [1, 2, 3], "cos_global": [0, 0.5, 0.7], "cos_instance": [0, 0.2, 0.3]}
    }
    figure = diagnostics.plot_shift_alignment(curves)
    lines = figure.axes[0].lines[1:]
    assert [list(line.get_ydata()) for line in lines] == [[0, 0.5, 0.7], [0, 0.2, 0.3]]
    diagnostics.save_figure(figure, tmp_path / "alignment.png")
    with pytest.raises(ValueError, match="'other' has no cos_global"):
        diagnostics.plot_shift_alignment({"other": {"step": [1], "loss": [1.0]}})


# -- compiled --------------------------------------------------------------------------------------


def test_the_intervention_is_one_graph(monkeypatch):
    """Given the forwards, nothing in it depends on what the batch holds or waits for the device."""
    vlm, _, state = adapted(trained=True)
    batch = llava_batch(["ttityy", "tiyy", "tyy"])
    out = vlm.forward(batch, state.layers)
    with fa.adapters.disabled(vlm.model), torch.no_grad():
        base = vlm.hidden_states(batch, state.layers)
    monkeypatch.setattr(vlm, "hidden_states", lambda *_: base)  # this is compiled elsewhere

    def step(batch):
        return objectives._intervention.intervention(vlm, batch, out, state, None)

    direction = state.direction.mean.clone()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")(batch)
    after = state.direction.mean.clone()
    state.direction.mean.copy_(direction)
    state.direction.count -= 2
    plain = step(batch)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(after, state.direction.mean)
    cosine = F.cosine_similarity(after, direction, dim=0)
    assert cosine < 1.0 and not torch.equal(after, direction)
