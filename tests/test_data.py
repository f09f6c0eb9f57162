"""Records and the collator, on a LLaVA processor small enough to count its tokens by hand."""

import json
import logging

import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from fastalign.data import (
    Collator,
    Record,
    Turn,
    image_folder,
    load_records,
    open_image,
    text_folder,
)

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "describe"]
WORDS += ["a", "red", "cup", "blue", "hat", "two"]
PAD, BOS, EOS, UNK, IMG, USER, ASSISTANT, DESCRIBE, A, RED, CUP, BLUE, HAT, TWO = range(14)
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
N = 4  # image tokens of one 16 x 16 image in 8 x 8 patches


def wrap(tokenizer, *, template="{{ bos_token }}" + TEMPLATE):
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def word_tokenizer(**options):
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **(names | options))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    return wrap(word_tokenizer())


def picture(color="red", size=(20, 30)):
    return Image.new("RGB", size, color)


def talk(*texts, images=(), id=None):
    roles = ("user", "assistant")
    return Record(tuple(Turn(roles[i % 2], t) for i, t in enumerate(texts)), tuple(images), id)


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# -- records from files --------------------------------------------------------------------------


def llava(**changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cup."}]
    return {"id": 7, "image": "a/b.png", "conversations": turns} | changes


def test_reads_llava_json(tmp_path):
    (record,) = load_records(write(tmp_path / "x.json", [llava()]))
    assert record == Record(
        (Turn("user", "<image>\nWhat?"), Turn("assistant", "A cup.")), (tmp_path / "a/b.png",), "7"
    )


def test_jsonl_captions_and_text_only(tmp_path):
    lines = [
        {"image": "b.png", "caption": "a cup"},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    ]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    captioned, text = load_records(path, tmp_path / ".")
    assert captioned.turns == (Turn("user", "<image>"), Turn("assistant", "a cup"))
    assert captioned.images == (tmp_path / "b.png",)
    assert text.images == () and text.turns[1].text == "yes"


def test_image_without_mark_comes_first(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Two."}]
    path = write(tmp_path / "x.json", [llava(image=["a.png", "b.png"], conversations=turns)])
    assert load_records(path)[0].turns[0].text == "<image>\n<image>\nWhat?"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "record 1: a record must be an object"),
        ({"image": "a.png"}, "record 1: conversations or caption must be present"),
        ({"caption": "a"}, "image must name the one image"),
        ({"image": "a.png", "caption": " "}, "caption must be a non-empty string"),
        (llava(image=3), "image must be a path"),
        (llava(image="../secret.png"), "image must lie inside image_root"),
        (llava(image="a/../../secret.png"), "image must lie inside image_root"),
        (llava(image="/etc/secret.png"), "image must lie inside image_root"),
        (llava(video="a.mp4"), "video is not supported"),
        (llava(conversations=[]), "conversations must be a non-empty list"),
        (llava(conversations=["hi"]), r"conversations\[0\] must be an object"),
        (llava(conversations=[{"from": "bot", "value": ""}]), r"conversations\[0\].from must be"),
        (llava(conversations=[{"from": "gpt"}]), r"conversations\[0\].value must be a string"),
        (llava(image=["a.png", "b.png"]), "got 1 marks and 2 images"),
        (llava(image=None), "got 1 marks and 0 images"),
        (llava(conversations=[{"from": "human", "value": "<image>"}]), "end with gpt"),
        (
            llava(
                conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}]
            ),
            r"conversations\[1\].value must hold the text to learn",
        ),
        (
            llava(
                conversations=[{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]
            ),
            r"conversations\[1\].value must hold no <image>",
        ),
    ],
)
def test_bad_record_names_file_record_and_field(tmp_path, record, message):
    path = write(tmp_path / "bad.json", [llava(), record])
    with pytest.raises(ValueError, match=message) as error:
        load_records(path)
    assert f"{path}: record 1: " in str(error.value)


def test_skip_leaves_bad_records_out_with_a_warning(tmp_path, caplog):
    path = write(tmp_path / "x.json", [llava(), {}, llava(id="last")])
    with caplog.at_level(logging.WARNING, "fastalign.data"):
        records = load_records(path, on_error="skip")
    assert [r.id for r in records] == ["7", "last"]
    assert "record 1 skipped" in caplog.text
    with pytest.raises(ValueError, match="at least one usable record"):
        load_records(write(tmp_path / "y.json", [{}]), on_error="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[{", "not valid JSON"), ('{"a": 1}\n{', "line 2: not valid JSON"), ("", "holds none")],
)
def test_broken_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_records(write(tmp_path / "x.json", text))


def test_missing_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json is not a file"):
        load_records(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="image_root must be a folder"):
        load_records(write(tmp_path / "x.json", [llava()]), tmp_path / "nowhere")
    (tmp_path / "latin.json").write_bytes(b'[{"caption": "\xe9"}]')
    with pytest.raises(ValueError, match="latin.json: must be UTF-8"):
        load_records(tmp_path / "latin.json")
    with pytest.raises(ValueError, match="on_error must be one of"):
        load_records(tmp_path / "x.json", on_error="ignore")


def test_folders(tmp_path):
    for name in ("b.JPG", "sub/a.png", ".hidden.png", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, " one \n")
    write(tmp_path / "z.jsonl", '{"text": "two"}\n{"text": "three"}\n')
    assert image_folder(tmp_path) == [tmp_path / "b.JPG", tmp_path / "sub/a.png"]
    assert text_folder(tmp_path) == ["one", "two", "three"]
    assert text_folder(tmp_path / "z.jsonl") == ["two", "three"]


def test_empty_folders_raise(tmp_path):
    with pytest.raises(ValueError, match="images must hold at least one image"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="texts must hold at least one text"):
        text_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="images must be a folder"):
        image_folder(tmp_path / "nowhere")
    write(tmp_path / "x.jsonl", '{"txt": "two"}')
    with pytest.raises(ValueError, match="record 0: text must hold a non-empty text"):
        text_folder(tmp_path)


# -- batches -------------------------------------------------------------------------------------


def test_batch_by_hand(processor):
    batch = Collator(processor)(
        [Record.from_caption(picture(), "a red cup"), talk("describe", "hat")]
    )
    prompt = [BOS, USER, *[IMG] * N, ASSISTANT]
    ids = [[*prompt, A, RED, CUP, EOS], [BOS, USER, DESCRIBE, ASSISTANT, HAT, EOS, *[PAD] * 5]]
    labels = [[-100] * 7 + [A, RED, CUP, EOS], [-100] * 4 + [HAT, EOS] + [-100] * 5]
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == [[1] * 11, [1] * 6 + [0] * 5]
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert sorted(batch) == ["attention_mask", "input_ids", "labels", "pixel_values"]


def test_items_of_a_dataset_are_records_too(processor):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "hat"}]
    items = [
        {"id": 3, "image": picture(), "conversations": turns},
        {"image": picture(), "caption": "hat"},
    ]
    first, second = Collator(processor)(items)["input_ids"]
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="record 3: conversations must be a non-empty list"):
        Collator(processor)([{"id": 3, "conversations": []}])


def test_every_answer_of_a_conversation_is_learned_and_images_keep_their_order(processor):
    red, blue = picture("red"), picture("blue")
    record = talk("<image>\n", "a red cup", "describe\n<image>", "blue hat", images=(red, blue))
    batch = Collator(processor)([record])
    learned = batch["labels"][0]
    assert learned[learned != -100].tolist() == [A, RED, CUP, EOS, BLUE, HAT, EOS]
    assert int((batch["input_ids"] == IMG).sum()) == 2 * N
    whole = processor.image_processor([red, blue], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], whole)


def test_same_tokens_as_the_processor_on_the_whole_text(processor):
    record = talk("<image>describe", "a red cup", "two", "hat", images=(picture(),))
    content = [{"type": "image"}, {"type": "text", "text": "describe"}]
    messages = [{"role": "user", "content": content}]
    for i, text in enumerate(["a red cup", "two", "hat"]):
        role = ("assistant", "user")[i % 2]
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    text = processor.apply_chat_template(messages)
    whole = processor(text=text, images=[picture()], return_tensors="pt", add_special_tokens=False)
    assert Collator(processor)([record])["input_ids"].tolist() == whole["input_ids"].tolist()


def test_batch_without_image_has_no_pixels(processor):
    assert "pixel_values" not in Collator(processor)([talk("describe", "hat")])


@pytest.mark.parametrize("in_template", [True, False])
def test_one_bos(in_template):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    processor = wrap(tokenizer, template=("{{ bos_token }}" if in_template else "") + TEMPLATE)
    for record in (talk("describe", "hat"), Record.from_caption(picture(), "hat")):
        ids = Collator(processor)([record])["input_ids"][0].tolist()
        assert ids[0] == BOS and ids.count(BOS) == 1


def test_sentencepiece_gives_answers_the_tokens_they_have_in_the_whole_text():
    # Unigram with a space before the first word, as Llama's: alone, " red" begins with two spaces.
    pieces = ["▁", "▁USER", ":", "▁ASSISTANT", "▁red", "▁cup", "red", "cup", "USER", "ASSISTANT"]
    raw = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], unk_id=0)
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = TEMPLATE.replace("{{ eos_token }}", "").replace("c['text'] + ' '", "c['text']")
    batch = Collator(wrap(tokenizer, template=template))([talk("red", "red cup")])
    assert tokenizer.convert_ids_to_tokens(tokenizer(" red cup")["input_ids"])[0] == "▁"
    learned = batch["labels"][batch["labels"] != -100]
    assert tokenizer.convert_ids_to_tokens(learned) == ["▁red", "▁cup"]
    assert batch["input_ids"][0].tolist() == tokenizer("USER: redASSISTANT: red cup")["input_ids"]


def test_unknown_character_before_an_answer_swallows_nothing(processor):
    # One unknown word, "¿cup!", when tokenised as one text; "¿" alone is the same unknown token.
    template = TEMPLATE.replace("m['role'].upper() + ': '", "m['role'] + ' ¿'")
    template = template.replace("ASSISTANT:", "assistant ¿")
    batch = Collator(wrap(processor.tokenizer, template=template))([talk("describe", "cup! hat")])
    assert batch["labels"][batch["labels"] != -100].tolist() == [UNK, HAT, EOS]


def test_append_eos(processor):
    plain = wrap(processor.tokenizer, template=TEMPLATE.replace("{{ eos_token }}", ""))
    last = [
        Collator(plain, append_eos=on)([talk("describe", "hat")])["labels"][0, -1] for on in (0, 1)
    ]
    assert [int(i) for i in last] == [HAT, EOS]
    twice = Collator(processor, append_eos=True)([talk("describe", "hat")])["input_ids"]
    assert int((twice == EOS).sum()) == 1


def test_pixels_follow_exif_and_become_rgb(processor, tmp_path):
    left_red = picture("blue", (16, 16))
    left_red.paste((255, 0, 0), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    left_red.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.getpixel((12, 2)) == (255, 0, 0) and upright.getpixel((2, 12)) == (0, 0, 255)
    assert open_image(Image.new("L", (4, 4), 9)).mode == "RGB"
    batch = Collator(processor)([Record.from_caption(tmp_path / "turned.png", "hat")])
    expected = processor.image_processor([upright], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_unreadable_images_name_the_path(processor, tmp_path):
    picture(size=(64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    write(tmp_path / "text.png", "no image")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=rf"record 5: image must be readable: .*{name}"):
            Collator(processor)([Record.from_caption(tmp_path / name, "hat", id="5")])
    with pytest.raises(FileNotFoundError, match=r"records\[0\]: .*gone.png is not a file"):
        Collator(processor)([Record.from_caption(tmp_path / "gone.png", "hat")])


def test_skip_leaves_out_what_cannot_be_used(processor, tmp_path, caplog):
    records = [Record.from_caption(tmp_path / "gone.png", "hat"), talk("describe", "hat")]
    with caplog.at_level(logging.WARNING, "fastalign.data"):
        batch = Collator(processor, on_error="skip")(records)
    assert batch["input_ids"].shape == (1, 6) and "records[0] skipped" in caplog.text
    with pytest.raises(ValueError, match="all 1 were skipped"):
        Collator(processor, on_error="skip")(records[:1])


def test_images_are_never_cut(processor):
    # <s> USER: and two of the four image tokens would be left of 11.
    for mode in ("raise", "truncate"):
        with pytest.raises(
            ValueError, match="got 11 tokens, 4 of them of images, and max_length=4"
        ):
            Collator(processor, max_length=4, on_overflow=mode)(
                [Record.from_caption(picture(), "a red cup")]
            )


def test_overflow(processor):
    record = Record.from_caption(picture(), "a red cup")
    with pytest.raises(ValueError, match='pass on_overflow="truncate"'):
        Collator(processor, max_length=9)([record])
    cut = Collator(processor, max_length=9, on_overflow="truncate")([record])
    assert cut["labels"][0].tolist() == [-100] * 7 + [A, RED]
    assert cut["input_ids"].shape == cut["attention_mask"].shape == (1, 9)
    with pytest.raises(ValueError, match="max_length must leave a label"):
        Collator(processor, max_length=7, on_overflow="truncate")([record])
    assert Collator(processor, max_length=11)([record])["input_ids"].shape == (1, 11)


def test_image_token_in_text_raises(processor):
    other = wrap(word_tokenizer())
    other.image_token = "<pad>"  # a model whose image token is not LLaVA's mark
    other.image_token_id = PAD
    for record in (talk("a <pad> cup", "hat"), talk("describe", "a <pad> hat")):
        with pytest.raises(ValueError, match="must not spell the image token '<pad>'"):
            Collator(other)([record])


def test_template_that_rewrites_earlier_turns_raises(processor):
    template = "{{ messages|length }}" + TEMPLATE
    with pytest.raises(ValueError, match="the chat template of LlavaProcessor must render"):
        Collator(wrap(processor.tokenizer, template=template))([talk("describe", "hat")])


def test_bad_arguments(processor):
    with pytest.raises(ValueError, match="at least one record"):
        Collator(processor)([])
    with pytest.raises(ValueError, match="on_overflow must be one of raise, truncate"):
        Collator(processor, on_overflow="drop")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        Collator(processor, max_length=1)
    with pytest.raises(ValueError, match="processor must have a chat_template"):
        Collator(wrap(processor.tokenizer, template=None))
    with pytest.raises(ValueError, match="append_eos must be False"):
        Collator(wrap(word_tokenizer(eos_token=None)), append_eos=True)


def test_answer_without_tokens_raises(processor):
    template = TEMPLATE.replace("{{ eos_token }}", "").replace("{{ c['text'] + ' ' }}", "")
    with pytest.raises(ValueError, match="an answer with at least one token"):
        Collator(wrap(processor.tokenizer, template=template))([talk("describe", "hat")])


def test_other_tensors_of_the_processor_are_kept():
    class Tiled:
        """A processor like LLaVA-NeXT's: tiles by image, image sizes, and a type for each token."""

        chat_template, image_token, image_token_id = "x", "<image>", IMG
        tokenizer = word_tokenizer()

        def apply_chat_template(self, messages, **options):
            return wrapped.apply_chat_template(messages, **options)

        def __call__(self, text, images, **options):
            ids = self.tokenizer(text[0], add_special_tokens=False)["input_ids"]
            width = images[0][0].width
            return {
                "input_ids": torch.tensor([ids]),
                "attention_mask": torch.ones(1, len(ids)),
                "mm_token_type_ids": torch.tensor([[int(i == IMG) for i in ids]]),
                "pixel_values": torch.ones(1, width, 3, 2, 2),
                "image_sizes": torch.tensor([[images[0][0].height, width]]),
            }

    wrapped = wrap(word_tokenizer())
    records = [Record.from_caption(picture(size=(w, 5)), "a hat") for w in (2, 3)]
    batch = Collator(Tiled())([*records, talk("describe", "hat")])
    assert batch["image_sizes"].tolist() == [[5, 2], [5, 3]]
    assert batch["pixel_values"].sum((2, 3, 4)).tolist() == [[12, 12, 0], [12, 12, 12]]
    assert torch.equal(batch["mm_token_type_ids"].bool(), batch["input_ids"] == IMG)
