"""Text-only samples that share rows: what is learned is what rows of their own would teach."""

import pytest
import torch

pytest.importorskip("transformers")
from _processors import PROCESSORS

import fastalign as fa
from fastalign.config import CALConfig
from fastalign.data import Collator, Record, Turn, plain_template
from fastalign.models import _text_packing
from fastalign.models._text_packing import check_packing, positions
from fastalign.objectives import counts
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch
from fastalign.testing.models import llava_batch, tiny_llava

TEXTS = ["tyyy", "ttyyyyy", "tyy", "ttty"]
REFUSED = {
    "paligemma": "both ways",
    "paligemma2": "both ways",
    "mllama": "cross-attention to images",
    "instructblip": "takes no position_ids",
    "instructblip_opt": "takes no position_ids",
    "blip2": "takes no position_ids",
}
PACKED = [name for name in FAMILIES if name not in REFUSED]


def pack(batch, texts):
    """The batch with its text-only samples, the rows `texts`, in one row behind the others."""
    lengths = batch["attention_mask"].sum(1).tolist()
    width, padding = batch["input_ids"].shape[1], {"labels": -100}
    parts = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    parts |= {k: batch[k] for k in ("mm_token_type_ids", "token_type_ids") if k in batch}
    rest = [row for row in range(len(lengths)) if row not in texts]
    assert sum(lengths[row] for row in texts) <= width
    packed = dict(batch)
    for name, values in parts.items():
        row = torch.full((width,), padding.get(name, 0))
        joined = torch.cat([values[i, : lengths[i]] for i in texts])
        row[: len(joined)] = joined
        packed[name] = torch.cat([values[rest], row[None]])
    segments = torch.full((len(rest) + 1, width), -1)
    for place, row in enumerate(rest):
        segments[place, : lengths[row]] = 0
    numbers = [torch.full((lengths[row],), n) for n, row in enumerate(texts)]
    segments[-1, : sum(map(len, numbers))] = torch.cat(numbers)
    starts = torch.tensor([lengths[row] for row in texts]).cumsum(0)[:-1]
    assert (packed["labels"][-1, starts] == -100).all()
    return packed | {"segments": segments}


def mixed(name, model):
    """Images first, then texts that fit into one row of theirs."""
    shown = ["ittyyyyyyyyyyyyyyyy", "tiyyyyttityyyy"]
    batch = family_batch(name, model, shown + TEXTS)
    return batch, pack(batch, [2, 3, 4, 5])


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and expected
    largest = max(float(g.abs().max()) for g in expected.values())
    worst = max(float((actual[n] - g).abs().max()) for n, g in expected.items())
    assert worst <= 1e-5 * largest, (worst, largest)


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_losses_and_gradients_are_those_of_rows_of_their_own(name):
    model = family(name).train()
    vlm = fa.VLM(model)
    check_packing(vlm)
    both = mixed(name, model)
    results, grads = [], []
    for batch in both:
        result, _ = fa.objectives._terms.label_loss(vlm, batch, vlm.forward(batch), None)
        results.append(result.per_token.detach().sort().values)
        grads.append(gradients(model, fa.objectives.sft(vlm, batch)["loss"]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    assert_same_gradients(grads[1], grads[0])
    before, after = (counts(vlm, batch) for batch in both)
    assert {k: int(v) for k, v in before.items()} == {k: int(v) for k, v in after.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_contrastive_alignment_stays_within_samples(name, attention):
    model = family(name).train()
    model.set_attn_implementation(attention)
    vlm = fa.VLM(model)
    plain, packed = mixed(name, model)
    for options in (
        {"normalize": "sample"},
        {"normalize": "mean", "window": 5},
        {"normalize": "tokens", "packed": False},
        {"normalize": "mean", "mode": "mask"},
    ):
        expected, actual = (fa.objectives.cal(vlm, batch, **options) for batch in (plain, packed))
        for term in ("loss", "ce", "accuracy", "weight", "delta"):
            torch.testing.assert_close(actual[term], expected[term], rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, actual["loss"]), gradients(model, expected["loss"]))
    with pytest.raises(ValueError, match='compat="official" pools over rows of one sample each'):
        fa.objectives.cal(vlm, packed, compat="official")


def test_weights_of_a_window_end_with_their_sample():
    """Of two samples in one row, both without an image: every weight is the lower clamp."""
    model = tiny_llava(head_scale=3.0)
    vlm = fa.VLM(model)
    batch = llava_batch(["ttiyyy", "tyyy", "tyy"])
    packed = pack(batch, [1, 2])
    assert counts(vlm, packed)["samples"] == 3 and counts(vlm, packed)["tokens"] == 8
    # Per-sample normalisation by hand: mean over three samples of the weighted mean of each.
    result, rows = fa.objectives._terms.label_loss(vlm, batch, vlm.forward(batch), None)
    delta = vlm.contrast(batch)
    weights = fa.losses.contrast_weights(delta, torch.tensor([0, 3, 6, 8], dtype=torch.int32))
    means = [
        (weights[rows == i] * result.per_token[rows == i]).sum() / weights[rows == i].sum()
        for i in range(3)
    ]
    loss = fa.objectives.cal(vlm, packed, normalize="sample")["loss"]
    torch.testing.assert_close(loss, torch.stack(means).mean())


@pytest.mark.parametrize("name", [*REFUSED, *RECURRENT])
def test_models_that_cannot_are_refused_by_name(name):
    model = family(name)
    reason = REFUSED.get(name, "carry state from token to token")
    with pytest.raises(
        ValueError, match=f"text cannot be packed for {type(model).__name__}.*{reason}"
    ):
        check_packing(fa.VLM(model))


def test_a_packed_batch_is_refused_too(monkeypatch):
    model = tiny_llava()
    model.config.text_config._attn_implementation = "flash_attention_2"
    packed = pack(llava_batch(["ttiyyy", "tyyy", "tyy"]), [1, 2])
    with pytest.raises(ValueError, match="attention is flash_attention_2, whose packing knows one"):
        fa.VLM(model).forward(packed)
    # A model that reads no packing from positions is found by what it computes.
    with monkeypatch.context() as patch:
        patch.setattr(_text_packing, "packed_inputs", lambda vlm, inputs, segments: inputs)
        with pytest.raises(ValueError, match="samples in one row see each other"):
            check_packing(fa.VLM(tiny_llava()))


def test_positions_begin_anew():
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0], [0, 1, 2, 2, -1, -1]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]]
    assert positions(segments).tolist() == expected


# -- the collator --------------------------------------------------------------------------------


def said(answer, image=None):
    mark = "<image>" if image is not None else ""
    turns = (Turn("user", f"{mark}w7"), Turn("assistant", answer))
    return Record(turns, () if image is None else (image,))


def test_the_collator_packs_first_fit():
    from PIL import Image

    picture = Image.new("RGB", (20, 20))
    answers = ["w20", "w21 " * 12, "w22 w23", "w24"]
    records = [said(answers[0]), said("w30", picture), *map(said, answers[1:])]
    plain = Collator(PROCESSORS["llava"]())(records)
    packed = Collator(PROCESSORS["llava"](), pack_text=True)(records)
    lengths = plain["attention_mask"].sum(1).tolist()
    assert lengths == [5, 21, 16, 6, 5]
    # 5 + 16 fill the room of the image's 21 tokens; 6 and 5 begin another row behind it.
    expected = [[0] * 5 + [1] * 16, [0] * 21, [0] * 6 + [1] * 5 + [-1] * 10]
    assert packed["segments"].tolist() == expected
    for row, texts in ((0, [0, 2]), (1, [1]), (2, [3, 4])):
        for name, padding in (("input_ids", 0), ("labels", -100)):
            joined = torch.cat([plain[name][i, : lengths[i]] for i in texts]).tolist()
            assert packed[name][row].tolist() == joined + [padding] * (21 - len(joined))
    assert int(packed["attention_mask"].sum()) == sum(lengths)
    assert int((packed["labels"] != -100).sum()) == int((plain["labels"] != -100).sum())
    assert torch.equal(packed["pixel_values"], plain["pixel_values"])
    alone = Collator(PROCESSORS["llava"](), pack_text=True)(records[1:2])
    assert "segments" not in alone
    with pytest.raises(ValueError, match="pack_text must be False for PaliGemmaProcessor"):
        processor = PROCESSORS["paligemma"]()
        processor.chat_template = plain_template(processor)
        Collator(processor, pack_text=True)


# -- runs ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("objective", ["sft", "cal", "deepalign"])
def test_a_run_learns_the_same(tmp_path, objective):
    from PIL import Image

    picture = Image.new("RGB", (20, 20), (90, 10, 40))
    records = [
        said(f"w{20 + i} " * (1 + i % 5), picture if i % 2 == 0 else None) for i in range(12)
    ]
    histories = []
    for on in (False, True):
        settings = fa.TrainConfig(
            output_dir=str(tmp_path / str(on)), objective=objective, max_steps=3, batch_size=6,
            pack_text=on, log_every=1, save_every=0, learning_rate=1e-3, progress=False,
            adapter=fa.AdapterConfig(shift_layers=(1,), calibration=True),
            cal=CALConfig(normalize="sample"),
            deepalign=fa.objectives.DeepAlignConfig(
                without=("distillation",), classifier_steps=5, classifier_pairs=8
            ),
        )  # fmt: skip
        collate = Collator(PROCESSORS["llava"](), pack_text=on)
        model = family("llava")
        histories.append(fa.train(settings, model=model, dataset=records, collate=collate).history)
    for line, other in zip(*histories, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


def test_settings_that_exclude_packing():
    with pytest.raises(ValueError, match="pack_text must be False with cal.compat="):
        fa.TrainConfig(objective="cal", pack_text=True, cal=CALConfig(compat="official"))
    with pytest.raises(ValueError, match="pack_text must be False with torch_compile"):
        fa.TrainConfig(objective="sft", pack_text=True, torch_compile=True)
    with pytest.raises(ValueError, match="text cannot be packed for Lfm2Vl"):
        fa.train(
            fa.TrainConfig(objective="sft", pack_text=True, progress=False, trainable="all"),
            model=family("lfm2_vl"), dataset=[1], collate=dict,
        )  # fmt: skip
