"""`fastalign diagnose`, run as a user runs it, on the demo's trained base."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
from PIL import Image

from fastalign import VLM, AdapterConfig, attach, cli, diagnostics, save_adapter
from fastalign.commands.diagnose import DIAGNOSTICS
from fastalign.data import Collator, Record, load_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The base, an adapter, images and texts, records, class folders and a text file."""
    from fastalign.demo.base import load_base, save_base
    from fastalign.demo.scenes import scenes

    root = tmp_path_factory.mktemp("diagnose")
    base = load_base()
    save_base(base, root / "base")
    attach(base, AdapterConfig(shift_layers=(2,)))
    save_adapter(base, root / "adapter")
    data, records = scenes(12, seed=11), []
    for name in ("images", "texts", "classes/left", "classes/right"):
        (root / name).mkdir(parents=True)
    for i, caption in enumerate(data.captions):
        picture = Image.fromarray(data.images[i])
        picture.save(root / "images" / f"{i}.png")
        shade = picture.point(lambda v, i=i: v // 4 if i % 2 else 191 + v // 4)
        shade.save(root / "classes" / ("left", "right")[i % 2] / f"{i}.png")
        (root / "texts" / f"{i}.txt").write_text(caption)
        records.append({"image": f"images/{i}.png", "caption": caption})
    (root / "data.json").write_text(json.dumps(records))
    (root / "text.txt").write_text("\n".join(data.captions * 4))
    return root


def diagnose(folder, tmp_path, what, *options):
    """The data that a diagnostic wrote; its figure was written too."""
    files = tmp_path / "out" / "r.json", tmp_path / "out" / "r.png"
    argv = ["diagnose", what, "--model", folder / "base", "--device", "cpu", *options]
    argv += ["--json", files[0], "--figure", files[1]]
    assert cli.main([str(a) for a in argv]) == 0
    assert files[1].stat().st_size > 1000
    result = json.loads(files[0].read_text())
    assert result["model"] == str(folder / "base")
    return result


def fails(capsys, *argv):
    """The line on stderr that says what is wrong."""
    assert cli.main([str(a) for a in ("diagnose", *argv)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1]


def loaded(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder / "base").eval()
    return VLM(model), AutoProcessor.from_pretrained(folder / "base")


def test_help_lists_every_diagnostic(capsys):
    assert cli.main(["diagnose", "--help"]) == 0 == cli.main(["diagnose"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in DIAGNOSTICS)
    assert cli.main(["diagnose", "gapp"]) == 2
    assert "no diagnostic 'gapp'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("gap", ["--images", "--texts", "--data", "--samples", "--max-length"]),
        ("embedding", ["--layers", "--tokens", "--perplexity", "--seed"]),
        ("attention", ["--image", "--text", "--layer", "--view"]),
        ("words", ["--image", "--layers", "--top"]),
        ("probe", ["--images", "--per-class", "--folds", "--regularization"]),
        ("perplexity", ["--texts", "--window", "--stride", "--max-tokens"]),
        ("blind", ["--data", "--image-root", "--samples"]),
    ],
)
def test_every_diagnostic_has_help(capsys, what, options):
    assert cli.main(["diagnose", what, "--help"]) == 0
    shown = capsys.readouterr().out
    common = ["--model", "--adapter", "--device", "--json", "--figure"]
    assert all(option in shown for option in [*options, *common])
    assert f"fastalign diagnose {what}" in shown


def test_gap(folder, tmp_path, capsys):
    options = ["--data", folder / "data.json", "--samples", "5", "--batch-size", "2"]
    found = diagnose(folder, tmp_path, "gap", *options)
    assert found["layer"] == [0, 1, 2, 3, 4] and found["vision_tokens"] == 5 * 64
    shown = capsys.readouterr()
    assert f"{found['relative_distance'][3]:.3g}" in shown.out and "tokens/s" in shown.err
    folders = ["--images", folder / "images", "--texts", folder / "texts", "--samples", "20"]
    found = diagnose(folder, tmp_path, "gap", *folders)
    assert found["samples"] == 12
    assert "12 samples: there are 12 images and 12 texts" in capsys.readouterr().out


def test_embedding(folder, tmp_path, capsys):
    options = ["--data", folder / "data.json", "--layers", "0", "4", "--tokens", "20"]
    found = diagnose(folder, tmp_path, "embedding", *options, "--perplexity", "8")
    assert list(found["layers"]) == ["0", "4"] and len(found["layers"]["4"]) == 40
    assert f"{found['own_neighbour']['4']:.3f}" in capsys.readouterr().out


def test_attention(folder, tmp_path, capsys):
    options = ["--image", folder / "images/0.png", "--text", "two red cups", "--layer", "2"]
    found = diagnose(folder, tmp_path, "attention", *options)
    vlm, processor = loaded(folder)
    record = Record.from_caption(folder / "images/0.png", "two red cups")
    own = diagnostics.image_attention(vlm, Collator(processor)([record]))
    for mine, theirs in zip(found["share"], own.share.tolist(), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert found["grids"] == [[8, 8]] and len(found["maps"][0][1]) == 8
    assert f"attention to all tokens alike: {own.uniform:.3f}" in capsys.readouterr().out


def test_words(folder, tmp_path, capsys):
    options = ["--image", folder / "images/0.png", "--layers", "0", "2", "--top", "2"]
    found = diagnose(folder, tmp_path, "words", *options)
    assert list(found["layers"]) == ["0", "2"]
    last = found["layers"]["2"][-1]
    assert (last["row"], last["column"]) == (7, 7) and len(last["words"]) == 2
    assert repr(last["words"][0]) in capsys.readouterr().out


def test_probe(folder, tmp_path, capsys):
    options = ["--images", folder / "classes", "--folds", "3", "--layers", "1", "4"]
    found = diagnose(folder, tmp_path, "probe", *options, "--batch-size", "5")
    assert (found["samples"], found["classes"], found["chance"]) == (12, 2, 0.5)
    assert found["layer"] == [1, 4] and found["accuracy"] == [1.0, 1.0]
    shown = capsys.readouterr().out
    assert "12 images of 2 classes, chance 0.500" in shown and "tower" in shown
    found = diagnose(folder, tmp_path, "probe", *options, "--per-class", "4")
    assert found["samples"] == 8
    lone = ["--images", folder / "images", "--model", folder / "base"]
    assert "at least two sub-folders of images" in fails(capsys, "probe", *lone)


def test_perplexity(folder, tmp_path, capsys):
    options = ["--texts", folder / "text.txt", "--window", "64"]
    found = diagnose(folder, tmp_path, "perplexity", *options)
    vlm, processor = loaded(folder)
    text = (folder / "text.txt").read_text()
    own = diagnostics.perplexity(vlm, processor, [text], window=64)
    assert found["nats"] == pytest.approx(own["nats"], rel=1e-5)
    assert found["tokens"] == own["tokens"] > 500
    assert f"{found['tokens']} tokens in {found['windows']} windows" in capsys.readouterr().out
    adapted = diagnose(folder, tmp_path, "perplexity", *options, "--adapter", folder / "adapter")
    assert adapted["difference"]["nats"] == 0.0
    assert "difference with the adapter: +0.00000 nats" in capsys.readouterr().out
    image = ["--image", folder / "images/0.png"]
    behind = diagnose(folder, tmp_path, "perplexity", *options, *image)
    assert behind["tokens"] == found["tokens"] + 1  # the first token has the prompt before it
    assert behind["nats"] != pytest.approx(found["nats"], abs=1e-3)
    (tmp_path / "empty.jsonl").write_text("")
    none = ["--texts", tmp_path / "empty.jsonl", "--model", folder / "base"]
    assert "texts must hold at least one text" in fails(capsys, "perplexity", *none)


def test_blind(folder, tmp_path, capsys):
    options = ["--data", folder / "data.json", "--samples", "8", "--batch-size", "3"]
    found = diagnose(folder, tmp_path, "blind", *options, "--seed", "4")
    assert found["samples"] == 8 and found["same_image"] == 0
    assert found["image"]["accuracy"] > found["shuffled"]["accuracy"] + 0.1
    shown = capsys.readouterr().out
    assert f"{found['difference']['none']['accuracy']:.4f}" in shown
    whole = diagnose(folder, tmp_path, "blind", "--data", folder / "data.json")
    vlm, processor = loaded(folder)
    records = load_records(folder / "data.json")
    own = diagnostics.blind_accuracy(vlm, records, Collator(processor))
    assert whole["image"]["accuracy"] == pytest.approx(own["image"]["accuracy"], abs=1e-6)
    assert whole["none"]["cross_entropy"] == pytest.approx(own["none"]["cross_entropy"], rel=1e-5)


def test_errors_are_one_line(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", folder / "base"]
    error = fails(capsys, "gap", *model, "--images", folder / "images")
    assert "images and texts must be given, or data in place of both" in error
    assert "samples must be at least 1" in fails(
        capsys, "blind", *model, "--data", folder / "data.json", "--samples", 0
    )
    missing = ["--image", tmp_path / "gone.png", "--text", "a"]
    assert "gone.png is not a file" in fails(capsys, "attention", *model, *missing)
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    error = fails(capsys, "embedding", *model, "--data", folder / "data.json")
    assert 'pip install "fastalign[diagnostics]"' in error


def test_images_of_records_are_drawn_and_text_alone_is_not(folder, tmp_path, capsys):
    talk = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "talk.json").write_text(json.dumps([talk]))
    error = fails(capsys, "blind", "--model", folder / "base", "--data", tmp_path / "talk.json")
    assert "data must hold a record with an image" in error
    assert torch.is_grad_enabled()
