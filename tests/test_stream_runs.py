"""Runs over streams: samples that cannot be used, and runs that are cut and go on."""

import json
import shutil
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
from _processors import PROCESSORS
from _streams import SHARDS, config, parts, write_all

import fastalign as fa
from fastalign._run.stream_order import StreamSampler
from fastalign.data import Collator, CountedBatch, SampleError, open_stream
from fastalign.data._skip import StreamReplacing
from fastalign.data._stream_blocks import ordered
from fastalign.testing.families import family


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("stream"))


# -- samples that cannot be used -----------------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt(stored, tmp_path_factory):
    """JSONL in which samples 1 and 8 are no JSON, and 4 has no answer."""
    folder = tmp_path_factory.mktemp("spoilt")
    for n, part in enumerate(parts()):
        lines = []
        for i, (turns, _) in enumerate(part):
            which = 5 * n + i
            turns = turns[:1] if which == 4 else turns
            line = json.dumps({"conversations": turns})
            lines.append(line[:-3] if which in (1, 8) else line)
        (folder / f"{n}.jsonl").write_text("\n".join(lines))
    return folder


def collated(spoilt, start=0, state=None, workers=0, **changes):
    settings = config(on_bad_sample="skip", max_steps=6, num_workers=workers, **changes)
    stream = open_stream(spoilt)
    sampler = StreamSampler(stream, settings, 0, 1, start, state)
    collate = StreamReplacing(Collator(PROCESSORS["llava"]()))
    return sampler, torch.utils.data.DataLoader(
        stream, batch_sampler=sampler, collate_fn=collate, num_workers=workers
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_spares_take_the_place_of_bad_samples(spoilt, workers):
    whole = list(collated(spoilt)[1])
    skipped = Counter()
    for batch in whole:
        assert isinstance(batch, CountedBatch) and len(batch["input_ids"]) == batch.samples == 2
        skipped.update(batch.skipped)
    # 24 samples: one epoch and 11 of the next.
    assert set(skipped) == {"invalid_record"} and 3 <= skipped["invalid_record"] <= 8
    sampler, loader = collated(spoilt, workers=workers)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = json.loads(json.dumps(sampler.state(2)))
    assert len(sampler._marks) <= 2 * workers + 5
    later = list(collated(spoilt, 2, state, workers)[1])
    for batch, other in zip(later, whole[4:], strict=True):
        assert batch.skipped == other.skipped
        assert all(torch.equal(batch[name], other[name]) for name in other)
    divided = collated(spoilt, batch_size=4, gradient_accumulation_steps=1)[1]
    for batch, halves in zip(divided, zip(whole[::2], whole[1::2], strict=True), strict=True):
        assert batch.skipped == Counter(halves[0].skipped) + Counter(halves[1].skipped)


def test_a_bad_item_names_itself(spoilt):
    items = ordered(open_stream(spoilt / "0.jsonl"), 0, 1)
    found = [next(items)[0] for _ in range(5)]
    with pytest.raises(
        SampleError, match="0.jsonl: record 1: Expecting|0.jsonl: record 1: .*delim"
    ):
        found[1].record()
    with pytest.raises(ValueError, match="none of 1 was; the last one: .*record 4: conversations"):
        StreamReplacing(Collator(PROCESSORS["llava"]()))([found[4]])


# -- runs ----------------------------------------------------------------------------------------


def run(folder, data, **changes):
    settings = dict(
        output_dir=str(folder), objective="cal", max_steps=6, batch_size=2, log_every=1,
        gradient_accumulation_steps=2, save_every=3, shuffle_buffer=5, learning_rate=1e-2,
        adapter=fa.AdapterConfig(shift_layers=(1,), calibration=True), progress=False,
    )  # fmt: skip
    collate = Collator(PROCESSORS["llava"]())
    return fa.train(
        fa.TrainConfig(**(settings | changes)),
        model=family("llava"), dataset=data, collate=collate,
    )  # fmt: skip


def lines_of(result):
    timed = ("tokens_per_s", "images_per_s", "peak_mib", "mir_seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in result.history]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("parquet", {"num_workers": 1}),
        ("tar", {"group_by_length": True, "on_bad_sample": "skip"}),
        ("jsonl", {"objective": "deepalign"}),
    ],
)
def test_a_run_resumes_bit_equal(stored, tmp_path, kind, changes):
    if "objective" in changes:
        changes = changes | {
            "deepalign": fa.objectives.DeepAlignConfig(
                without=("distillation",), classifier_steps=5, classifier_pairs=6
            )
        }
    whole = run(tmp_path / "run", open_stream(stored / kind), **changes)
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    resumed = run(tmp_path / "run", open_stream(stored / kind), **changes)
    assert lines_of(resumed) == lines_of(whole) and len(whole.history) == 6
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items())
    assert resumed.classifier == whole.classifier
    assert resumed.classifier_accuracy == whole.classifier_accuracy


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_streams_a_path(stored, tmp_path, monkeypatch):
    from fastalign.demo.base import build_model, save_base

    save_base(build_model(0), tmp_path / "base")
    settings = fa.TrainConfig(
        model=str(tmp_path / "base"), data=str(stored / "parquet/*.parquet"), streaming=True,
        output_dir=str(tmp_path / "run"), objective="sft", max_steps=2, batch_size=2, log_every=2,
        shuffle_buffer=4, save_every=2, progress=False, adapter=fa.AdapterConfig(shift_layers=(1,)),
    )  # fmt: skip
    (line,) = fa.train(settings).history
    assert line["loss"] > 0
    kept = json.loads((tmp_path / "run/checkpoint-2/sampler.json").read_text())
    assert kept["shards"] == SHARDS and kept["stream"]["begin"]["epoch"] == 0
    with pytest.raises(ValueError, match="streaming: True then, False now"):
        fa.train(fa.TrainConfig(**{**vars(settings), "streaming": False}))
