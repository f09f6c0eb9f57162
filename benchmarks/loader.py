"""How many images a second the loader gives, by source and number of worker processes.

    python -m benchmarks.loader [--json FILE] [--save] [--rounds N] [--quick]

The same JPEGs and captions as LLaVA's JSON, as tar shards and as parquet, through LLaVA-1.5's
preprocessing (336 x 336, bicubic) into batches of 8; tar and parquet also as streams, shuffled in
blocks of a quarter of the images. One run is one pass over all of them in random order, the start
of its workers included; rows are timed in turn, the files are in the page cache, and each process
computes with one thread. The ratio is of medians, to JSON without workers;
"decoded beforehand" has PIL images in memory, so that what is left is the preprocessing. The error
is the largest difference of any image from that of JSON.
"""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import CLIPImageProcessorPil, LlavaProcessor

from benchmarks._turns import Row, parser, run, time_rows
from fastalign._run.stream_order import StreamSampler
from fastalign.config import StepSampler, TrainConfig
from fastalign.data import Collator, Record, Stream, open_data, open_image, open_stream
from fastalign.data._skip import Parsing
from fastalign.demo.base import build_processor

BATCH = 8
BASE, BARE = "json, 0 workers", "decoded beforehand, 0 workers"


@dataclass(frozen=True)
class Images:
    """How many, and how large; `workers` beside none."""

    name: str
    count: int
    width: int
    height: int
    workers: tuple[int, ...] = (1, 2)


CASES = (Images("128 JPEGs of 640 x 480", 128, 640, 480),)
QUICK = (Images("quick, 8 JPEGs of 64 x 48", 8, 64, 48, (1,)),)


def pictures(case: Images) -> list[bytes]:
    """JPEGs of smooth noise, about as large in bytes as photographs of that size."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(case.count):
        small = torch.rand(1, 3, case.height // 4, case.width // 4, generator=generator)
        size = (case.height, case.width)
        pixels = interpolate(small, size, mode="bicubic").clamp(0, 1)[0]
        buffer = io.BytesIO()
        array = (255 * pixels).byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found


def write_sources(folder: Path, data: Sequence[bytes]) -> dict[str, Path]:
    """The images with a caption each in every form, by its name."""
    import datasets

    # Each its own, in words that the tokenizer knows: by them an image is found again.
    names = {"0": "one", "1": "two"}
    captions = [
        " ".join(["picture", *(names[bit] for bit in f"{i:08b}")]) for i in range(len(data))
    ]
    for i, image in enumerate(data):
        (folder / f"{i}.jpg").write_bytes(image)
    listed = [{"image": f"{i}.jpg", "caption": text} for i, text in enumerate(captions)]
    (folder / "train.json").write_text(json.dumps(listed))
    (folder / "tar").mkdir()
    half = -(-len(data) // 2)
    for n in range(2):
        with tarfile.open(folder / "tar" / f"{n}.tar", "w") as tar:
            for i in range(n * half, min(len(data), (n + 1) * half)):
                for suffix, content in (("jpg", data[i]), ("txt", captions[i].encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    columns = {"image": [{"bytes": image, "path": None} for image in data], "caption": captions}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(str(folder / "train.parquet"))
    paths = {"json": "train.json", "tar": "tar", "parquet": "train.parquet"}
    return {name: folder / path for name, path in paths.items()}


def processor() -> Any:
    """LLaVA-1.5's preprocessing, with a tokenizer that needs no download."""
    small: Any = build_processor()
    make: Any = LlavaProcessor
    side = {"height": 336, "width": 336}
    return make(
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side),
        small.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=small.chat_template,
    )


def batches(
    records: Sequence[Record] | Stream, collate: Collator, workers: int, count: int
) -> Iterator[dict[str, Any]]:
    """One pass over `count` records."""
    steps, block = count // BATCH, max(1, count // 4)
    config = TrainConfig(
        max_steps=steps, batch_size=BATCH, shuffle_buffer=block, num_workers=workers
    )
    streamed = isinstance(records, Stream)
    sampler = (
        StreamSampler(records, config, 0, 1, 0)
        if isinstance(records, Stream)
        else StepSampler(count, config, 0, 1, 0)
    )
    loader: Any = torch.utils.data.DataLoader(
        records,  # type: ignore[arg-type]
        batch_sampler=sampler,
        collate_fn=Parsing(collate) if streamed else collate,
        num_workers=workers,
    )
    return iter(loader)


def images_of(load: Callable[[], Iterator[dict[str, Any]]]) -> dict[tuple[int, ...], torch.Tensor]:
    """The image of each sample of a pass, by the tokens of the sample."""
    found = {}
    for batch in load():
        for ids, mask, image in zip(
            batch["input_ids"], batch["attention_mask"], batch["pixel_values"], strict=True
        ):
            found[tuple(ids[mask.bool()].tolist())] = image
    return found


@contextmanager
def sources(case: Images) -> Iterator[dict[str, Sequence[Record] | Stream]]:
    """Records from each source, by its name."""
    import datasets

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "c"
        try:
            paths = write_sources(folder, pictures(case))
            found: dict[str, Sequence[Record] | Stream]
            found = {name: open_data(path) for name, path in paths.items()}
            for name in ("tar", "parquet"):
                found[f"{name} streamed"] = open_stream(paths[name])
            yield found
        finally:
            datasets.config.HF_DATASETS_CACHE = kept


def measure(case: Images, device: str, rounds: int) -> list[Row]:
    """All rows of one case, on the CPU whatever the device."""
    torch.set_num_threads(1)  # as workers do
    collate = Collator(processor())
    with sources(case) as found:
        loads: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
        for workers in (0, *case.workers):
            for name, records in found.items():
                one = partial(batches, records, collate, workers, case.count)
                loads[f"{name}, {workers} workers"] = one
        listed: Any = found["json"]
        opened = [replace(r, images=(open_image(r.images[0]),)) for r in listed]
        loads[BARE] = partial(batches, opened, collate, 0, case.count)
        exact = images_of(loads[BASE])
        assert len(exact) == case.count
        errors = {}
        for name, load in loads.items():
            other = images_of(load)
            errors[name] = max(float((other[key] - exact[key]).abs().max()) for key in exact)
        runs = {name: partial(_exhaust, load) for name, load in loads.items()}
        rows = time_rows(
            "loader", case.name, runs, "cpu", rounds, lambda name: BASE, peaks=False, errors=errors
        )
    print(f"\nimages/s, {case.name}, medians of {rounds} passes")
    for row in rows:
        print(f"{row.impl:32} {1e6 * case.count / row.median_us:8.1f}", flush=True)
    return rows


def _exhaust(load: Callable[[], Iterator[dict[str, Any]]]) -> None:
    for _ in load():
        pass


def main(argv: list[str] | None = None) -> int:
    return run(parser("loader", __doc__, 7).parse_args(argv), CASES, QUICK, measure)


if __name__ == "__main__":
    raise SystemExit(main())
