"""Records from JSON, tar shards and tables; samples that cannot be used; resuming in between."""

import dataclasses
import io
import json
import logging
import shutil
import tarfile
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
import datasets
from _processors import PROCESSORS
from PIL import Image

import fastalign as fa
from fastalign.config import StepSampler
from fastalign.data import (
    Collator,
    CountedBatch,
    Replacing,
    SampleError,
    ShardedRecords,
    TableRecords,
    open_data,
)
from fastalign.data._skip import Skips
from fastalign.data._sources import sample_lengths
from fastalign.testing.families import family

COUNT = 12


def encoded(seed, kind="PNG"):
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (30, 20 + seed, 3), generator=noise, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, kind)
    return buffer.getvalue()


def items():
    """Captions, conversations of one image and of two, and text without an image."""
    made = []
    for i in range(COUNT):
        turns = [{"from": "human", "value": "w7"}, {"from": "gpt", "value": f"w{20 + i} w9"}]
        if i % 3 == 0:
            made.append(({"caption": f"w{30 + i} w8"}, [encoded(i)]))
        elif i % 3 == 1:
            made.append(({"conversations": turns}, [encoded(i), encoded(i + 50)][: 1 + i % 2]))
        else:
            made.append(({"conversations": turns}, []))
    return made


def write_json(folder, rows):
    folder.mkdir()
    listed = []
    for i, (item, images) in enumerate(rows):
        names = [f"{i}_{j}.png" for j in range(len(images))]
        for name, data in zip(names, images, strict=True):
            (folder / name).write_bytes(data)
        listed.append(item | ({"image": names} if names else {}))
    path = folder / "train.json"
    path.write_text(json.dumps(listed))
    return path


def add(tar, name, data, **changes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in changes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_shards(folder, rows, shards=3):
    """As webdataset lays them out; a caption is a txt member."""
    folder.mkdir()
    size = -(-len(rows) // shards)
    for n in range(shards):
        with tarfile.open(folder / f"{n:03}.tar", "w") as tar:
            for i in range(n * size, min(len(rows), (n + 1) * size)):
                item, images = rows[i]
                for j, data in enumerate(images):
                    add(
                        tar, f"part/{i:04}.{j}.png" if len(images) > 1 else f"part/{i:04}.png", data
                    )
                if "caption" in item:
                    add(tar, f"part/{i:04}.txt", item["caption"].encode())
                else:
                    add(tar, f"part/{i:04}.json", json.dumps(item).encode())
    return folder


def table(rows):
    columns = {"images": [], "caption": [], "conversations": []}
    for item, images in rows:
        columns["images"].append([{"bytes": data, "path": None} for data in images])
        columns["caption"].append(item.get("caption"))
        columns["conversations"].append(item.get("conversations"))
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("images", datasets.List(datasets.Image()))


@pytest.fixture(scope="module")
def collate():
    return Collator(PROCESSORS["llava"]())


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same records in every form that `open_data` reads, by name."""
    folder, rows = tmp_path_factory.mktemp("data"), items()
    paths = {"json": write_json(folder / "json", rows)}
    shards = write_shards(folder / "shards", rows)
    paths |= {"folder of shards": shards, "range": shards / "{000..002}.tar"}
    paths["wildcard"] = shards / "00?.tar"
    (folder / "parquet").mkdir()
    for n in range(2):
        part = table(rows).shard(2, n, contiguous=True)
        part.to_parquet(folder / "parquet" / f"{n}.parquet")
    paths |= {"folder of parquet": folder / "parquet", "parquet": folder / "parquet/*.parquet"}
    table(rows).save_to_disk(folder / "saved")
    paths["save_to_disk"] = folder / "saved"
    paths["arrow"] = folder / "saved/data-00000-of-00001.arrow"
    return paths


def assert_same(batch, other):
    assert sorted(batch) == sorted(other)
    assert all(torch.equal(batch[name], other[name]) for name in batch)


# -- the same data from every source -------------------------------------------------------------


def test_every_source_gives_the_same_batches(stored, collate):
    whole = collate(open_data(stored["json"])[:])
    assert int((whole["labels"] != -100).any(1).sum()) == COUNT
    assert whole["pixel_values"].shape[0] == 4 + 6  # captions; of conversations 1, 2, 1 and 2
    for path in stored.values():
        records = open_data(path)
        assert len(records) == COUNT
        assert_same(collate([records[i] for i in range(COUNT)]), whole)
        assert_same(collate([records[-1]]), collate([records[COUNT - 1]]))


def loader_batches(records, collate, *, start, workers):
    config = fa.TrainConfig(max_steps=5, batch_size=3, gradient_accumulation_steps=2, seed=4)
    sampler = StepSampler(len(records), config, 0, 1, start)
    loader = torch.utils.data.DataLoader(
        records, batch_sampler=sampler, collate_fn=collate, num_workers=workers
    )
    return list(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["range", "parquet"])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(stored, collate, source, workers):
    whole = loader_batches(open_data(stored["json"]), collate, start=0, workers=0)
    later = loader_batches(open_data(stored[source]), collate, start=1, workers=workers)
    assert len(whole) == 10 and len(later) == 8
    for batch, other in zip(later, whole[2:], strict=True):
        assert_same(batch, other)


# -- lengths ------------------------------------------------------------------------------------


def test_lengths_put_the_same_samples_together_in_every_source(stored):
    """Letters and bytes differ, but no text comes before one with fewer images."""
    images = [len(listed) for _, listed in items()]
    texts = [sum(len(turn.text) for turn in record.turns) for record in open_data(stored["json"])]
    assert sample_lengths(open_data(stored["json"])) == list(zip(images, texts, strict=True))
    sources = [open_data(stored[name]) for name in ("range", "parquet", "save_to_disk")]
    for records in [*sources, open_data(stored["json"], on_error="skip")]:
        assert [n for n, _ in sample_lengths(records)] == images
    # A txt member of "w30 w8", and a json member with {"conversations": ...} around it.
    shards = dict(enumerate(sample_lengths(sources[0])))
    assert shards[0] == (1, 6) and shards[1][1] == len(json.dumps(items()[1][0]))
    assert sample_lengths(sources[1])[:3] == [(1, 6), (2, 8), (0, 8)]
    with pytest.raises(ValueError, match=r"needs a dataset with lengths\(\).*got range"):
        sample_lengths(range(3))


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_a_grouped_step_keeps_its_samples(ranks, steps):
    config = fa.TrainConfig(max_steps=5, batch_size=2, gradient_accumulation_steps=steps, seed=3)
    lengths = [(i % 2, (7 * i) % 13) for i in range(13)]
    plain, grouped = (
        [list(StepSampler(13, config, rank, ranks, 0, given)) for rank in range(ranks)]
        for given in (None, lengths)
    )
    for step in range(5):
        own, other = (
            sum([lists[r][step * steps + m] for m in range(steps) for r in range(ranks)], [])
            for lists in (plain, grouped)
        )
        assert sorted(own) == sorted(other)
        assert [lengths[i] for i in other] == sorted(lengths[i] for i in own)
    assert list(StepSampler(13, config, 0, ranks, 3, lengths)) == grouped[0][3 * steps :]
    with pytest.raises(ValueError, match="lengths must be those of 12 samples: got 13"):
        StepSampler(12, config, 0, 1, 0, lengths)


# -- shards --------------------------------------------------------------------------------------


def shard(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data)
    return path


def test_an_index_is_kept_for_as_long_as_the_shard_is_the_same(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", ("1.png", encoded(1)), ("1.txt", b"w9"))
    first = ShardedRecords([path])[0]
    index = tmp_path / ".a.tar.index.json"
    assert index.is_file() and open_data(tmp_path)[0] == first
    kept = index.read_text()
    with monkeypatch.context() as patch:  # no second scan
        patch.setattr(tarfile, "open", None)
        assert ShardedRecords([path])[0] == first
    for content in ("", "[]", kept.replace('"txt": [', '"txt": [9'), kept.replace('"txt": [', "[")):
        index.write_text(content)
        assert ShardedRecords([path])[0] == first
    shard(path, ("1.png", encoded(1)), ("1.txt", b"w10 w11"))
    assert ShardedRecords([path])[0].turns[1].text == "w10 w11"


def test_what_members_mean(tmp_path):
    turns = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}]
    path = shard(
        tmp_path / "a.tar",
        ("a/1.jpg", encoded(1, "JPEG")),
        ("a/1.json", json.dumps({"caption": "w5", "width": 3}).encode()),
        ("a/1.txt", b"w6\n"),  # img2dataset writes the caption twice
        ("b/1.JPG", encoded(2, "JPEG")),
        ("b/1.txt", b"w8"),
        ("b/1.json", json.dumps({"conversations": turns, "id": 7}).encode()),
        ("b/._1.json", b"resource fork"),
        ("README", b"no suffix"),
    )
    first, second = ShardedRecords([path])[:]
    assert first.id == "a.tar:a/1" and first.turns[1].text == "w6"
    assert second.id == "7" and second.turns[1].text == "w6" and second.turns[0].text.endswith("w5")
    assert second.images == (encoded(2, "JPEG"),)


def test_links_and_names_that_lead_out_touch_nothing(tmp_path):
    (tmp_path / "secret.txt").write_text("w9")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "../../1.png", encoded(1))
        add(tar, "../../1.txt", b"w5")
        add(tar, "2.png", encoded(2))
        link = {"type": tarfile.SYMTYPE, "linkname": str(tmp_path / "secret.txt")}
        add(tar, "2.txt", b"", **link)
    before = sorted(tmp_path.rglob("*"))
    records = ShardedRecords([tmp_path / "a.tar"])
    assert records[0].turns[1].text == "w5"
    with pytest.raises(SampleError, match=r"sample 2: conversations or caption must be present"):
        records[1]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / ".a.tar.index.json"])


@pytest.mark.parametrize(
    ("members", "message", "reason"),
    [
        ([("1.json", b"[]")], "json must hold an object", "invalid_record"),
        ([("1.json", b"{")], "json must be valid", "invalid_record"),
        ([("1.json", b'{"image": "x.png", "caption": "w5"}')], "member beside the json", None),
        ([("1.png", b""), ("1.txt", b" ")], "caption must be a non-empty", "empty_text"),
        ([("1.png", b""), ("1.txt", b"\xe9")], "txt must be UTF-8", "invalid_record"),
        ([("1.png", b"")], "conversations or caption must be present", "invalid_record"),
    ],
)
def test_a_bad_sample_names_shard_and_key(tmp_path, members, message, reason):
    records = ShardedRecords([shard(tmp_path / "a.tar", *members)])
    with pytest.raises(
        (SampleError, FileNotFoundError), match=rf"a.tar: sample 1: .*{message}"
    ) as e:
        records[0]
    assert getattr(e.value, "reason", None) == reason


@pytest.mark.parametrize("damage", ["cut in data", "cut in a header", "a header overwritten"])
def test_a_damaged_shard(tmp_path, caplog, damage):
    members = [(f"{i}.{s}", d) for i in range(4) for s, d in (("png", encoded(i)), ("txt", b"w9"))]
    path = shard(tmp_path / "a.tar", *members)
    with tarfile.open(path) as tar:
        third = tar.getmember("2.txt")
    data = bytearray(path.read_bytes())
    if damage == "a header overwritten":
        data[third.offset : third.offset + 100] = b"\xff" * 100
    else:
        del data[third.offset + (100 if "header" in damage else 513) :]
    path.write_bytes(data)
    with pytest.raises(ValueError, match="whole, uncompressed tar file: .*a.tar"):
        open_data(path)
    with caplog.at_level(logging.WARNING, "fastalign.data"):
        records = open_data(path, on_error="skip")
    assert [r.id for r in records] == ["a.tar:0", "a.tar:1"]
    assert "its first 2 samples are used" in caplog.text


def test_a_size_below_zero_does_not_go_round(tmp_path):
    info = tarfile.TarInfo("2.txt")
    info.size = -512
    path = shard(tmp_path / "a.tar", ("1.txt", b"w5"))
    whole = path.read_bytes()[:1024]
    path.write_bytes(whole + info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with pytest.raises(ValueError, match="whole, uncompressed tar file"):
        open_data(path)


def test_bad_sources(tmp_path):
    shard(tmp_path / "a.tar", ("1.txt", b"w5"), ("1.TXT", b"w6"))
    with pytest.raises(ValueError, match="two members are named 1.TXT"):
        open_data(tmp_path)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        add(tar, "1.txt", b"w5")
    with pytest.raises(ValueError, match="uncompressed tar file: .*b.tar"):
        open_data(tmp_path / "b.tar")
    with pytest.raises(FileNotFoundError, match="000.tar is not a file"):
        open_data(tmp_path / "{000..001}.tar")
    with pytest.raises(FileNotFoundError, match="none matches"):
        open_data(tmp_path / "*.parquet")
    with pytest.raises(ValueError, match="range that ascends"):
        open_data(tmp_path / "{3..1}.tar")
    with pytest.raises(FileNotFoundError, match="nowhere is neither"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one sample"):
        open_data(shard(tmp_path / "empty.tar"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="found none in"):
        open_data(tmp_path / "none")
    datasets.DatasetDict({"train": table(items())}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="must be one split"):
        open_data(tmp_path / "splits")
    with pytest.raises(ValueError, match="got IterableDataset; an order that can be resumed"):
        TableRecords(table(items()).to_iterable_dataset())
    with pytest.raises(ValueError, match="on_error must be one of"):
        open_data(tmp_path / "a.tar", on_error="ignore")


def test_an_image_path_in_a_table_may_not_lead_out(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["../a.png", "a.png"], "caption": ["w5", "w6"]})
    records = TableRecords(rows, tmp_path)
    with pytest.raises(SampleError, match="row 0: image must lie inside image_root"):
        records[0]
    assert records[1].images == (tmp_path / "a.png",)


# -- samples that cannot be used -----------------------------------------------------------------


def broken(rows, bad):
    """The same rows, some of them spoilt in a different way each."""
    rows = list(rows)
    for i, how in bad.items():
        item, images = rows[i]
        if how == "unreadable_image":
            rows[i] = item, [images[0][:60]]
        elif how == "image_size":
            buffer = io.BytesIO()
            Image.new("RGB", (30_000, 1)).save(buffer, "PNG")
            rows[i] = item, [buffer.getvalue()]
        elif how == "empty_text":
            rows[i] = {"caption": " "}, images
        else:
            rows[i] = {"caption": "w9 " * 300}, images
    return rows


BAD = {0: "unreadable_image", 3: "image_size", 6: "empty_text", 9: "too_long"}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt")
    return {
        "json": write_json(folder / "json", broken(items(), BAD)),
        "shards": write_shards(folder / "shards", broken(items(), BAD)),
    }


def test_a_bad_sample_is_replaced_and_counted_by_reason(spoilt, caplog):
    collate = Collator(PROCESSORS["llava"](), max_length=200)
    for path in spoilt.values():
        records = open_data(path, on_error="skip")
        replacing = Replacing(records, collate, seed=3)
        with caplog.at_level(logging.WARNING, "fastalign.data"):
            batch = replacing(list(range(COUNT)))
        assert batch["input_ids"].shape[0] == batch.samples == COUNT
        own = Counter(BAD.values())
        assert all(batch.skipped[reason] >= number for reason, number in own.items())
        assert set(batch.skipped) == set(own)
        assert "sample 3 skipped (image_size): " in caplog.text
        good = replacing([1, 2, 4])
        assert good.skipped == {} and good.samples == 3
        assert_same(good, collate([records[i] for i in (1, 2, 4)]))


def test_the_replacement_follows_from_seed_and_index(spoilt):
    collate = Collator(PROCESSORS["llava"](), max_length=200)
    records = open_data(spoilt["shards"], on_error="skip")
    one = Replacing(records, collate, seed=3)
    assert_same(one([0]), Replacing(records, collate, seed=3)([0]))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one([0, 3])
    assert torch.equal(torch.get_rng_state(), state)
    rows = {str(Replacing(records, collate, seed=s)([0])["input_ids"].tolist()) for s in range(8)}
    assert len(rows) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_resumes_bit_equal(spoilt, workers):
    collate = Collator(PROCESSORS["llava"](), max_length=200)
    runs = []
    for name, start, by in (("json", 0, 0), ("shards", 1, workers)):
        records = open_data(spoilt[name], on_error="skip")
        replacing = Replacing(records, collate, seed=3)
        runs.append(loader_batches(range(COUNT), replacing, start=start, workers=by))
    assert sum(sum(batch.skipped.values()) for batch in runs[0]) > 0
    for batch, other in zip(runs[1], runs[0][2:], strict=True):
        assert_same(batch, other)
        assert isinstance(batch, CountedBatch) and batch.skipped == other.skipped


def test_no_sample_can_be_used(collate):
    with pytest.raises(ValueError, match="none of 100 was; the last one: .*must be an object"):
        Replacing(Unusable(), collate)([0])


class Unusable:
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise SampleError("a record must be an object: got int")


class OneRank:
    """What `Skips` needs of accelerate's Accelerator."""

    device, is_main_process = torch.device("cpu"), True

    def reduce(self, tensor):
        return tensor.clone()


def test_counts_of_each_step_add_up(caplog):
    skips = Skips(True, 2, 5, OneRank())
    batches = [CountedBatch({}, 8, {"too_long": 1} if i % 2 else {}) for i in range(5)]
    steps = [skips.counts(done) for done, _ in enumerate(skips.follow(batches), 1)]
    assert [int(step["skipped"]) for step in steps] == [0, 1, 0, 1, 0]
    assert int(steps[1]["skipped_too_long"]) == 1 and int(steps[1]["skipped_image_size"]) == 0
    skips.close()
    assert "2 skipped of 42 samples (2 too_long)" in caplog.text
    off = Skips(False, 1, 5, OneRank())
    assert off.wrap([1], len, 0) == ([1], len) and off.counts(1) == {}


def test_too_many_bad_samples_stop_a_run():
    skips = Skips(True, 1, 50, OneRank())
    batch = CountedBatch({}, 8, {"missing_image": 1})  # 1 of 9; the 12th batch makes it 108
    taken = 0
    with pytest.raises(ValueError, match=r"at most 10% .* 12 skipped of 108 samples \(12 missing"):
        for taken, _ in enumerate(skips.follow([batch] * 50), 1):
            skips.counts(taken)
    assert taken == 12


# -- a run ---------------------------------------------------------------------------------------


def run(folder, data, **changes):
    settings = dict(
        output_dir=str(folder), objective="cal", max_steps=6, batch_size=2, log_every=2,
        gradient_accumulation_steps=2, save_every=3, max_length=200, on_bad_sample="skip",
        adapter=fa.AdapterConfig(shift_layers=(1,), calibration=True), learning_rate=1e-2,
        progress=False,
    )  # fmt: skip
    config = fa.TrainConfig(**(settings | changes))
    collate = Collator(PROCESSORS["llava"](), max_length=config.max_length)
    return fa.train(config, model=family("llava"), dataset=data, collate=collate)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_spoilt_shards_resumes_bit_equal(spoilt, tmp_path, workers):
    data = open_data(spoilt["shards"], on_error="skip")
    whole = run(tmp_path / "whole", open_data(spoilt["json"], on_error="skip"))
    assert [line["skipped"] > 0 for line in whole.history].count(True) >= 2
    for line in whole.history:
        reasons = [v for k, v in line.items() if k.startswith("skipped_")]
        assert line["skipped"] == sum(reasons) and len(reasons) == 6
    run(tmp_path / "cut", data, num_workers=workers)
    shutil.rmtree(tmp_path / "cut/checkpoint-6")
    resumed = run(tmp_path / "cut", data, num_workers=workers)
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in resumed.model.state_dict().items())
    timed = ("tokens_per_s", "images_per_s", "peak_mib")
    for line, other in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in line.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("objective", ["sft", "cal"])
def test_grouping_changes_neither_loss_nor_weights(stored, tmp_path, objective):
    """Only how much is padded: the sums of a step are those of the same samples."""
    data = open_data(stored["range"])
    both = [
        run(
            tmp_path / str(on),
            data,
            objective=objective,
            group_by_length=on,
            gradient_accumulation_steps=4,
            max_steps=3,
            learning_rate=1e-3,
            log_every=1,
        )
        for on in (False, True)
    ]
    plain, grouped = (result.history for result in both)
    for line, other in zip(plain, grouped, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


def test_raising_is_the_default(spoilt, tmp_path):
    config = fa.TrainConfig(max_steps=6)
    assert config.on_bad_sample == config.on_overflow == "raise"
    with pytest.raises(ValueError, match="on_bad_sample must be one of"):
        dataclasses.replace(config, on_bad_sample="drop")
    with pytest.raises(ValueError, match="sequence must fit max_length|must be readable|non-empty"):
        run(tmp_path / "raise", open_data(spoilt["shards"]), on_bad_sample="raise")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train_takes_shards_by_path(spoilt, tmp_path):
    from fastalign.demo.base import build_model, save_base

    save_base(build_model(0), tmp_path / "base")
    config = fa.TrainConfig(
        model=str(tmp_path / "base"),
        data=str(spoilt["shards"] / "{000..002}.tar"),
        output_dir=str(tmp_path / "run"),
        objective="sft",
        max_steps=3,
        batch_size=2,
        gradient_accumulation_steps=2,
        max_length=150,
        on_overflow="truncate",
        on_bad_sample="skip",
        group_by_length=True,
        save_every=0,
        log_every=3,
        progress=False,
        adapter=fa.AdapterConfig(shift_layers=(1,)),
    )
    (line,) = fa.train(config).history
    # One epoch of 12 samples; two images are 128 tokens, and the long caption of one is cut.
    assert line["skipped_too_long"] == 0
    for name in ("unreadable_image", "image_size", "empty_text"):
        assert line[f"skipped_{name}"] >= 1
