"""A teacher's features on disk: computed once, the same numbers ever after, whatever happens."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, replace

import _samples
import pytest
import torch
import transformers as hf
from safetensors import safe_open

import fastalign as fa
from fastalign import checkpoint
from fastalign.config import check_same_run
from fastalign.teachers import CachedTeacher, PatchTeacher
from fastalign.testing.models import tiny_llava

HALF = ([0.5] * 3, [0.5] * 3)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}


def patch_teacher(seed=0, **options):
    torch.manual_seed(seed)
    model = hf.Dinov2Model(hf.Dinov2Config(image_size=28, **SIZES))
    return PatchTeacher(model, student=HALF, **options)


def watch(teacher):
    """The number of images of each call of the teacher's model."""
    sizes = []
    teacher.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return sizes


def images(count, seed=0, size=(28, 28)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *size, generator=generator)


def shards(cached):
    return sorted(cached.folder.glob("*.safetensors"))


# -- what is computed ---------------------------------------------------------------------------


def test_a_second_epoch_never_reaches_the_teacher(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    epoch = [{"pixel_values": images(3, seed)} for seed in range(4)]
    first = [cached(batch) for batch in epoch]
    assert sizes == [3] * 4 and (cached.hits, cached.misses, len(cached)) == (0, 12, 12)
    second = [cached(batch) for batch in epoch]
    assert sizes == [3] * 4 and (cached.hits, cached.misses) == (12, 12)
    expected = [teacher(batch) for batch in epoch]
    for features in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_another_process_finds_them(tmp_path):
    batch = {"pixel_values": images(3)}
    with CachedTeacher(patch_teacher(), tmp_path) as cached:
        first = cached(batch)
    teacher = patch_teacher()
    sizes, again = watch(teacher), CachedTeacher(teacher, tmp_path)
    assert len(again) == 3
    found = again(batch)
    assert torch.equal(found, first) and found.dtype == first.dtype and not sizes


def test_only_the_missing_views_of_a_batch_are_computed(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    cached({"pixel_values": images(2)})
    mixed = torch.cat([images(3, seed=1), images(2)])[[0, 3, 1, 4, 2]]
    features = cached({"pixel_values": mixed})
    assert sizes == [2, 3]
    torch.testing.assert_close(features, teacher.features(list(mixed)))


def test_equal_pixels_are_one_entry(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    one = images(1)
    features = cached({"pixel_values": one.repeat(3, 1, 1, 1)})
    assert sizes == [1] and len(cached) == 1 and features.shape == (3, 2, 2, 16)
    assert torch.equal(features[0], features[2])
    # A copy, a view with other strides and a batch of its own are the same pixels.
    transposed = one.transpose(2, 3).contiguous().transpose(2, 3)
    cached({"pixel_values": transposed})
    assert sizes == [1]
    # Another shape of the same bytes, another dtype of the same values, or one other bit are not.
    for other in (one.view(1, 3, 14, 56), one.double(), one.index_fill(3, torch.tensor(0), 0.0)):
        cached({"pixel_values": other})
    assert len(sizes) == 4


def test_views_of_several_grids_come_back_as_a_list(tmp_path):
    teacher = patch_teacher(views=lambda batch: batch["views"])
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    views = [images(1, i, size)[0] for i, size in enumerate(((28, 28), (14, 56), (28, 28)))]
    batch = {"pixel_values": views[0], "views": views}
    first = cached(batch)
    calls = len(sizes)
    second = cached(batch)
    assert [tuple(f.shape) for f in first] == [(2, 2, 16), (1, 4, 16), (2, 2, 16)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(sizes) == calls
    # Where the grids are equal, what was stored from such a list is one tensor.
    assert cached({"pixel_values": 0, "views": [views[2], views[0]]}).shape == (2, 2, 2, 16)


def test_no_image_gives_no_features(tmp_path):
    cached = CachedTeacher(patch_teacher(), tmp_path)
    assert cached({"input_ids": torch.ones(1, 2)}).shape == (0, 2, 2, 16)
    assert len(CachedTeacher(lambda batch: 1 / 0, tmp_path, name="own")({})) == 0


def test_features_have_no_gradient(tmp_path):
    cached = CachedTeacher(patch_teacher(), tmp_path)
    pixels = images(1).requires_grad_()
    assert not cached({"pixel_values": pixels}).requires_grad
    assert not cached({"pixel_values": pixels}).requires_grad


# -- any callable -------------------------------------------------------------------------------


def test_a_callable_runs_on_the_whole_batch(tmp_path):
    seen = []

    def own(batch):
        seen.append(len(batch["pixel_values"]))
        return batch["pixel_values"].flatten(2).transpose(1, 2)[:, :9]

    cached = CachedTeacher(own, tmp_path, name="own")
    first, mixed = images(2), torch.cat([images(1), images(2, seed=1)])
    cached({"pixel_values": first})
    features = cached({"pixel_values": mixed})
    assert seen == [2, 3] and features.shape == (3, 9, 3)
    assert torch.equal(features, own({"pixel_values": mixed}))
    assert torch.equal(cached({"pixel_values": mixed}), features) and len(seen) == 3


def test_a_callable_may_give_a_list_and_other_views(tmp_path):
    def own(batch):
        return [view.movedim(0, 2)[::2, ::4] for view in batch["views"]]

    cached = CachedTeacher(own, tmp_path, name="own", views=lambda batch: batch["views"])
    views = [images(1, 0, (4, 8))[0], images(1, 1, (8, 4))[0]]
    batch = {"pixel_values": None, "views": views}
    assert len(cached(batch)) == 0  # no pixel_values, no images
    batch["pixel_values"] = views
    for _ in range(2):
        features = cached(batch)
        assert [tuple(f.shape) for f in features] == [(2, 2, 3), (4, 1, 3)]


def test_keys_may_be_given(tmp_path):
    """With `view_keys` neither pixels are hashed nor views made, unless one is missing."""
    made = []

    def views(batch):
        made.append(1)
        return list(batch["pixel_values"])

    teacher = patch_teacher(views=views)
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    batch = {"pixel_values": images(2), "view_keys": ["a.jpg", "b.jpg"]}
    first = cached(batch)
    assert torch.equal(cached(batch), first) and sizes == [2] and made == [1]
    cached({"pixel_values": images(2), "view_keys": ["a.jpg", "c.jpg"]})
    assert sizes == [2, 1]
    cached({"pixel_values": images(2)})  # no key is the hash of any pixels
    assert sizes == [2, 1, 2]
    with pytest.raises(ValueError, match="view_keys must be one per view: got 1 keys and 2 views"):
        cached({"pixel_values": images(2), "view_keys": ["d.jpg"]})


# -- whose features -----------------------------------------------------------------------------


def test_every_teacher_has_a_subfolder_of_its_own(tmp_path):
    def make(**options):
        return CachedTeacher(patch_teacher(**options), tmp_path).folder

    names = [
        *(make(), make(seed=1), make(image_size=56), make(teacher=HALF)),
        CachedTeacher(patch_teacher().to(torch.bfloat16), tmp_path).folder,
        CachedTeacher(patch_teacher(), tmp_path, dtype=torch.bfloat16).folder,
        CachedTeacher(patch_teacher(), tmp_path, name="mine").folder,
    ]
    assert len(set(names)) == 7 and make() == names[0]
    assert names[0].name.startswith("Dinov2Model-") and names[6].name.startswith("mine-")


def test_where_a_teacher_lies_does_not_matter(tmp_path):
    teacher = patch_teacher(batch_size=1)
    teacher.model.save_pretrained(tmp_path / "copy")
    copy = PatchTeacher(hf.AutoModel.from_pretrained(tmp_path / "copy"), student=HALF)
    assert copy.fingerprint() == teacher.fingerprint()
    with torch.no_grad():
        copy.model.layernorm.bias[3] += 1e-3
    assert copy.fingerprint() != teacher.fingerprint()


def test_features_under_autocast_are_others(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    batch = {"pixel_values": images(1)}
    plain = cached(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, again = cached(batch), cached(batch)
    assert len(sizes) == 2 and torch.equal(rounded, again) and not torch.equal(rounded, plain)
    assert torch.equal(cached(batch), plain)


# -- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_by_default_nothing_is_lost(tmp_path, dtype):
    def own(batch):
        return batch["pixel_values"].flatten(2).to(dtype) * 1e4

    first = CachedTeacher(own, tmp_path, name="own")
    batch = {"pixel_values": images(2)}
    expected = first(batch)
    first.close()
    found = CachedTeacher(lambda batch: 1 / 0, tmp_path, name="own")(batch)
    assert found.dtype == dtype and torch.equal(found, expected)


def test_bfloat16_is_cast_back_and_the_same_from_the_first_epoch_on(tmp_path):
    teacher = patch_teacher()
    cached = CachedTeacher(teacher, tmp_path, dtype=torch.bfloat16)
    batch = {"pixel_values": images(3)}
    first, waiting = cached(batch), cached(batch)
    cached.flush()
    exact = teacher(batch)
    assert first.dtype == torch.float32 and torch.equal(first, exact.bfloat16().float())
    assert torch.equal(first, waiting) and torch.equal(first, cached(batch))
    with safe_open(shards(cached)[0], "pt") as stored:
        assert {stored.get_tensor(k).dtype for k in stored.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_what_bfloat16_does_to_the_loss(tmp_path):
    """Rounding features to 8 bits moves a cosine by at most 2 * 2^-8, the loss by far less.

    For g' = g (1 + e), |e| <= 2^-9 by element, |cos' - cos| <= 2 * 2^-9 * 2 in each pair, to first
    order; in the mean of squares the errors, of either sign, mostly cancel.
    """
    torch.manual_seed(1)
    # Patches with a common part, as of trained teachers: cosines from 0.3 to 1.
    common = torch.randn(1, 1, 384)
    features = common + torch.randn(4, 256, 384)
    exact = CachedTeacher(lambda batch: features, tmp_path, name="exact")
    rounded = CachedTeacher(lambda batch: features, tmp_path, name="own", dtype=torch.bfloat16)
    batch = {"pixel_values": images(4)}
    student = (features @ torch.randn(384, 64) / 20 + torch.randn(4, 256, 64)).double()
    losses = [fa.losses.structure_distill(student, t(batch).double()) for t in (exact, rounded)]
    assert losses[0] > 1e-3 and losses[0] != losses[1]
    assert abs(losses[1] / losses[0] - 1) < 1e-4  # 9e-6 where this was written
    grams = [torch.nn.functional.normalize(t(batch).double(), dim=2) for t in (exact, rounded)]
    first, second = (g @ g.mT for g in grams)
    assert 0 < (first - second).abs().max() < 2 * 2**-8  # 4e-4


# -- shards -------------------------------------------------------------------------------------


def test_a_full_shard_is_written_at_once(tmp_path):
    # A view has 2 * 2 * 16 float32 values: 256 bytes, so that two batches of two fill 1 KiB.
    cached = CachedTeacher(patch_teacher(), tmp_path, shard_mib=1 / 1024)
    for seed in range(5):
        cached({"pixel_values": images(2, seed)})
    assert len(shards(cached)) == 2
    cached.flush()
    assert len(shards(cached)) == 3 and len(cached) == 10
    cached.flush()
    assert len(shards(cached)) == 3  # nothing was waiting
    assert not [p for p in cached.folder.iterdir() if p not in shards(cached)]


def test_more_shards_than_stay_open(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    for seed in range(20):
        cached({"pixel_values": images(1, seed)})
        cached.flush()
    assert len(shards(cached)) == 20 and sizes == [1] * 20
    for seed in (*range(20), 3, 19, 0):
        expected = teacher({"pixel_values": images(1, seed)})
        sizes.clear()
        assert torch.equal(cached({"pixel_values": images(1, seed)}), expected) and not sizes
    assert len(cached._store._open) <= 16


def test_several_writers_share_a_folder_and_see_each_other(tmp_path):
    first, second = patch_teacher(), patch_teacher()
    caches = [CachedTeacher(teacher, tmp_path) for teacher in (first, second)]
    sizes = [watch(first), watch(second)]
    for seed, cached in enumerate(caches):
        cached({"pixel_values": images(2, seed)})
        cached.flush()
    for cached in caches:  # each reads what the other wrote after it was opened
        assert len(cached({"pixel_values": torch.cat([images(2, 0), images(2, 1)])})) == 4
    assert sizes == [[2], [2]] and len(shards(caches[0])) == 2


WRITER = """
import os, signal, sys
import torch
from fastalign.teachers import CachedTeacher

def image(seed):
    return torch.full((1, 3, 8, 8), float(seed))

def own(batch):
    return batch["pixel_values"].flatten(2) + 1
"""


def write(folder, code):
    """A process that runs `code` after `WRITER`, with what it prints to stderr."""
    command = [sys.executable, "-c", WRITER + code, str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_processes_write_at_once(tmp_path):
    """Three processes write the same images, each image as a shard: all are whole."""
    code = """
with CachedTeacher(own, sys.argv[1], name="own", shard_mib=1e-6) as cached:
    for seed in range(50):
        cached({"pixel_values": image(seed)})
"""
    for process in [write(tmp_path, code) for _ in range(3)]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached = CachedTeacher(lambda batch: 1 / 0, tmp_path, name="own")
        for seed in range(50):
            found = cached({"pixel_values": torch.full((1, 3, 8, 8), float(seed))})
            assert torch.equal(found, torch.full((1, 3, 64), seed + 1.0))
    assert len(cached) == 50 and 50 <= len(shards(cached)) <= 150


def test_a_killed_run_loses_only_what_waits(tmp_path):
    code = """
cached = CachedTeacher(own, sys.argv[1], name="own")
cached({"pixel_values": torch.cat([image(0), image(1)])})
cached.flush()
cached({"pixel_values": image(2)})
"""
    ends = {"kill": "os.kill(os.getpid(), signal.SIGKILL)", "error": "raise SystemExit(3)"}
    running = {name: write(tmp_path / name, code + end) for name, end in ends.items()}
    for name, status, kept in (("kill", -signal.SIGKILL, 2), ("error", 3, 3)):
        _, errors = running[name].communicate(timeout=300)
        assert running[name].returncode == status, errors
        assert len(CachedTeacher(print, tmp_path / name, name="own")) == kept


def test_a_folder_that_was_removed_stays_so_at_the_end(tmp_path):
    cached = CachedTeacher(lambda batch: batch["pixel_values"], tmp_path / "a", name="own")
    cached({"pixel_values": images(1)})
    shutil.rmtree(tmp_path / "a")
    del cached
    assert not (tmp_path / "a").exists()
    # A run that goes on makes it again.
    with CachedTeacher(lambda batch: batch["pixel_values"], tmp_path / "a", name="own") as cached:
        shutil.rmtree(tmp_path / "a")
        cached({"pixel_values": images(1)})
    assert len(shards(cached)) == 1


def test_leftovers_of_killed_runs_are_removed_in_time(tmp_path):
    folder = CachedTeacher(patch_teacher(), tmp_path).folder
    for name, age in ((".a.safetensors.partial", 90_000), (".b.safetensors.partial", 60)):
        (folder / name).write_bytes(b"half")
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    assert len(CachedTeacher(patch_teacher(), tmp_path)) == 0
    assert [p.name for p in folder.iterdir()] == [".b.safetensors.partial"]


# -- faults -------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:30])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(bytes(data))


def zero(path):
    data = path.read_bytes()
    path.write_bytes(data[:-64] + bytes(64))


def flip_checksum(path):
    data = path.read_bytes()
    place = data.index(b" torch.float32") - 1
    other = b"0" if data[place : place + 1] != b"0" else b"1"
    path.write_bytes(data[:place] + other + data[place + 1 :])


def flip_dtype(path):
    path.write_bytes(path.read_bytes().replace(b" torch.float32", b" torch.float16"))


def other_file(path):
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, path)


BEFORE = [cut, cut_header, empty, flip, zero, flip_checksum, flip_dtype, other_file]
WHILE_OPEN = [cut, cut_header, empty, flip, zero]  # its header has been read


@pytest.mark.parametrize(
    ("damage", "when"), [(d, "before") for d in BEFORE] + [(d, "while open") for d in WHILE_OPEN]
)
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, damage, when):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    batch = {"pixel_values": images(1)}
    expected = cached(batch)
    cached.flush()
    other = {"pixel_values": images(1, seed=1)}
    cached(other)
    cached.flush()
    (bad,) = (p for p in shards(cached) if p.name.endswith("0.safetensors"))
    if when == "while open":
        assert torch.equal(cached(batch), expected)  # the shard is mapped now
    damage(bad)
    sizes.clear()
    with pytest.warns(UserWarning, match=f"{bad.name} is no whole shard .*delete it"):
        if when == "before":
            cached = CachedTeacher(teacher, tmp_path)
        found = cached(batch)
    assert torch.equal(found, expected) and sizes == [1]
    assert torch.equal(cached(batch), expected) and sizes == [1]
    cached(other)
    assert sizes == [1]  # the other shard is whole
    cached.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        again = CachedTeacher(teacher, tmp_path)
        assert torch.equal(again(batch), expected)
    assert sizes == [1]  # the bad shard does not hide the one that replaced it


def test_a_shard_that_disappears_is_computed_again(tmp_path):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    batch = {"pixel_values": images(2)}
    expected = cached(batch)
    cached.flush()
    shards(cached)[0].unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached(batch), expected) and sizes == [2, 2]
    cached.flush()
    assert len(shards(cached)) == 1


def test_a_disk_that_takes_no_more_does_not_stop_the_run(tmp_path, monkeypatch):
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path)
    expected = cached({"pixel_values": images(2)})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="cannot be written to .*No space left on device; no more"):
        cached.flush()
    monkeypatch.undo()
    assert not list(cached.folder.iterdir())
    assert torch.equal(cached({"pixel_values": images(2)}), expected)
    cached.flush()
    assert sizes == [2, 2] and not list(cached.folder.iterdir())


def test_the_limit_is_kept_and_logged_once(tmp_path, caplog):
    # A view has 256 bytes: four fit into 1.1 KB, the header of a shard on disk not counted.
    teacher = patch_teacher()
    sizes, cached = watch(teacher), CachedTeacher(teacher, tmp_path, max_gib=1100 / 2**30)
    with caplog.at_level(logging.WARNING, "fastalign.teachers"):
        for seed in range(4):
            cached({"pixel_values": images(2, seed)})
    assert caplog.text.count("has reached its limit") == 1 and len(cached) == 4
    cached.flush()
    sizes.clear()
    cached({"pixel_values": images(2, 1)})
    cached({"pixel_values": images(2, 3)})
    assert sizes == [2]
    # What is on disk counts for the next run.
    small = CachedTeacher(teacher, tmp_path, max_gib=1100 / 2**30)
    small({"pixel_values": images(2, 4)})
    small.flush()
    assert len(small) == 4


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "needs a name of its own.*got None"),
        ({"name": "a/b"}, "got 'a/b'"),
        ({"name": "own", "dtype": torch.int8}, "dtype must be torch.bfloat16, .*got torch.int8"),
        ({"name": "own", "dtype": torch.float16}, "dtype must be .*got torch.float16"),
        ({"name": "own", "shard_mib": 0}, "shard_mib and max_gib must be positive: got 0 and None"),
        ({"name": "own", "max_gib": -1}, "must be positive: got 256.0 and -1"),
    ],
)
def test_bad_options_are_named(tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        CachedTeacher(lambda batch: None, tmp_path, **options)


def test_what_is_no_teacher_is_named(tmp_path):
    with pytest.raises(TypeError, match="teacher must be callable: got str"):
        CachedTeacher("dinov2", tmp_path, name="own")
    cached = CachedTeacher(lambda batch: torch.ones(3, 4, 5), tmp_path, name="own")
    with pytest.raises(ValueError, match="features must be one per view: got 2 keys and 3 views"):
        cached({"pixel_values": images(2)})


# -- training -----------------------------------------------------------------------------------


def collate(indices):
    """Images by their index, two tokens of text or more around each."""
    batch = _samples.collate(["ttiyyty", "tiyyt"], indices)
    del batch["teacher"]
    return batch


def train(folder, given=None, **changes):
    """Two epochs of four images in batches of two, with a checkpoint after each epoch."""
    settings = {
        "output_dir": str(folder), "max_steps": 4, "batch_size": 2, "learning_rate": 1e-2,
        "log_every": 1, "save_every": 2, "progress": False,
        "adapter": fa.AdapterConfig(shift_layers=(1,)),
        "deepalign": fa.objectives.DeepAlignConfig(without=("intervention",)),
    }  # fmt: skip
    config = fa.TrainConfig(**(settings | changes))
    return fa.train(config, model=tiny_llava(), dataset=range(4), collate=collate, teacher=given)


def losses(result):
    return [line["loss"] for line in result.history]


def test_training_computes_each_image_once(tmp_path):
    """An empty cache and a full one give the same losses bit for bit, and those without one."""
    plain = train(tmp_path / "a", patch_teacher())
    first, second = patch_teacher(), patch_teacher()
    sizes = [watch(first), watch(second)]
    cache = str(tmp_path / "cache")
    filled = train(tmp_path / "b", first, teacher_cache=cache)
    assert sizes[0] == [2, 2]  # one epoch
    again = train(tmp_path / "c", second, teacher_cache=cache)
    assert sizes[1] == [] and losses(again) == losses(filled)
    # In other company an image's features may differ in the last bit.
    assert losses(filled) == pytest.approx(losses(plain), rel=1e-5)


def test_training_takes_teacher_and_cache_from_the_settings(tmp_path):
    patch_teacher().model.save_pretrained(tmp_path / "teacher")
    hf.CLIPImageProcessorPil().save_pretrained(tmp_path / "student")
    tiny_llava().config.save_pretrained(tmp_path / "student")
    settings = {"teacher": str(tmp_path / "teacher"), "model": str(tmp_path / "student")}
    settings |= {"teacher_cache": str(tmp_path / "cache"), "teacher_image_size": 42}
    train(tmp_path / "run", **settings)
    (folder,) = (tmp_path / "cache").iterdir()
    written = [path.stat().st_mtime_ns for path in folder.iterdir()]
    assert len(written) == 1
    train(tmp_path / "again", **settings)
    assert [path.stat().st_mtime_ns for path in folder.iterdir()] == written
    with safe_open(next(folder.iterdir()), "pt") as stored:
        assert {tuple(stored.get_tensor(k).shape) for k in stored.keys()} == {(3, 3, 16)}  # noqa: SIM118


def test_features_are_on_disk_before_a_checkpoint(tmp_path, monkeypatch):
    found = []
    save = checkpoint.save

    def spy(*args):
        found.append(len(list((tmp_path / "cache").rglob("*.safetensors"))))
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", spy)
    train(tmp_path / "run", patch_teacher(), teacher_cache=str(tmp_path / "cache"))
    assert found == [1, 1]


def test_a_callable_is_wrapped_by_the_user(tmp_path):
    def own(batch):
        return torch.ones(len(batch["pixel_values"]), 4, 3)

    with pytest.raises(ValueError, match="teacher_cache needs a teacher by path or a PatchTeacher"):
        train(tmp_path / "a", own, teacher_cache=str(tmp_path))
    cached = CachedTeacher(own, tmp_path / "cache", name="own")
    train(tmp_path / "b", cached, teacher_cache=str(tmp_path / "unused"))
    assert len(cached) == 4 and len(shards(cached)) == 1 and not (tmp_path / "unused").exists()


def test_a_resumed_run_may_change_the_cache_and_not_the_size(tmp_path):
    config = fa.TrainConfig(teacher="a", teacher_image_size=56, teacher_cache="b")
    stored = json.loads(json.dumps(asdict(config)))
    check_same_run(stored, replace(config, teacher_cache=None), tmp_path)
    with pytest.raises(ValueError, match="teacher_image_size: 56 then, 28 now"):
        check_same_run(stored, replace(config, teacher_image_size=28), tmp_path)
