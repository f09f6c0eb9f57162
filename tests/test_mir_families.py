"""MIR of every family: batches as the command makes them, and the states of the layers."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")
from _processors import PROCESSORS
from PIL import Image

import fastalign as fa
from fastalign import cli, diagnostics
from fastalign.data import Collator, Record, plain_template
from fastalign.settings import Mir
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for

PROCESSED = [name for name in PROCESSORS if name != "mllama"]
WITHOUT_TEMPLATE = ["paligemma", "paligemma2", "instructblip", "instructblip_opt", "blip2"]

pytestmark = pytest.mark.filterwarnings("ignore:.*covariance is singular.*")


def picture(seed, size=(60, 90)):
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=noise, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def words(seed, count=6):
    return " ".join(f"w{i}" for i in range(20 + seed, 20 + seed + count))


def records(count=3):
    """Images of different shapes, and texts of different lengths."""
    return [
        Record.from_caption(picture(i, (60 + 40 * (i % 2), 90)), words(i, 6 + i))
        for i in range(count)
    ]


def processor_of(name):
    processor = PROCESSORS[name]()
    if processor.chat_template is None:
        processor.chat_template = plain_template(processor)
    return processor


def own_inputs(name, processor, record):
    """What the processor itself makes of image and text, without the collator."""
    (image,), answer = record.images, record.turns[-1].text
    if name.startswith("paligemma"):
        inputs = processor(text="<image>", images=image, suffix=answer, return_tensors="pt")
        return {k: v[:, :-1] if v.ndim == 2 else v for k, v in inputs.items()}  # its </s>
    if name in WITHOUT_TEMPLATE:
        return dict(processor(text=answer, images=image, return_tensors="pt"))
    content = {"user": [{"type": "image"}], "assistant": [{"type": "text", "text": answer}]}
    messages = [{"role": role, "content": parts} for role, parts in content.items()]
    text = processor.apply_chat_template(messages, tokenize=False)
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    return dict(processor(text=[text], images=[[image]], **options))


# -- batches -------------------------------------------------------------------------------------


def test_every_family_is_here():
    # The two-tower form is ours: it has no processor of its own.
    assert set(PROCESSORS) | {"smolvlm", "mistral3", "two_towers"} == set(FAMILIES)


@pytest.mark.parametrize("name", PROCESSED)
def test_the_collator_gives_what_the_processor_gives(name):
    processor = processor_of(name)
    record = records()[1]
    batch = Collator(processor)([record])
    expected = own_inputs(name, processor, record)
    taken = fa.VLM(family(name))._inputs & expected.keys()
    assert {"input_ids", "attention_mask", "pixel_values"} <= taken
    for key in taken - {"qformer_input_ids", "qformer_attention_mask"}:
        assert torch.equal(batch[key], expected[key]), key
    assert batch.keys() >= taken


@pytest.mark.parametrize("name", PROCESSED)
def test_a_sample_has_the_states_that_it_has_alone(name):
    # Padding of tokens, tiles and masks changes nothing that MIR sees.
    processor, model = processor_of(name), family(name, dtype=torch.float64)
    vlm, collate, rows = fa.VLM(model), Collator(processor), records()
    double = lambda b: {k: v.double() if v.is_floating_point() else v for k, v in b.items()}
    batch = double(collate(rows))
    with torch.no_grad():
        together = vlm.hidden_states(batch)
        for i, record in enumerate(rows):
            one = double(collate([record]))
            length = one["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][i, :length], one["input_ids"][0])
            for states, alone in zip(together, vlm.hidden_states(one), strict=True):
                torch.testing.assert_close(states[i, :length], alone[0], rtol=0, atol=2e-5)


def test_plain_templates_follow_the_training_of_their_models():
    """PaliGemma: image tokens, bos, text. The Q-Former models: queries, bos, text."""
    for name, tokens in (("paligemma", 16), ("blip2", 4), ("instructblip", 4)):
        batch = Collator(processor_of(name))([Record.from_caption(picture(0), words(0, 2))])
        assert batch["input_ids"].tolist() == [[500] * tokens + [1, 20, 21]]
        assert batch["labels"].tolist() == [[-100] * (tokens + 1) + [20, 21]]


def test_paligemma_marks_the_answer_for_causal_attention():
    batch = Collator(processor_of("paligemma"))(records(2))
    answer = batch["labels"] != -100
    assert torch.equal(batch["token_type_ids"].bool(), answer)


def test_gemma_never_loses_image_tokens():
    # The template's token is not the one that stands for the image afterwards.
    collate = Collator(processor_of("gemma3"), max_length=6, on_overflow="truncate")
    with pytest.raises(ValueError, match="got 17 tokens, 5 of them of images, and max_length=6"):
        collate([Record.from_caption(picture(0), words(0, 8))])


def test_qformer_prompts_of_different_lengths_are_padded():
    processor = processor_of("instructblip")
    rows = [Record.from_caption(picture(i), words(0), prompt=words(3, 1 + 2 * i)) for i in (0, 1)]
    batch = Collator(processor)(rows)
    assert batch["qformer_input_ids"].tolist() == [[1, 23, 0, 0], [1, 23, 24, 25]]
    assert batch["qformer_attention_mask"].sum(1).tolist() == [2, 4]


def test_sized_images_are_padded_and_unsized_ones_are_not():
    class Sized:
        """As Pixtral's processor, which needs torchvision: each image at its own size."""

        chat_template, image_token = "x", "<image>"

        def __init__(self, sizes):
            self.tokenizer, self.sizes = PROCESSORS["llava"]().tokenizer, sizes

        def apply_chat_template(self, messages, **options):
            return PROCESSORS["llava"]().apply_chat_template(messages, **options)

        def __call__(self, text, images, **options):
            ids = self.tokenizer(text[0], add_special_tokens=False)["input_ids"]
            width, height = images[0][0].size
            out = {
                "input_ids": torch.tensor([ids]),
                "pixel_values": torch.ones(1, 3, height, width),
            }
            return out | ({"image_sizes": torch.tensor([[height, width]])} if self.sizes else {})

    rows = [Record.from_caption(Image.new("RGB", size), words(0)) for size in ((2, 5), (4, 3))]
    batch = Collator(Sized(True))(rows)
    assert batch["pixel_values"].shape == (2, 3, 5, 4)
    assert batch["pixel_values"].sum((1, 2, 3)).tolist() == [30.0, 36.0]
    assert batch["pixel_values"][0, 0, :, 2:].sum() == batch["pixel_values"][1, 0, 3:].sum() == 0
    with pytest.raises(ValueError, match="pixel_values must have one shape for all images"):
        Collator(Sized(False))(rows)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("mir")
    (root / "images").mkdir()
    for i in range(4):
        picture(i, (60 + 40 * (i % 2), 90)).save(root / "images" / f"{i}.png")
    lines = [json.dumps({"text": words(i, 10 + i)}) for i in range(4)]
    (root / "texts.jsonl").write_text("\n".join(lines))
    return root


def command(folders, *more):
    where = ["--images", folders / "images", "--texts", folders / "texts.jsonl"]
    argv = ["mir", "--model", folders, *where, "--batch-size", 3, "--samples", 4, *more]
    return cli.main([str(a) for a in argv])


@pytest.mark.parametrize("name", PROCESSED)
def test_the_command_measures_every_family(name, folders, tmp_path, monkeypatch, capsys):
    processor, model = PROCESSORS[name](), family(name)
    monkeypatch.setattr(Mir, "load", lambda options: (fa.VLM(model), processor))
    report = tmp_path / "r.json"
    assert command(folders, "--json", report) == 0
    result, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert len(result["fid"]) == 4 and all(fid > 0 for fid in result["fid"])
    assert result["mir"] == pytest.approx(torch.tensor(result["fid"]).sum().log10().item())
    assert result["resamples"] == 4 and result["mir_standard_error"] > 0
    error = f"MIR {result['mir']:.4f} ± {result['mir_standard_error']:.4f}"
    assert f"{error} (standard error over 4 resamples)" in shown
    plain = "has no chat template: the text follows the image"
    assert (plain in shown) == (name in WITHOUT_TEMPLATE)


def test_a_folder_without_a_chat_template(folders, tmp_path):
    model = family("blip2")
    model.save_pretrained(tmp_path / "blip2")
    PROCESSORS["blip2"]().save_pretrained(tmp_path / "blip2")
    assert command(folders, "--model", tmp_path / "blip2", "--json", tmp_path / "r.json") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["vision_tokens"] == 4 * 4 and result["text_tokens"] == 4 * 11 + 0 + 1 + 2 + 3


def test_cross_attention_is_refused_with_its_reason(folders, monkeypatch, capsys):
    model, processor = family("mllama"), PROCESSORS["mllama"]()
    monkeypatch.setattr(Mir, "load", lambda options: (fa.VLM(model), processor))
    assert command(folders) == 1
    assert "reads them by cross-attention" in capsys.readouterr().err
    batch = family_batch("mllama", model, samples_for("mllama"))
    with pytest.raises(ValueError, match="model must hold images as tokens among the text"):
        diagnostics.measure_mir(fa.VLM(model), [batch])
    with pytest.raises(ValueError, match="processor must put images among the tokens: Mllama"):
        Collator(processor)(records(1))


# -- families whose processors cannot be made here, and all the others -----------------------------


@pytest.mark.parametrize("name", [n for n in FAMILIES + RECURRENT if n != "mllama"])
def test_every_family_has_a_mir_of_its_layers(name):
    """The value equals that of transformers' own hidden states."""
    model = family(name)
    batch = family_batch(name, model, samples_for(name) * 2)
    vlm = fa.VLM(model)
    result = diagnostics.measure_mir(vlm, [batch], method="eigh")
    inputs = {k: v for k, v in batch.items() if k in vlm._inputs}
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=False)
    states = getattr(out, "hidden_states", None) or out.language_model_outputs.hidden_states
    vision, text = vlm.vision_mask(batch), vlm.text_mask(batch)
    expected = fa.metrics.modality_integration_rate(
        [h[vision] for h in states[1:]], [h[text] for h in states[1:]], method="eigh"
    )
    assert result["mir"] == pytest.approx(float(expected), abs=1e-5)
    assert (result["vision_tokens"], result["text_tokens"]) == (int(vision.sum()), int(text.sum()))
