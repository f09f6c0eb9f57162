"""Records that commands draw from files, and the collator for them."""

import random
from pathlib import Path
from typing import Any

from fastalign.data import Collator, Record, image_folder, load_records, plain_template, text_folder


def at_least_one(options: Any, *names: str) -> None:
    """Raise ValueError where one of the options is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1: got {getattr(options, name)}")


def pairs(images: Path, texts: Path, samples: int, seed: int) -> list[Record]:
    """Records of images and texts drawn at random, each at most once."""
    pictures, words = image_folder(images), text_folder(texts)
    count = min(samples, len(pictures), len(words))
    if count < samples:
        print(f"{count} samples: there are {len(pictures)} images and {len(words)} texts")
    draw = random.Random(seed)
    drawn = zip(draw.sample(pictures, count), draw.sample(words, count), strict=True)
    return [Record.from_caption(image, text) for image, text in drawn]


def drawn(data: Path, image_root: Path | None, samples: int, seed: int) -> list[Record]:
    """Records of a file with an image each, drawn at random."""
    records = [record for record in load_records(data, image_root) if record.images]
    if not records:
        raise ValueError(f"data must hold a record with an image: {data} holds none")
    count = min(samples, len(records))
    if count < samples:
        print(f"{count} samples: there are {len(records)} records with images")
    return random.Random(seed).sample(records, count)


def classes_of(root: Path, per_class: int | None, seed: int) -> tuple[list[Path], list[int]]:
    """Image files below the sub-folders of a folder, and the number of each one's sub-folder.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are fewer than two sub-folders with images.
    """
    by_class: dict[str, list[Path]] = {}
    for file in image_folder(root):
        parts = file.relative_to(root).parts
        if len(parts) > 1:
            by_class.setdefault(parts[0], []).append(file)
    if len(by_class) < 2:
        raise ValueError(
            f"images must hold at least two sub-folders of images, one a class: {root} holds "
            f"{len(by_class)}"
        )
    draw = random.Random(seed)
    labelled = []
    for number, files in enumerate(by_class.values()):
        chosen = files if per_class is None else draw.sample(files, min(per_class, len(files)))
        labelled += [(file, number) for file in chosen]
    draw.shuffle(labelled)
    return [file for file, _ in labelled], [number for _, number in labelled]


def collator(vlm: Any, processor: Any, max_length: int | None = None) -> Collator:
    """A collator that cuts long texts; a processor without a chat template gets a plain one."""
    if processor.chat_template is None:
        processor.chat_template = plain_template(processor)
        print(f"{type(processor).__name__} has no chat template: the text follows the image")
    limit = max_length or getattr(vlm.config.get_text_config(), "max_position_embeddings", None)
    return Collator(processor, max_length=limit, on_overflow="truncate")
