"""Streams: every source, the order, where it goes on, and what is damaged."""

import copy
import json
import logging
import pickle
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
import fsspec
from _processors import PROCESSORS
from _streams import COUNT, SHARDS, SOURCES, config, number, numbers, rows, write_all

from fastalign._run.stream_order import StreamSampler, first_samples, watched
from fastalign.config import check_same_place, schedule_state
from fastalign.data import Collator, open_data, open_stream
from fastalign.data._skip import Parsing
from fastalign.data._stream_blocks import ordered


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("stream"))


# -- order ---------------------------------------------------------------------------------------


def test_every_source_gives_each_sample_once_an_epoch(stored):
    orders = {}
    for kind in SOURCES:
        stream = open_stream(stored / kind)
        assert len(stream.shards) == SHARDS
        sampler = StreamSampler(stream, config(max_steps=13), 0, 1, 0)
        taken = sum(numbers(sampler), [])
        epochs = [taken[i : i + COUNT] for i in range(0, len(taken), COUNT)]
        assert len(epochs) == 4 and all(sorted(e) == list(range(COUNT)) for e in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 4
        orders[kind] = taken
    del orders["saved"]  # save_to_disk divides them otherwise
    assert all(order == orders["tar"] for order in orders.values())
    other = StreamSampler(open_stream(stored / "tar"), config(seed=6), 0, 1, 0)
    assert sum(numbers(other), [])[:COUNT] != orders["tar"][:COUNT]


def test_a_block_is_shuffled_and_nothing_beyond_it(stored):
    """With one shard and blocks of 5, places 0 to 4 hold the shard's first rows in some order."""
    stream = open_stream(stored / "parquet/0.parquet")
    settings = config(batch_size=5, gradient_accumulation_steps=1, max_steps=4, shuffle_buffer=5)
    batches = numbers(StreamSampler(stream, settings, 0, 1, 0))
    assert all(sorted(batch) == list(range(5)) for batch in batches)
    assert len({tuple(batch) for batch in batches}) > 1
    one = config(batch_size=5, gradient_accumulation_steps=1, max_steps=2, shuffle_buffer=1)
    assert numbers(StreamSampler(stream, one, 0, 1, 0)) == [list(range(5))] * 2


def test_records_are_those_of_data_by_index(stored):
    collate = Collator(PROCESSORS["llava"]())
    whole = [collate([record]) for record in open_data(stored / "tar")]
    for kind in SOURCES:
        sampler = StreamSampler(open_stream(stored / kind), config(), 0, 1, 0)
        for item in sum(list(sampler)[:4], []):
            batch = Parsing(collate)([item])
            expected = whole[number(item)]
            assert sorted(batch) == sorted(expected)
            assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize(("ranks", "steps"), [(1, 1), (2, 2), (4, 1)])
def test_a_step_keeps_its_samples_however_it_is_divided(stored, ranks, steps, group):
    whole = config(batch_size=4, gradient_accumulation_steps=1)
    expected = numbers(StreamSampler(open_stream(stored / "jsonl"), whole, 0, 1, 0))
    divided = config(
        batch_size=4 // ranks // steps, gradient_accumulation_steps=steps, group_by_length=group
    )
    lists = [
        list(StreamSampler(open_stream(stored / "jsonl"), divided, rank, ranks, 0))
        for rank in range(ranks)
    ]
    for step, samples in enumerate(expected):
        own = sum([lists[r][step * steps + m] for m in range(steps) for r in range(ranks)], [])
        if group:
            assert sorted(numbers([own])[0]) == sorted(samples)
            assert [item.size() for item in own] == sorted(item.size() for item in own)
        else:
            assert numbers([own]) == [samples]


def test_mir_and_the_classifier_take_the_first_samples(stored):
    stream = open_stream(stored / "tar")
    expected = sum(numbers(StreamSampler(stream, config(), 0, 1, 0)), [])
    items = watched(stream, config(mir_every=1, mir_samples=6))
    assert [number(item) for item in items] == expected[:6] and watched(stream, config()) == []
    assert [number(item) for item in items[5].spares] == expected[6:13] + expected[:1]
    assert len(first_samples(stream, config(), 100)) == COUNT
    assert watched([1], config(mir_every=1)) == [1]


def test_sizes_are_images_and_letters(stored):
    every = config(max_steps=1, batch_size=13, gradient_accumulation_steps=1)
    letters = [sum(len(turn["value"]) for turn in turns) for turns, _ in rows()]
    images = [len(listed) for _, listed in rows()]
    for kind in SOURCES:
        (batch,) = StreamSampler(open_stream(stored / kind), every, 0, 1, 0)
        sizes = dict(sorted((number(item), item.size()) for item in batch))
        assert [n for n, _ in sizes.values()] == images
        # Of a tar shard the bytes of its json member.
        more = len(json.dumps({"conversations": rows()[0][0]})) - letters[0] if kind == "tar" else 0
        assert [n for _, n in sizes.values()] == [n + more for n in letters]


# -- going on ------------------------------------------------------------------------------------


def stand_after(sampler, steps, per_step=2):
    """What a checkpoint keeps when the loader was ahead by a step; through JSON."""
    batches = iter(sampler)
    for _ in range((steps + 1) * per_step):
        next(batches)
    return json.loads(json.dumps(sampler.state(steps)))


@pytest.mark.parametrize("kind", SOURCES)
def test_a_stream_goes_on_anywhere(stored, kind):
    whole = numbers(StreamSampler(open_stream(stored / kind), config(), 0, 1, 0))
    for step in range(1, 8):
        state = stand_after(StreamSampler(open_stream(stored / kind), config(), 0, 1, 0), step)
        later = StreamSampler(open_stream(stored / kind), config(), 0, 1, step, state)
        assert numbers(later) == whole[2 * step :]
        assert json.loads(json.dumps(later.state(9)))["position"] == 36
    stored_files = {"sampler.json": state, "schedule.json": schedule_state(7, config())}
    fresh = StreamSampler(open_stream(stored / kind), config(), 0, 1, 7, state)
    check_same_place(stored_files, fresh, stored)
    fewer = StreamSampler(open_stream(stored / kind), config(), 0, 2, 7, state)
    with pytest.raises(ValueError, match="sampler.world_size: 1 then, 2 now"):
        check_same_place(stored_files, fewer, stored)


def test_a_recent_step_can_be_taken_again(stored):
    """What a diagnosis does, while the loader's own iterator goes on."""
    sampler = StreamSampler(open_stream(stored / "tar"), config(), 0, 1, 0)
    batches = iter(sampler)
    taken = [next(batches) for _ in range(8)]
    again = copy.copy(sampler)
    again.start = 2
    assert numbers(islice(iter(again), 2)) == numbers(taken[4:6])
    assert numbers([next(batches)]) == numbers(
        [list(StreamSampler(open_stream(stored / "tar"), config(), 0, 1, 0))[8]]
    )
    assert repr(taken[0]).count(".tar: sample ") == 2  # named, without their bytes
    stream = pickle.loads(pickle.dumps(open_stream(stored / "parquet")))
    assert numbers(StreamSampler(stream, config(max_steps=1), 0, 1, 0))


@pytest.mark.parametrize("kind", ["tar", "jsonl", "parquet"])
def test_what_was_seen_is_not_read_again(stored, tmp_path, kind):
    """Of one shard the first sample is destroyed once a block of three was taken."""
    path = shutil.copy(sorted((stored / kind).glob(f"*.{kind}"))[0], tmp_path)
    items = ordered(open_stream(path), 5, 3)
    taken = [next(items) for _ in range(5)]
    mark = taken[2][1]
    data = bytearray(Path(path).read_bytes())
    for i in range(4, 40):
        data[i] = 0xFF
    Path(path).write_bytes(data)
    with pytest.raises((OSError, ValueError)):
        [number(item) for item, _ in islice(ordered(open_stream(path), 5, 3), 3)]
    later = ordered(open_stream(path), 5, 3, mark=mark)
    assert [number(next(later)[0]) for _ in range(2)] == [number(item) for item, _ in taken[3:]]


# -- what is wrong -------------------------------------------------------------------------------


def test_damage_names_the_shard(stored, tmp_path, caplog):
    cut = tmp_path / "cut.tar"
    cut.write_bytes((stored / "tar/01.tar").read_bytes()[:7000])
    settings = config(max_steps=1, batch_size=1, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="shard .*cut.tar must be .*no whole, uncompressed tar"):
        list(StreamSampler(open_stream(cut), settings, 0, 1, 0))
    with caplog.at_level(logging.WARNING, "fastalign.data"):
        items = ordered(open_stream(cut, on_error="skip"), 0, 9)
        names = [next(items)[0].name for _ in range(2)]
    assert len(set(names)) < 3 and "the samples before are used" in caplog.text
    table_ = tmp_path / "cut.parquet"
    data = bytearray((stored / "parquet/1.parquet").read_bytes())
    data[4:300] = bytes(296)
    table_.write_bytes(data)
    with pytest.raises((OSError, ValueError), match="shard .*cut.parquet must be there, and whole"):
        list(StreamSampler(open_stream(table_), settings, 0, 1, 0))
    (tmp_path / "bad.json").write_text('[{"caption"')
    with pytest.raises(ValueError, match="bad.json must be there, and whole: it is no valid JSON"):
        list(StreamSampler(open_stream(tmp_path / "bad.json"), settings, 0, 1, 0))
    gone = open_stream(shutil.copy(stored / "tar/00.tar", tmp_path / "gone.tar"))
    (tmp_path / "gone.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard .*gone.tar must be there"):
        list(StreamSampler(gone, settings, 0, 1, 0))


def test_too_few_samples(stored, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="at least one sample: got none in .*empty.jsonl"):
        list(StreamSampler(open_stream(tmp_path / "empty.jsonl"), config(), 0, 1, 0))
    settings = config(batch_size=7)
    with pytest.raises(ValueError, match="the 14 samples of a step: got 13 in .*and 2 more"):
        list(StreamSampler(open_stream(stored / "tar"), settings, 0, 1, 0))
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1: got 0"):
        config(shuffle_buffer=0)


def test_what_cannot_be_opened(stored, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere is neither"):
        open_stream(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("w5")
    with pytest.raises(ValueError, match="found none in"):
        open_stream(tmp_path)
    with pytest.raises(ValueError, match="must name files that are all .*got .txt"):
        open_stream(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="an address or a datasets.IterableDataset: got list"):
        open_stream([1])
    with pytest.raises(ValueError, match="on_error must be one of"):
        open_stream(stored / "tar", on_error="ignore")
    by_index = config().__class__
    stored_state = {"position": 8, "samples": 13}
    with pytest.raises(ValueError, match="the checkpoint is of data by index"):
        StreamSampler(open_stream(stored / "tar"), by_index(), 0, 1, 2, stored_state)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'need datasets: pip install "fastalign\[hf\]"'):
        open_stream(stored / "parquet")
    assert len(open_stream(stored / "tar").shards) == SHARDS  # needs no datasets


def test_addresses_and_iterable_datasets(stored):
    memory = fsspec.filesystem("memory")
    for n in range(SHARDS):
        memory.pipe(f"/stream/{n:02}.tar", (stored / f"tar/{n:02}.tar").read_bytes())
    expected = numbers(StreamSampler(open_stream(stored / "tar"), config(), 0, 1, 0))
    for address in ("stream", "stream/*.tar", "stream/{00..02}.tar"):
        stream = open_stream(f"memory://{address}")
        assert numbers(StreamSampler(stream, config(), 0, 1, 0)) == expected
    with pytest.raises(ValueError, match="found none in memory://stream/x"):
        open_stream("memory://stream/x*")
    parquet = [str(path) for path in sorted((stored / "parquet").glob("*.parquet"))]
    for table_ in (
        datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True),
        open_dataset(stored),
    ):
        taken = numbers(StreamSampler(open_stream(table_), config(), 0, 1, 0))
        assert sorted(sum(taken, [])[:COUNT]) == list(range(COUNT))


def open_dataset(stored):
    """One whose shards are not files."""
    return datasets.load_from_disk(stored / "saved").to_iterable_dataset(num_shards=2)
