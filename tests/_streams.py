"""The same samples in shards of every kind, for streams."""

import io
import json
import tarfile

import datasets
import torch
from PIL import Image

import fastalign as fa

COUNT, SHARDS = 13, 3


def encoded(seed):
    pixels = torch.randint(0, 256, (24, 20, 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def rows():
    """The number of a sample is the token after w20; each third one has no image."""
    said = [{"from": "human", "value": "w7"}, {"from": "gpt", "value": "w20"}]
    made = []
    for i in range(COUNT):
        turns = [said[0], {"from": "gpt", "value": f"w20 w{100 + i}" + " w9" * (i % 4)}]
        made.append((turns, [encoded(i)] if i % 3 else []))
    return made


def parts():
    size = -(-COUNT // SHARDS)
    return [rows()[n * size : (n + 1) * size] for n in range(SHARDS)]


def write_tar(path, samples, start=0):
    with tarfile.open(path, "w") as tar:
        for i, (turns, images) in enumerate(samples, start):
            members = [("json", json.dumps({"conversations": turns}).encode())]
            for suffix, data in members + [("png", image) for image in images]:
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def table(samples):
    columns = {
        "images": [[{"bytes": data, "path": None} for data in images] for _, images in samples],
        "conversations": [turns for turns, _ in samples],
    }
    return datasets.Dataset.from_dict(columns).cast_column(
        "images", datasets.List(datasets.Image())
    )


def write_all(folder):
    """The same samples in three shards of every kind, by its name."""
    for kind in ("tar", "parquet", "jsonl", "list"):
        (folder / kind).mkdir()
    for n, part in enumerate(parts()):
        write_tar(folder / f"tar/{n:02}.tar", part, 100 * n)
        table(part).to_parquet(folder / f"parquet/{n}.parquet", batch_size=2)
        lines = []
        for i, (turns, images) in enumerate(part):
            names = [f"{n}_{i}.png" for _ in images]
            for name, data in zip(names, images, strict=True):
                (folder / "jsonl" / name).write_bytes(data)
                (folder / "list" / name).write_bytes(data)
            lines.append({"conversations": turns} | ({"image": names} if names else {}))
        text = "\n\n".join(map(json.dumps, lines)) + "\n"
        (folder / f"jsonl/{n}.jsonl").write_text(text)
        (folder / f"list/{n}.json").write_text(json.dumps(lines))
    table(rows()).save_to_disk(folder / "saved", num_shards=SHARDS)
    (folder / "saved/cache-1.arrow").write_bytes(b"what map() leaves")
    return folder


SOURCES = ("tar", "parquet", "jsonl", "list", "saved")


def config(**changes):
    settings = {"max_steps": 9, "batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5}
    return fa.TrainConfig(**(settings | {"shuffle_buffer": 4} | changes))


def number(item):
    """Of a sample, from its text."""
    return int(item.record().turns[1].text.split()[1][1:]) - 100


def numbers(batches):
    return [[number(item) for item in batch] for batch in batches]
