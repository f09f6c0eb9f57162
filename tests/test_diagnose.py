"""Diagnostics of the papers, against sums done otherwise and against transformers' own states."""

import copy
import json
import math
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from _processors import PROCESSORS
from PIL import Image
from sklearn import manifold
from torch.nn import functional as F

from fastalign import VLM, AdapterConfig, attach, diagnostics
from fastalign.commands.pictures import prompt_of
from fastalign.data import Collator, Record, Turn, parse_record, plain_template
from fastalign.diagnostics import _attention, _documents, _intervals, _perplexity, _words
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for
from fastalign.testing.models import llava_batch, tiny_llava

SEVERAL = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma")


def made(name, samples=3):
    model = family(name)
    return VLM(model), family_batch(name, model, samples_for(name)[:samples])


def own_outputs(vlm, batch, **options):
    """What transformers itself returns."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        return vlm.model(**inputs, **options)


def own_states(vlm, batch):
    return own_outputs(vlm, batch, output_hidden_states=True).hidden_states


# -- the gap -------------------------------------------------------------------------------------


def naive_gap(vision, text):
    """Pair by pair, in float64."""

    def cosine(a, b):
        return float(F.cosine_similarity(a, b, dim=0))

    def within(rows):
        pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(cosine(rows[i], rows[j]) for i, j in pairs) / len(pairs)

    distance = float((vision.mean(0) - text.mean(0)).norm())
    norm = sum(float(row.norm()) for row in text) / len(text)
    return {
        "distance": distance,
        "relative_distance": distance / norm,
        "cosine": cosine(vision.mean(0), text.mean(0)),
        "vision_norm": sum(float(row.norm()) for row in vision) / len(vision),
        "text_norm": norm,
        "within_vision": within(vision),
        "within_text": within(text),
        "between": sum(cosine(a, b) for a in vision for b in text) / len(vision) / len(text),
    }


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_gap_is_that_of_all_pairs(name):
    vlm, batch = made(name, 2)
    other = family_batch(name, vlm.model, samples_for(name)[1:2], seed=1)
    found = diagnostics.modality_gap(vlm, [batch, other])
    assert found["layer"] == [0, 1, 2, 3, 4]
    for k in (0, 2, 4):
        rows = {"vision": [], "text": []}
        for b in (batch, other):
            states = own_states(vlm, b)[k].double()
            image = b["input_ids"] == vlm.image_token_id
            rows["vision"].append(states[image])
            rows["text"].append(states[~image & b["attention_mask"].bool()])
        vision, text = (torch.cat(part) for part in rows.values())
        expected = naive_gap(vision, text)
        assert {name: found[name][k] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert (found["vision_tokens"], found["text_tokens"]) == (len(vision), len(text))


def test_gap_of_known_clouds():
    # Vision (3, 0), (0, 0): centroid (1.5, 0), mean norm 1.5; text (0, 2), (0, 6): (0, 4), 4.
    vision, text = _attention_free_sums([[3.0, 0], [0, 0]]), _attention_free_sums([[0, 2], [0, 6]])
    found = diagnostics._gap._moments(vision, text)
    distance = math.sqrt(1.5**2 + 4**2)
    assert found == pytest.approx({
        "distance": distance, "relative_distance": distance / 4, "cosine": 0.0,
        "vision_norm": 1.5, "text_norm": 4.0, "within_vision": 0.0, "within_text": 1.0,
        "between": 0.0,
    })  # fmt: skip


def _attention_free_sums(rows):
    rows = torch.tensor(rows)
    sums = diagnostics._gap._Sums(rows.shape[1], rows.device)
    sums.add(rows[:1])
    sums.add(rows[1:])
    return sums


def test_gap_needs_image_tokens_and_text():
    vlm = VLM(tiny_llava())
    with pytest.raises(ValueError, match="image tokens and text tokens: got {'vision_tokens': 0"):
        diagnostics.modality_gap(vlm, [llava_batch(["tttt"])])
    vlm, batch = made("mllama")
    with pytest.raises(ValueError, match="reads them by cross-attention"):
        diagnostics.modality_gap(vlm, [batch])


def test_gap_figure():
    data = diagnostics.modality_gap(VLM(tiny_llava()), [llava_batch(["ttittt"])])
    figure = diagnostics.plot_modality_gap({"a": data, "b": data})
    assert len(figure.axes) == 3 and len(figure.axes[0].lines) == 2
    figure.canvas.draw()


# -- t-SNE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_embedding_is_balanced_and_of_the_states(name, monkeypatch):
    vlm, batch = made(name)
    other = family_batch(name, vlm.model, samples_for(name)[:2], seed=1)
    given = []

    class TSNE:
        def __init__(self, **options):
            given.append(options)

        def fit_transform(self, rows):
            given.append(torch.from_numpy(rows))
            return rows[:, :2]

    monkeypatch.setattr(manifold, "TSNE", TSNE)
    data = diagnostics.token_embedding(
        vlm, [batch, other], [0, 3], tokens=9, perplexity=4.0, seed=5
    )
    assert data["modality"] == ["vision"] * 9 + ["text"] * 9 and data["tokens"] == 9
    assert given[0]["random_state"] == 5 and given[0]["perplexity"] == 4.0
    picked = []
    for k, rows in zip((0, 3), given[1::2], strict=True):
        assert data["layers"][k] == rows[:, :2].tolist()
        states, vision = [], []
        for b in (batch, other):
            attended = b["attention_mask"].bool()
            states.append(own_states(vlm, b)[k][attended])
            vision.append((b["input_ids"] == vlm.image_token_id)[attended])
        states, vision = torch.cat(states), torch.cat(vision)
        nearest = torch.cdist(rows.double(), states.double()).min(1)
        assert float(nearest.values.max()) < 1e-4
        assert vision[nearest.indices].tolist() == [True] * 9 + [False] * 9
        picked.append(nearest.indices.tolist())
        own = 0
        for i in range(18):
            others = [j for j in range(18) if j != i]
            best = min(others, key=lambda j, i=i, x=rows: float((x[i] - x[j]).norm()))
            own += (best < 9) == (i < 9)
        assert data["own_neighbour"][k] == pytest.approx(own / 18)
    # No token twice, and at both layers the same ones.
    assert len(set(picked[1])) == 18 and picked[0][:9] == picked[1][:9]


def test_embedding_separates_clouds_and_repeats():
    vlm = VLM(tiny_llava())
    batches = [llava_batch(["tttitttttttttttt"] * 2, seed=s) for s in range(2)]
    data = diagnostics.token_embedding(vlm, batches, [1], tokens=24, perplexity=8.0)
    again = diagnostics.token_embedding(vlm, batches, [1], tokens=24, perplexity=8.0)
    assert data == again
    assert len(data["layers"][1]) == 48 and all(len(p) == 2 for p in data["layers"][1])
    figure = diagnostics.plot_token_embedding(data)
    (axes,) = figure.axes
    assert [len(c.get_offsets()) for c in axes.collections] == [24, 24]
    assert list(diagnostics.token_embedding(vlm, batches, perplexity=5.0)["layers"]) == [1, 2, 3]


def test_embedding_errors():
    vlm, batch = VLM(tiny_llava()), llava_batch(["tttit"])
    with pytest.raises(ValueError, match=r"below the number of tokens, 8: got 30.0"):
        diagnostics.token_embedding(vlm, [batch])
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.3: got \[4\]"):
        diagnostics.token_embedding(vlm, [batch], [4])
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        diagnostics.token_embedding(vlm, [batch], tokens=1)
    with pytest.raises(ValueError, match="at least 2 tokens of each modality: got {'vision': 0"):
        diagnostics.token_embedding(vlm, [llava_batch(["tttt"])])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r'pip install "fastalign\[diagnostics\]"'):
        diagnostics.token_embedding(VLM(tiny_llava()), [])


# -- attention -----------------------------------------------------------------------------------

ATTENDING = [name for name in (*FAMILIES, *RECURRENT) if name != "mllama"]


def own_attention(name, batch):
    """The weights of a decoder that was eager from the start, by layer from 1."""
    model = family(name)
    model.set_attn_implementation("eager")
    vlm, seen = VLM(model), {}
    if "blip" not in name:
        weights = own_outputs(vlm, batch, output_attentions=True).attentions
        layers = [k for k, layer in enumerate(vlm.layers, start=1) if hasattr(layer, "self_attn")]
        return dict(zip(layers, weights, strict=True))
    for k, layer in enumerate(vlm.layers, start=1):  # these do not hand the weights on
        layer.self_attn.register_forward_hook(lambda m, a, out, k=k: seen.update({k: out[1]}))
    own_outputs(vlm, batch)
    return seen


@pytest.mark.parametrize("name", ATTENDING)
def test_attention_is_that_of_an_eager_model(name):
    vlm, batch = made(name, 2)
    grids = "blip" not in name
    before = [m.config._attn_implementation for m in (vlm.model, vlm.decoder)]
    found = diagnostics.image_attention(vlm, batch, maps=grids)
    assert [m.config._attn_implementation for m in (vlm.model, vlm.decoder)] == before
    image = batch["input_ids"] == vlm.image_token_id
    queries = (batch["labels"] != -100) & (image.cumsum(1) > 0)
    weights = own_attention(name, batch)
    assert found.layers == tuple(weights) and found.queries == int(queries.sum())
    seen = [
        float(image[i, : c + 1].sum() / batch["attention_mask"][i, : c + 1].sum())
        for i, c in queries.nonzero().tolist()
    ]
    assert found.uniform == pytest.approx(sum(seen) / len(seen))
    for at, (_, w) in enumerate(weights.items()):
        rows = [w[i, :, c] for i, c in queries.nonzero().tolist()]
        places = queries.nonzero()[:, 0].tolist()
        share = torch.stack([r[:, image[i]].sum(1) for r, i in zip(rows, places, strict=True)])
        torch.testing.assert_close(found.share[at], share.mean(0), rtol=1e-4, atol=1e-6)
        if not grids:
            continue
        patches = vlm.patches(batch).places.tolist()
        for n in (0, len(patches) - 1):
            sample, column = divmod(patches[n], image.shape[1])
            mine = [r[:, column] for r, i in zip(rows, places, strict=True) if i == sample]
            expected = torch.stack(mine).mean(0)
            torch.testing.assert_close(found.maps[at, :, n], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.total, torch.ones_like(found.total))


def test_attention_of_one_token():
    vlm, batch = VLM(tiny_llava()), llava_batch(["titt", "titttt"])
    one = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    one[1, 19] = True
    found = diagnostics.image_attention(vlm, batch, queries=one)
    assert found.queries == 1 and found.uniform == pytest.approx(16 / 20)
    assert found.grids == ((4, 4), (4, 4)) and found.maps.shape == (3, 4, 32)
    # Of the first sample no token was asked; in the second the patches hold the whole share.
    assert found.map_of(0).isnan().all() and found.map_of(1).shape == (3, 4, 4, 4)
    torch.testing.assert_close(found.map_of(1).sum((2, 3)), found.share)
    everything = diagnostics.image_attention(vlm, {k: v for k, v in batch.items() if k != "labels"})
    assert everything.queries == 2 + 4


def test_attention_is_restored_after_an_error(monkeypatch):
    vlm, batch = made("llava", 1)

    def broken(*args):
        assert vlm.decoder.config._attn_implementation == "eager"
        raise RuntimeError("a fault")

    monkeypatch.setattr(vlm, "forward", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        diagnostics.image_attention(vlm, batch)
    assert vlm.decoder.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks for layer in vlm.layers for part in layer.children())


def test_attention_errors(monkeypatch):
    vlm, batch = VLM(tiny_llava()), llava_batch(["titt"])
    with pytest.raises(ValueError, match="queries must hold at least one token"):
        diagnostics.image_attention(vlm, batch)  # no label
    with pytest.raises(ValueError, match="of which 0 are text"):
        diagnostics.image_attention(vlm, batch, queries=batch["input_ids"] == 3)
    with pytest.raises(ValueError, match=r"queries must be bool of shape \(1, 19\)"):
        diagnostics.image_attention(vlm, batch, queries=torch.ones(1, 3, dtype=torch.bool))
    cross, cross_batch = made("mllama")
    with pytest.raises(ValueError, match="reads them by cross-attention"):
        diagnostics.image_attention(cross, cross_batch)
    monkeypatch.setattr(vlm.decoder, "set_attn_implementation", lambda name: None)
    labelled = llava_batch(["tiyy"])
    with pytest.raises(ValueError, match='load the model with attn_implementation="eager"'):
        diagnostics.image_attention(vlm, labelled)
    monkeypatch.setattr(_attention, "eager_attention", _nothing)
    with pytest.raises(ValueError, match="must give its attention weights"):
        diagnostics.image_attention(vlm, labelled)  # sdpa gives none


class _nothing:
    def __init__(self, *args):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *args):
        pass


def test_attention_figure():
    vlm, batch = VLM(tiny_llava()), llava_batch(["tiyyy"])
    found = diagnostics.image_attention(vlm, batch)
    figure = diagnostics.plot_image_attention(found, layer=2, image=Image.new("RGB", (8, 8)))
    assert "layer 2" in figure.axes[2].get_title() and len(figure.axes[2].images) == 2
    shown = figure.axes[2].images[1].get_array()
    torch.testing.assert_close(torch.tensor(shown.data), found.map_of(0)[1].mean(0))
    figure.canvas.draw()
    flat = diagnostics.image_attention(vlm, batch, maps=False)
    assert len(diagnostics.plot_image_attention(flat).axes) == 2
    with pytest.raises(ValueError, match="layer must be one of"):
        diagnostics.plot_image_attention(found, layer=9)
    with pytest.raises(ValueError, match=r"view must lie in 0\.\.0"):
        diagnostics.plot_image_attention(found, view=1)


# -- words ---------------------------------------------------------------------------------------


class Spelling:
    """A tokenizer that spells the id."""

    def decode(self, ids):
        return f"w{ids[0]}"


NORMS = {"lfm2_vl": "embedding_norm"}


@pytest.mark.parametrize("name", [*SEVERAL, "paligemma2", "lfm2_vl"])
def test_words_are_those_of_all_logits(name):
    vlm, batch = made(name, 2)
    found = diagnostics.nearest_words(vlm, Spelling(), batch, [0, 2, 4], top=3, chunk=100)
    assert list(found) == [0, 2, 4]
    patches, states = vlm.patches(batch), own_states(vlm, batch)
    rows = {k: patches.of(states[k]) for k in (0, 2, 4)}
    norm = getattr(vlm.decoder, NORMS.get(name, "norm"))
    head = vlm.head.weight
    with torch.no_grad():
        # The whole model's own transform of its logits is seen at the last layer.
        logits = {2: norm(rows[2]) @ head.T, 4: rows[4] @ head.T}
    if vlm.softcap is not None:
        logits = {k: vlm.softcap * (z / vlm.softcap).tanh() for k, z in logits.items()}
    whole = patches.of(own_outputs(vlm, batch).logits)
    torch.testing.assert_close(logits[4], whole, rtol=1e-4, atol=1e-4)
    embeddings = vlm.model.get_input_embeddings().weight.detach()
    cosines = torch.stack([F.cosine_similarity(row[None], embeddings) for row in rows[0]])
    scores = {0: cosines, 2: logits[2].softmax(1), 4: logits[4].softmax(1)}
    places = [
        (view, i, j)
        for view, (h, w) in enumerate(patches.grids)
        for i in range(h)
        for j in range(w)
    ]
    for k, expected in scores.items():
        best, ids = expected.topk(3, dim=1)
        assert [patch[:3] for patch in found[k]] == places
        torch.testing.assert_close(
            torch.tensor([p.scores for p in found[k]]), best, rtol=1e-4, atol=1e-6
        )
        assert [p.words for p in found[k]] == [tuple(f"w{i}" for i in r) for r in ids.tolist()]


def test_a_patch_that_is_a_word_is_nearest_to_it(monkeypatch):
    vlm, batch = VLM(tiny_llava()), llava_batch(["tit"])
    embeddings = vlm.model.get_input_embeddings().weight.detach()
    planted = torch.arange(20, 36)
    monkeypatch.setattr(
        vlm.model.model.multi_modal_projector, "forward", lambda x: 7 * embeddings[planted][None]
    )
    found = diagnostics.nearest_words(vlm, Spelling(), batch, [0], top=1, chunk=10)
    assert [p.words[0] for p in found[0]] == [f"w{i}" for i in range(20, 36)]
    assert [p.scores[0] for p in found[0]] == pytest.approx([1.0] * 16, abs=1e-5)


def test_words_errors(monkeypatch):
    vlm, batch = VLM(tiny_llava()), llava_batch(["tit"])
    for options in ({"top": 0}, {"top": 65}, {"chunk": 0}):
        with pytest.raises(ValueError, match=r"top must lie in 1\.\.64 and chunk be at least 1"):
            diagnostics.nearest_words(vlm, Spelling(), batch, **options)
    with pytest.raises(ValueError, match="batch has no pixel_values"):
        diagnostics.nearest_words(vlm, Spelling(), llava_batch(["tt"]))
    monkeypatch.setattr(_words, "_FINAL_NORMS", ("rotary_emb_norm",))
    with pytest.raises(ValueError, match="must make its output from its last layer by a norm"):
        diagnostics.nearest_words(vlm, Spelling(), batch)


def test_words_figure():
    vlm, batch = VLM(tiny_llava()), llava_batch(["tit"])
    found = diagnostics.nearest_words(vlm, Spelling(), batch)
    assert list(found) == [0, 2, 3] and all(len(p.words) == 5 for p in found[2])
    figure = diagnostics.plot_nearest_words(found)
    assert [t.get_text() for t in figure.axes[1].texts] == [p.words[0] for p in found[2]]
    diagnostics.plot_nearest_words(found, image=Image.new("RGB", (8, 8))).canvas.draw()
    with pytest.raises(ValueError, match=r"view must be one of \[0\]: got 1"):
        diagnostics.plot_nearest_words(found, view=1)


# -- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEVERAL, "mistral3", "idefics3", "blip2"])
def test_probe_features_are_the_means_of_each_image(name):
    samples = [s for s in samples_for(name) if "i" in s][:3]
    model = family(name)
    vlm, batch = VLM(model), family_batch(name, model, samples)
    features, classes = diagnostics._probe._features(vlm, [(batch, [2, 0, 1])], (0, 2, 4))
    assert classes == [2, 0, 1]
    seen = []
    handle = vlm.vision_tower.register_forward_hook(lambda m, a, out: seen.append(out[0]))
    states = own_states(vlm, batch) if name != "blip2" else None
    if name == "blip2":
        own_outputs(vlm, batch)
    handle.remove()
    image = batch["input_ids"] == vlm.image_token_id
    for k in (0, 2, 4) if states is not None else ():
        expected = torch.stack([states[k][i][image[i]].mean(0) for i in range(3)])
        torch.testing.assert_close(features[k], expected, rtol=1e-4, atol=1e-5)
    if name == "llava_next":  # its tiles are no views
        assert -1 not in features
        return
    # The rows of the tower in order, as many to each sample as it has pictures or patches.
    (tower,) = seen
    if name in ("qwen2_5_vl", "qwen3_vl", "mistral3"):
        rows = tower.flatten(0, -2)
        counts = image.sum(1) * 4
    else:
        rows = tower
        counts = image.sum(1) * len(tower) // int(image.sum())
    parts = torch.split(rows, counts.tolist())
    expected = torch.stack([part.flatten(0, -2).mean(0) for part in parts])
    torch.testing.assert_close(features[-1], expected, rtol=1e-4, atol=1e-5)


def test_tower_of_single_samples_is_known_for_every_family():
    vlm, batch = made("llava_next", 1)
    features, _ = diagnostics._probe._features(vlm, [(batch, [0]), (batch, [1])], (1,))
    assert features[-1].shape == (2, 32)


def shades(count, seed=0):
    """Batches of tiny_llava in which the sign of a channel's mean is the class."""
    pairs = []
    for s in range(count):
        batch = llava_batch(["tit"] * 8, seed=seed + s)
        classes = [i % 2 for i in range(8)]
        for i, c in enumerate(classes):
            batch["pixel_values"][i, 0] += 3.0 * (2 * c - 1)
        pairs.append((batch, classes))
    return pairs


def test_probe_finds_what_is_there_and_its_control_nothing():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    vlm = VLM(tiny_llava())
    found = diagnostics.linear_probe(vlm, shades(5), [0, 2], folds=4, seed=3)
    assert found["layer"] == [0, 2] and found["chance"] == 0.5
    assert (found["samples"], found["classes"]) == (40, 2)
    assert found["accuracy"] == [1.0, 1.0] and found["tower"]["accuracy"] == 1.0
    assert all(
        abs(share - 0.5) < 0.25 for share in (*found["shuffled"], found["tower"]["shuffled"])
    )
    # Wilson, z = 1.959964, 40 of 40: the lower end is n / (n + z^2).
    assert found["interval"][0] == pytest.approx((40 / (40 + 1.959964**2), 1.0))
    # The control again, fold by fold, with features standardised by hand.
    features, classes = diagnostics._probe._features(vlm, shades(5), (2,))
    x = features[2].double().numpy()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    y = [classes[i] for i in order]
    hits = 0
    for train, test in StratifiedKFold(4, shuffle=True, random_state=3).split(x, y):
        mean, std = x[train].mean(0), x[train].std(0)
        labels = [y[i] for i in train]
        model = LogisticRegression(max_iter=1000).fit((x[train] - mean) / std, labels)
        hits += int((model.predict((x[test] - mean) / std) == [y[i] for i in test]).sum())
    assert found["shuffled"][1] == hits / 40


def test_probe_errors():
    vlm = VLM(tiny_llava())
    pairs = shades(1)
    with pytest.raises(
        ValueError, match="at least folds = 5 images each: got 2 classes, the small"
    ):
        diagnostics.linear_probe(vlm, pairs, [1])
    with pytest.raises(ValueError, match="at least folds = 2 images each: got 1 classes"):
        diagnostics.linear_probe(vlm, [(pairs[0][0], [0] * 8)], [1], folds=2)
    with pytest.raises(ValueError, match="got 1 classes and 8 images of 8 samples"):
        diagnostics.linear_probe(vlm, [(pairs[0][0], [0])])
    with pytest.raises(ValueError, match="got 1 classes and 0 images of 1 samples"):
        diagnostics.linear_probe(vlm, [(llava_batch(["tt"]), [0])])
    with pytest.raises(ValueError, match="folds must be at least 2"):
        diagnostics.linear_probe(vlm, pairs, folds=1)


def test_probe_figure():
    data = {
        "layer": [0, 1], "accuracy": [0.5, 0.7], "interval": [(0.4, 0.6), (0.6, 0.8)],
        "shuffled": [0.3, 0.2], "tower": {"accuracy": 0.9}, "chance": 0.25,
    }  # fmt: skip
    figure = diagnostics.plot_linear_probe({"base": data, "tuned": data | {"tower": None}})
    (axes,) = figure.axes
    labels = {line.get_label() for line in axes.lines}
    assert labels == {
        "base", "base, classes shuffled", "base, vision tower", "tuned", "tuned, classes shuffled",
        "chance",
    }  # fmt: skip
    figure.canvas.draw()


# -- perplexity ----------------------------------------------------------------------------------


class Letters:
    """Ids of letters; with `bos`, one goes before each text."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        begin = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": begin + [4 + ord(c) % 60 for c in text]}


def naive(vlm, ids, window, stride, begin):
    """Nats of each token, given as much before it as the first window that holds it shows."""
    size, nats = window - len(begin), {}
    start = 0
    while True:
        held = begin + ids[start : start + size]
        with torch.no_grad():
            logits = vlm.model(input_ids=torch.tensor([held])).logits[0].double()
        ce = F.cross_entropy(logits[:-1], torch.tensor(held[1:]), reduction="none").tolist()
        for place, value in enumerate(ce, start=1):
            nats.setdefault(start + place - len(begin), value)
        if start + size >= len(ids):
            return nats
        start += stride


TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all"


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (9, 3), (70, 35), (200, 100)])
def test_perplexity_is_that_of_single_windows(bos, window, stride):
    vlm, tokenizer = VLM(tiny_llava(head_scale=3.0)), Letters(bos)
    found = diagnostics.perplexity(vlm, tokenizer, [TEXT], window=window, stride=stride)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    nats = naive(vlm, ids, window, stride, [] if bos is None else [bos])
    # Every token once: all of them after a token of the tokenizer's, else all but the first.
    assert sorted(nats) == list(range(0 if bos else 1, len(ids)))
    assert found["tokens"] == len(nats) == sum(found["tokens_per_window"])
    assert found["nats"] == pytest.approx(sum(nats.values()) / len(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"]))
    assert found["windows"] == len(found["per_window"])
    assert "difference" not in found


def test_windows_count_no_token_twice():
    for length in range(0, 30):
        for window, stride, begin in [(8, 3, []), (8, 7, [99]), (4, 1, []), (2, 1, [99])]:
            counted = []
            for ids, first in _perplexity._windows(iter(range(length)), window, stride, begin):
                assert len(ids) <= window and first >= 1
                counted += ids[first:]
            assert counted == list(range(0 if begin else 1, length))


def test_perplexity_of_pieces_and_of_several_texts():
    vlm, tokenizer = VLM(tiny_llava()), Letters(1)
    whole = diagnostics.perplexity(vlm, tokenizer, [TEXT, "short", ""], window=20, batch_size=3)
    pieces = iter([TEXT[:11], TEXT[11:]])
    again = diagnostics.perplexity(
        vlm, tokenizer, iter([pieces, ["sho", "rt"]]), window=20, batch_size=1
    )
    assert again["nats"] == pytest.approx(whole["nats"], rel=1e-5)
    assert again["tokens"] == whole["tokens"] == len(TEXT) + 5
    some = diagnostics.perplexity(vlm, tokenizer, [TEXT], window=20, batch_size=1, max_tokens=30)
    # A window of 19 after the first token, then 10 at a time.
    assert some["tokens_per_window"] == [19, 10, 10][: some["windows"]] and some["tokens"] == 39


def test_perplexity_without_the_adapter():
    model = tiny_llava(head_scale=3.0)
    plain = diagnostics.perplexity(VLM(model), Letters(1), [TEXT], window=16)
    adapter = attach(model, AdapterConfig(shift_layers=(2,)))
    found = diagnostics.perplexity(VLM(model), Letters(1), [TEXT], window=16)
    # An adapter in the vision tower is no part of a pass over text.
    assert found["without_adapter"]["nats"] == found["nats"] == pytest.approx(plain["nats"])
    assert found["difference"] == {"nats": 0.0, "interval": (0.0, 0.0)}

    # One that does act on text: its own values, paired window by window.
    def shout(module, args, output):
        return output * 1.5 if adapter.enabled else None

    handle = model.model.language_model.norm.register_forward_hook(shout)
    loud = diagnostics.perplexity(VLM(model), Letters(1), [TEXT], window=16)
    handle.remove()
    assert loud["without_adapter"]["per_window"] == pytest.approx(plain["per_window"])
    assert loud["nats"] != pytest.approx(plain["nats"], abs=1e-3) and adapter.enabled
    n = torch.tensor(loud["tokens_per_window"], dtype=torch.float64)
    d = torch.tensor(loud["per_window"]) - torch.tensor(plain["per_window"])
    ratio = float((d * n).sum() / n.sum())
    error = float(((d - ratio) * n).square().sum() * len(n) / (len(n) - 1)) ** 0.5 / float(n.sum())
    assert loud["difference"]["nats"] == pytest.approx(ratio, abs=1e-6)
    low, high = loud["difference"]["interval"]
    assert (low + high) / 2 == pytest.approx(ratio, abs=1e-6)
    # 9 windows (15 tokens, then 8 at a time of 69): t of 7 degrees is 2.3646.
    assert loud["windows"] == 8
    assert (high - low) / 2 == pytest.approx(2.364624 * error, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "paligemma", "paligemma2", "mllama"])
def test_perplexity_of_families(name):
    vlm = VLM(family(name))
    found = diagnostics.perplexity(vlm, Letters(), [TEXT[:24]], window=32)
    ids = torch.tensor([Letters()(TEXT[:24])["input_ids"]])
    length = ids.shape[1]
    # PaliGemma's own decoder reads both ways.
    causal = torch.ones(1, 1, length, length).bool().tril() if name == "paligemma" else None
    decoder = vlm.decoder(input_ids=ids, attention_mask=causal, use_cache=False)
    with torch.no_grad():
        logits = vlm.head(decoder[0])[0].double()
    if vlm.softcap is not None:
        logits = vlm.softcap * (logits / vlm.softcap).tanh()
    expected = F.cross_entropy(logits[:-1], ids[0, 1:])
    assert found["nats"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "paligemma", "blip2", "mllama"])
def test_perplexity_behind_an_image(name):
    model = family(name)
    vlm = VLM(model)
    prefix = family_batch(name, model, ["it"])
    del prefix["labels"]
    if name == "paligemma":
        prefix["token_type_ids"].zero_()
    found = diagnostics.perplexity(vlm, Letters(1), [TEXT[:30]], window=16, prefix=prefix)
    ids, n = Letters()(TEXT[:30])["input_ids"], prefix["input_ids"].shape[1]
    nats = []
    for start, counted in ((0, 0), (8, 8), (16, 8)):
        text = torch.tensor([ids[start : start + 16]])
        batch = {**prefix, "input_ids": torch.cat([prefix["input_ids"], text], 1)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for key in ("token_type_ids", "mm_token_type_ids"):
            if key in batch:
                kind = torch.full_like(text, int(name == "paligemma"))
                batch[key] = torch.cat([batch[key], kind], 1)
        if name == "mllama":  # all that follows sees the image
            seen = batch["cross_attention_mask"]
            batch["cross_attention_mask"] = torch.cat([seen] + [seen[:, -1:]] * text.shape[1], 1)
        logits = own_outputs(vlm, batch).logits[0, n - 1 : -1].double()
        ce = F.cross_entropy(logits, text[0], reduction="none")
        nats += ce[counted:].tolist()
    assert found["tokens"] == len(nats) == 30 and found["windows"] == 3
    assert found["nats"] == pytest.approx(sum(nats) / 30, rel=1e-4)


def test_an_adapter_changes_text_behind_an_image():
    model = tiny_llava(head_scale=3.0)
    adapter = attach(model, AdapterConfig(shift_layers=(2,)))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    prefix = {k: v for k, v in llava_batch(["ti"]).items() if k != "labels"}
    alone = diagnostics.perplexity(VLM(model), Letters(), [TEXT], window=16)
    behind = diagnostics.perplexity(VLM(model), Letters(), [TEXT], window=16, prefix=prefix)
    assert alone["difference"]["nats"] == 0.0
    own = behind["nats"] - behind["without_adapter"]["nats"]
    assert behind["difference"]["nats"] == pytest.approx(own) and abs(own) > 1e-3
    with pytest.raises(ValueError, match="prefix must be one sample: got 2"):
        two = llava_batch(["ti", "ti"])
        diagnostics.perplexity(VLM(model), Letters(), [TEXT], prefix=two)


def test_perplexity_errors(monkeypatch):
    vlm = VLM(tiny_llava())
    with pytest.raises(ValueError, match=r"window must lie in 2\.\.256"):
        diagnostics.perplexity(vlm, Letters(), [TEXT], window=300)
    with pytest.raises(ValueError, match="got 16, 16 and 8"):
        diagnostics.perplexity(vlm, Letters(), [TEXT], window=16, stride=16)
    with pytest.raises(ValueError, match="at least one token with a token before it"):
        diagnostics.perplexity(vlm, Letters(), ["x", ""])
    with pytest.raises(ValueError, match="demands an image in every sample"):
        diagnostics.perplexity(VLM(family("blip2")), Letters(), [TEXT])
    both_ways = VLM(family("paligemma"))
    monkeypatch.setattr(both_ways.config, "model_type", "other")
    with pytest.raises(ValueError, match="must read text from left to right"):
        diagnostics.perplexity(both_ways, Letters(), [TEXT], window=32)


def test_documents_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_documents, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("one two\nthree four five six-seven-eight-nine-ten\n\nend")
    (tmp_path / "b.jsonl").write_text('{"text": "x y"}\n\n{"text": "z"}\n')
    texts = [list(pieces) for pieces in diagnostics.documents(tmp_path)]
    assert "".join(texts[0]) == (tmp_path / "a.txt").read_text()
    assert texts[0][0] == "one two\n" and len(texts[0]) > 3 and texts[1:] == [["x y"], ["z"]]
    assert all(len(piece) <= 20 for piece in texts[0])
    (tmp_path / "b.jsonl").write_text('{"txt": "x y"}')
    with pytest.raises(ValueError, match='b.jsonl, line 1: must be an object with "text"'):
        list(diagnostics.documents(tmp_path / "b.jsonl"))
    with pytest.raises(FileNotFoundError, match="texts must be a file or a folder"):
        list(diagnostics.documents(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one .txt or .jsonl file"):
        list(diagnostics.documents(tmp_path / "empty"))


def test_perplexity_figure():
    data = {"nats": 1.0, "perplexity": math.e, "per_window": [0.5, 1.5]}
    figure = diagnostics.plot_perplexity({"m": data | {"without_adapter": data}})
    labels = [line.get_label() for line in figure.axes[0].lines[::2]]
    assert labels == [
        "m (perplexity 2.718)", "m, without its adapter (perplexity 2.718)"
    ]  # fmt: skip
    figure.canvas.draw()


# -- blind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """The demo's trained base, its processor, and scenes as records."""
    from fastalign.demo.base import build_processor, load_base
    from fastalign.demo.scenes import scenes

    return (
        VLM(load_base()),
        build_processor(),
        [parse_record(r) for r in scenes(24, seed=11).records()],
    )


def naive_scores(vlm, collate, records, first=0):
    """Hits and mean cross-entropy of the labels from `first` on, record by record."""
    hits = ce = count = 0
    for record in records:
        batch = collate([record])
        labels = batch["labels"][0, 1:]
        logits = own_outputs(vlm, batch).logits[0, :-1].double()
        at = (batch["labels"][0] != -100).nonzero()[first:, 0] - 1
        hits += int((logits.argmax(-1) == labels)[at].sum())
        ce += float(F.cross_entropy(logits[at], labels[at], reduction="sum"))
        count += len(at)
    return hits / count, ce / count, count


def test_blind_accuracy_of_the_demo(demo):
    vlm, processor, records = demo
    collate = Collator(processor)
    found = diagnostics.blind_accuracy(vlm, records, collate, batch_size=7)
    others = [Record(r.turns, records[(i + 12) % 24].images) for i, r in enumerate(records)]
    without = [Record((Turn("user", ""), r.turns[1])) for r in records]
    for name, variant in (("image", records), ("shuffled", others), ("none", without)):
        accuracy, ce, count = naive_scores(vlm, collate, variant)
        assert found[name]["accuracy"] == pytest.approx(accuracy)
        assert found[name]["cross_entropy"] == pytest.approx(ce, rel=1e-5)
        assert (found["tokens"], found["samples"]) == (count, 24)
        if name != "image":
            difference = found["difference"][name]
            gap = found["image"]["accuracy"] - accuracy
            assert difference["accuracy"] == pytest.approx(gap)
            low, high = difference["accuracy_interval"]
            assert low < gap < high and low > 0  # it sees
    assert found["image"]["accuracy"] > 0.8 and found["same_image"] == 0


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3", "paligemma", "idefics3"])
def test_blind_accuracy_with_the_processors_of_families(name):
    processor = PROCESSORS[name]()
    if processor.chat_template is None:
        processor.chat_template = plain_template(processor)
    vlm, collate = VLM(family(name)), Collator(processor)
    sizes, colours = ((60, 90), (100, 90), (60, 60)), ("red", "green", "blue")
    pictures = [Image.new("RGB", s, c) for s, c in zip(sizes, colours, strict=True)]
    records = [Record.from_caption(p, f"w2{i} w3{i} w40 w5{i}") for i, p in enumerate(pictures)]
    found = diagnostics.blind_accuracy(vlm, records, collate, batch_size=2)
    without = [Record((Turn("user", ""), r.turns[1])) for r in records]
    others = [Record(r.turns, records[(i + 1) % 3].images) for i, r in enumerate(records)]
    for condition, variant in (("image", records), ("shuffled", others), ("none", without)):
        # PaliGemma's template has nothing before an answer but the image.
        _, ce, count = naive_scores(vlm, collate, variant, first=int(name == "paligemma"))
        assert found[condition]["cross_entropy"] == pytest.approx(ce, rel=1e-4)
        assert found["tokens"] == count
    assert found["difference"]["none"]["cross_entropy"] != 0

    # The command's prompt, which shows an image, before running text.
    prefix = prompt_of(vlm, processor, pictures[0])
    whole = collate(records[:1])
    labels = whole["labels"][0]
    assert torch.equal(prefix["input_ids"][0], whole["input_ids"][0][labels == -100])
    behind = diagnostics.perplexity(vlm, processor, ["w20 w30 w40"], window=32, prefix=prefix)
    assert behind["tokens"] == 3


def test_blind_accuracy_errors(demo):
    vlm, processor, records = demo
    collate = Collator(processor)
    talk = Record((Turn("user", "hello"), Turn("assistant", "a red cup")))
    with pytest.raises(ValueError, match="another record as many: got 1 with 0 images"):
        diagnostics.blind_accuracy(vlm, [*records[:2], talk], collate)
    with pytest.raises(ValueError, match="another record as many: got 1 with 1 images"):
        diagnostics.blind_accuracy(vlm, records[:1], collate)
    with pytest.raises(ValueError, match="at least two records: got none"):
        diagnostics.blind_accuracy(vlm, [], collate)
    cut = Collator(processor, max_length=68, on_overflow="truncate")
    with pytest.raises(ValueError, match="the same labels with and without its image: got others"):
        diagnostics.blind_accuracy(vlm, records[:2], cut)
    same = [records[0], records[0]]
    assert diagnostics.blind_accuracy(vlm, same, collate)["same_image"] == 2


def test_blind_figure(demo):
    vlm, processor, records = demo
    data = diagnostics.blind_accuracy(vlm, records[:4], Collator(processor))
    figure = diagnostics.plot_blind_accuracy({"a": data, "b": data})
    assert [len(axes.patches) for axes in figure.axes] == [6, 6]
    figure.canvas.draw()


# -- intervals -----------------------------------------------------------------------------------


def test_intervals_of_known_cases():
    # Equal lengths: the mean of 1, 2, 3 is 2, its error 1 / sqrt(3), and t of 2 degrees 4.302653.
    ratio, (low, high) = _intervals.ratio_interval(torch.tensor([2.0, 4, 6]), torch.full((3,), 2))
    assert ratio == 2.0 and high - ratio == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert ratio - low == pytest.approx(high - ratio)
    assert math.isnan(_intervals.ratio_interval(torch.ones(1), torch.ones(1))[1][0])
    # Wilson's for 5 of 10: 0.5 -+ 0.263410.
    assert _intervals.wilson_interval(5, 10) == pytest.approx((0.236590, 0.763410), abs=1e-5)
    assert _intervals.wilson_interval(0, 10)[0] == pytest.approx(0.0, abs=1e-12)


# -- the model is left as it was -----------------------------------------------------------------


def test_measuring_leaves_no_hook_and_no_mode():
    model = tiny_llava()
    vlm, batch = VLM(model), llava_batch(["tiyyyyyy", "ttiyyyy"])
    model.train()
    state = copy.deepcopy(model.state_dict())
    vlm.forward(batch)  # transformers adds hooks of its own in the first pass
    hooks = _hooks(model)
    diagnostics.modality_gap(vlm, [batch])
    diagnostics.token_embedding(vlm, [batch], [1], perplexity=3.0)
    diagnostics.image_attention(vlm, batch)
    diagnostics.nearest_words(vlm, Spelling(), batch)
    diagnostics.linear_probe(vlm, [(batch, [0, 1]), (batch, [0, 1])], [1], folds=2)
    diagnostics.perplexity(vlm, Letters(), [TEXT], window=32)
    assert _hooks(model) == hooks and all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def _hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [len(getattr(m, kind)) for m in model.modules() for kind in kinds]


def test_results_are_json():
    vlm, batch = VLM(tiny_llava()), llava_batch(["tiyyyyyy", "ttiyyyy"])
    json.dumps(diagnostics.modality_gap(vlm, [batch]))
    json.dumps(diagnostics.token_embedding(vlm, [batch], [1], perplexity=3.0))
    json.dumps(diagnostics.perplexity(vlm, Letters(), [TEXT], window=32))
    json.dumps(diagnostics.linear_probe(vlm, [(batch, [0, 1])] * 2, [1], folds=2))
