"""Diagnostics: the data against sums done otherwise, and the figures for what they show."""

import math
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image

from fastalign import VLM, diagnostics, metrics
from fastalign.diagnostics import TokenContrast, _contrast


@pytest.fixture(scope="module")
def vlm():
    from fastalign.demo.base import build_model

    return VLM(build_model(0))


@pytest.fixture(scope="module")
def processor():
    from fastalign.demo.base import build_processor

    return build_processor()


@pytest.fixture(scope="module")
def batches(processor):
    from fastalign.data import Collator, Record

    noise = torch.Generator().manual_seed(0)
    captions = ["two red cups", "a red cup on the left", "a blue fish on the right"]
    records = []
    for caption in captions:
        pixels = torch.randint(0, 256, (64, 64, 3), generator=noise, dtype=torch.uint8)
        records.append(Record.from_caption(Image.fromarray(pixels.numpy()), caption))
    collate = Collator(processor)
    return [collate(records[:2]), collate(records[2:])]


# -- modality integration rate -------------------------------------------------------------------


def rows(vlm, batches, select):
    """Hidden states of transformers itself, of all tokens that `select` picks, layer by layer."""
    found = []
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            states = vlm.model(**inputs, output_hidden_states=True).hidden_states[1:]
        found.append([h[select(batch)] for h in states])
    return [torch.cat(layer) for layer in zip(*found, strict=True)]


def is_image(batch):
    return batch["input_ids"] == 3  # "<image>" of the demo's tokenizer


def test_mir_is_that_of_all_tokens_at_once(vlm, batches):
    result = diagnostics.measure_mir(vlm, batches)
    vision = rows(vlm, batches, is_image)
    text = rows(vlm, batches, lambda b: b["attention_mask"].bool() & ~is_image(b))
    expected = float(metrics.modality_integration_rate(vision, text))
    assert result["mir"] == pytest.approx(expected, abs=1e-5)
    assert result["mir"] == pytest.approx(math.log10(sum(result["fid"])), abs=1e-9)
    assert result["layer"] == [1, 2, 3, 4]
    assert (result["vision_tokens"], result["text_tokens"]) == (3 * 64, len(text[0]))


def test_text_after_the_image_leaves_out_bos(vlm, batches):
    everything = diagnostics.measure_mir(vlm, batches)
    after = diagnostics.measure_mir(vlm, batches, text="after")
    assert after["text_tokens"] == everything["text_tokens"] - 3
    text = rows(vlm, batches, lambda b: b["attention_mask"].bool() & (b["input_ids"] > 3))
    special = rows(vlm, batches, lambda b: b["input_ids"] == 2)  # "<eos>"
    text = [torch.cat(pair) for pair in zip(text, special, strict=True)]
    expected = metrics.modality_integration_rate(rows(vlm, batches, is_image), text)
    assert after["mir"] == pytest.approx(float(expected), abs=1e-5)


def test_measuring_leaves_the_model_as_it_was(vlm, batches):
    vlm.model.train()
    try:
        diagnostics.measure_mir(vlm, batches)
        assert vlm.model.training
        assert all(p.grad is None for p in vlm.model.parameters())
    finally:
        vlm.model.eval()


def test_mir_standard_error_is_that_of_leaving_groups_out(vlm, batches):
    result = diagnostics.measure_mir(vlm, batches, resamples=3)
    plain = diagnostics.measure_mir(vlm, batches)
    assert result["fid"] == pytest.approx(plain["fid"], rel=1e-9)
    assert result["vision_tokens"] == plain["vision_tokens"]
    # Three samples, three groups: MIR of each pair of samples.
    first, second = batches
    one = {k: v[:1] for k, v in first.items()}
    other = {k: v[1:2] for k, v in first.items()}
    pairs = [[other, second], [one, second], [first]]
    values = [diagnostics.measure_mir(vlm, pair)["mir"] for pair in pairs]
    mean = sum(values) / 3
    error = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in values))
    assert result["mir_standard_error"] == pytest.approx(error, rel=1e-6)
    assert error > 0 and "mir_standard_error" not in plain


def test_resamples_must_fit(vlm, batches, monkeypatch):
    with pytest.raises(ValueError, match="resamples must be 0, or at least 2: got 1"):
        diagnostics.measure_mir(vlm, batches, resamples=1)
    with pytest.raises(ValueError, match="at most the number of samples: got 4 and 3"):
        diagnostics.measure_mir(vlm, batches, resamples=4)
    monkeypatch.setattr("fastalign.models._mir.free_memory", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"resamples = 9 may take .* GB on cpu, of which 0\.0 GB"):
        diagnostics.measure_mir(vlm, batches, resamples=9)


def test_measuring_builds_no_list_of_hidden_states(vlm, batches, monkeypatch):
    monkeypatch.setattr(type(vlm), "hidden_states", None)
    assert diagnostics.measure_mir(vlm, batches)["layer"] == [1, 2, 3, 4]


def test_mir_needs_both_modalities(vlm, batches):
    words = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3).long()}
    with pytest.raises(ValueError, match="image tokens and text tokens: got {'vision_tokens': 0"):
        diagnostics.measure_mir(vlm, [words])
    with pytest.raises(ValueError, match='text must be "all" or "after"'):
        diagnostics.measure_mir(vlm, batches, text="before")


def test_mir_figure_has_a_named_curve_for_each_model():
    base = {"mir": 1.0, "layer": [1, 2], "fid": [8.0, 2.0]}
    figure = diagnostics.plot_mir_per_layer({"base": base, "tuned": base | {"mir": 0.5}})
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["base (MIR 1.000)", "tuned (MIR 0.500)"]
    assert len({line.get_color() for line in axes.lines}) == 2
    assert axes.lines[0].get_ydata().tolist() == [8.0, 2.0]
    with pytest.raises(ValueError, match="at least one curve"):
        diagnostics.plot_mir_per_layer({})


# -- contrast of label tokens --------------------------------------------------------------------


class Words:
    """A tokenizer of whole words, and a model whose contrasts are given."""

    vocabulary = ("two", " red", " cups", "a")
    deltas = (0.0, 7.0, 3.0, 2.0)

    def decode(self, ids, **options):
        return "".join(self.vocabulary[i] for i in ([ids] if isinstance(ids, int) else ids))

    def contrast(self, batch, mode):
        return torch.tensor(self.deltas)

    def label_rows(self, batch):
        return torch.tensor([0, 0, 0, 2]), torch.tensor([1, 2, 3, 0]), torch.arange(4)


def test_contrast_by_hand():
    # Clamped to 1..5: (1, 5, 3) and (2); averages of up to three neighbours of the same sample:
    # (1 + 5) / 2, (1 + 5 + 3) / 3, (5 + 3) / 2, and 2. The second sample has no label.
    words = Words()
    samples = diagnostics.token_contrast(words, words, {"input_ids": torch.zeros(3, 5)})
    assert samples == [
        [TokenContrast("two", 0, 3), TokenContrast(" red", 7, 3), TokenContrast(" cups", 3, 4)],
        [],
        [TokenContrast("a", 2, 2)],
    ]


def test_contrast_of_a_model(vlm, processor, batches):
    samples = diagnostics.token_contrast(vlm, processor, batches[0])
    delta = [token.delta for tokens in samples for token in tokens]
    assert delta == vlm.contrast(batches[0]).tolist()
    assert "".join(t.text for t in samples[1]) == "a red cup on the left <eos>"


def test_tokens_that_split_a_character():
    class Bytes:
        def decode(self, ids, **options):
            return bytes([ids] if isinstance(ids, int) else ids).decode(errors="replace")

    assert _contrast._pieces(Bytes(), list("aé!".encode())) == ["a", "\ufffd", "é", "!"]


class Spans(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_html_escapes_text_and_needs_nothing_else():
    hostile = "<script>alert('x')</script>&amp;\""
    tokens = [TokenContrast(hostile, 4.0, 2.5), TokenContrast("b", -2.0, 1.0)]
    page = diagnostics.contrast_html([tokens], title=hostile)
    parser = Spans()
    parser.feed(page)
    assert "<script" not in page and "alert" in page
    assert parser.text.count(hostile) == 3  # page title, heading, token
    assert not any(key in attrs for _, attrs in parser.tags for key in ("src", "href"))
    shades = [a for tag, a in parser.tags if tag == "span" and "title" in a]
    assert [a["title"] for a in shades] == [
        "delta +4.000, weight 2.500",
        "delta -2.000, weight 1.000",
    ]
    # Blue (0, 114, 178) at 70 % for the largest delta; orange (213, 94, 0) at 35 % for half of it.
    assert shades[0]["style"] == "background:rgb(76,156,201)"
    assert shades[1]["style"] == "background:rgb(240,199,166)"


def test_heat_map_figure_wraps_and_shows_every_token():
    tokens = [TokenContrast(text, 1.5, 1.0) for text in ["$x_1$", " ", "\n", "w" * 60, "end"]]
    figure = diagnostics.plot_token_contrast(
        [tokens, [TokenContrast("b", math.nan, 1.0)]], title="t"
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in texts if t in ("$x_1$", "\u2423", "\\n", "w" * 39 + "…", "end", "b")] == [
        "$x_1$", "\u2423", "\\n", "w" * 39 + "…", "end", "b",
    ]  # fmt: skip
    assert texts.count("+1.5") == 5 and "t" in texts
    boxes = figure.axes[0].patches
    assert max(box.get_x() + box.get_width() for box in boxes) <= figure.axes[0].get_xlim()[1]
    assert len({box.get_y() for box in boxes}) == 2
    with pytest.raises(ValueError, match="at least one token"):
        diagnostics.plot_token_contrast([[]])


# -- similarity of patches -----------------------------------------------------------------------

HALF = math.sqrt(0.5)
STUDENT = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])


@pytest.mark.parametrize(
    ("teacher", "correlation"),
    [
        # Pairs (01, 02, 12): student (0, h, h); centred, that is (-2, 1, 1) h / 3.
        ([[1.0, 0], [5, 0], [0, 1]], -1.0),  # (1, 0, 0), centred (2, -1, -1) / 3
        ([[1.0, 0], [0, 1], [0, 4]], 0.5),  # (0, 0, 1), centred (-1, -1, 2) / 3: 3 / 6
        ([[1.0, 0], [0, 1], [1, 1]], 1.0),
    ],
)
def test_patch_similarity_by_hand(teacher, correlation):
    result = diagnostics.patch_similarity(STUDENT, torch.tensor(teacher))
    expected = torch.tensor([[1, 0, HALF], [0, 1, HALF], [HALF, HALF, 1]])
    torch.testing.assert_close(result.student, expected)
    assert result.correlation == pytest.approx(correlation, abs=1e-12)


def test_patch_similarity_does_not_depend_on_lengths():
    noise = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(9, d, generator=noise) for d in (5, 7))
    scale = torch.rand(9, 1, generator=noise) + 0.1
    first = diagnostics.patch_similarity(student, teacher)
    second = diagnostics.patch_similarity(student * scale, teacher / scale)
    assert first.correlation == pytest.approx(second.correlation, abs=1e-6)
    assert diagnostics.patch_similarity(student.bfloat16(), teacher).student.dtype == torch.float32


def test_patch_similarity_at_the_edges():
    zero = diagnostics.patch_similarity(STUDENT * torch.tensor([[0.0], [1], [1]]), STUDENT)
    assert zero.student[0].tolist() == [0, 0, 0]
    assert math.isnan(diagnostics.patch_similarity(torch.ones(4, 3), torch.randn(4, 3)).correlation)
    for teacher in (torch.ones(4, 2), torch.ones(3), torch.ones(1, 3, 2)):
        with pytest.raises(ValueError, match=r"must be \(n, d\) and \(n, dt\) with the same n"):
            diagnostics.patch_similarity(STUDENT, teacher)
    with pytest.raises(ValueError, match="n >= 3"):
        diagnostics.patch_similarity(STUDENT[:2], STUDENT[:2])


def test_patch_figure():
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(3, 6, 4, generator=noise)
    before, after = (diagnostics.patch_similarity(f, features[2]) for f in features[:2])
    figure = diagnostics.plot_patch_similarity(before, after, grid=(2, 3), query=(1, 2))
    maps = [axes for axes in figure.axes if axes.images]
    shapes = [axes.images[0].get_array().shape for axes in maps]
    assert sorted(shapes) == [(2, 3)] * 3 + [(6, 6)] * 3
    titles = [axes.get_title() for axes in maps if axes.get_title()]
    assert titles[0] == "teacher"
    assert titles[2] == f"student after\n(correlation {after.correlation:.3f})"
    shown = next(a for a in maps if a.get_title().startswith("student after")).images[0].get_array()
    torch.testing.assert_close(torch.as_tensor(shown.data), after.student[5].view(2, 3))
    assert (
        len([a for a in diagnostics.plot_patch_similarity(before, grid=(3, 2)).axes if a.images])
        == 4
    )
    with pytest.raises(ValueError, match="grid must have one place for each of 6 patches"):
        diagnostics.plot_patch_similarity(before, grid=(2, 2))
    with pytest.raises(ValueError, match="query must lie in the 2 x 3 grid"):
        diagnostics.plot_patch_similarity(before, grid=(2, 3), query=(2, 0))


# -- learning curves and files -------------------------------------------------------------------


def test_learning_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 2.0}\n\n{"step": 20, "loss": 1.0, "mir": 0.5}\n')
    for source in (path, tmp_path):
        curve = diagnostics.learning_curve(source)
        assert curve["step"] == [10, 20] and curve["loss"] == [2.0, 1.0]
        assert math.isnan(curve["mir"][0]) and curve["mir"][1] == 0.5
    figure = diagnostics.plot_learning_curve(
        {"a": curve, "b": {"step": [1], "loss": [3.0]}}, terms=("loss", "mir")
    )
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[0].get_xlabel() == "optimizer step"
    with pytest.raises(ValueError, match=r"got 'lss', known are \['loss', 'mir', 'step'\]"):
        diagnostics.plot_learning_curve({"a": curve}, terms=("lss",))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "at least one line"), ("{", "line 1: not valid JSON"), ('{"loss": 1}', '"step"')],
)
def test_broken_learning_curve(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        diagnostics.learning_curve(tmp_path / "m.jsonl")
    with pytest.raises(FileNotFoundError, match="is no file"):
        diagnostics.learning_curve(tmp_path)


def test_figures_are_saved_at_150_dpi_and_nothing_global_changes(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    figure = diagnostics.plot_mir_per_layer({"a": {"mir": 1.0, "layer": [1, 2], "fid": [8.0, 2.0]}})
    diagnostics.save_figure(figure, tmp_path / "new" / "mir.png")
    with Image.open(tmp_path / "new" / "mir.png") as image:
        width, height = figure.get_size_inches()
        assert image.size == (round(width * 150), round(height * 150))
        assert len(image.convert("L").getcolors()) > 20
    assert before == (dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastalign\[viz\]"'):
        diagnostics.plot_mir_per_layer({"a": {"mir": 1.0, "layer": [1], "fid": [8.0]}})
