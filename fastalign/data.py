"""Records of images and conversations, and the collator that turns them into batches.

A record is rendered with the processor's own chat template, one prefix after the other, so that
what is learned is what the template puts between a prompt and the next one. Image tokens are never
cut, and no label is ever an image token.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    ImageSource = Path | str | Image.Image

IMAGE_MARK = "<image>"
IGNORE_INDEX = -100
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_ALIGNED = frozenset({"mm_token_type_ids", "token_type_ids"})  # one value a token, 0 for text
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `<image>` in `text` stands where an image is shown."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One sample: turns that end with an answer, and the images its `<image>` marks stand for.

    Args:
        turns: An optional system turn, then user and assistant turns in alternation, the
            assistant's last.
        images: PIL images or paths, in the order of the marks; a path is opened when collated.
        id: A name for messages.

    Raises:
        ValueError: The turns are out of order, an answer is empty or holds a mark, or marks and
            images differ in number.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    id: str | None = None

    def __post_init__(self) -> None:
        talk = self.turns[1:] if self.turns and self.turns[0].role == "system" else self.turns
        roles = [turn.role for turn in talk]
        if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
            raise ValueError(
                "conversations must alternate human and gpt turns, after at most one system turn, "
                f"and end with gpt: got {[turn.role for turn in self.turns]}"
            )
        for i, turn in enumerate(self.turns):
            if turn.role != "user" and IMAGE_MARK in turn.text:
                raise ValueError(
                    f"conversations[{i}].value must hold no {IMAGE_MARK}: only a human turn shows "
                    f"an image, got one in the {turn.role} turn"
                )
            if turn.role == "assistant" and not turn.text.strip():
                raise ValueError(
                    f"conversations[{i}].value must hold the text to learn: got an empty answer"
                )
        marks = sum(turn.text.count(IMAGE_MARK) for turn in self.turns)
        if marks != len(self.images):
            raise ValueError(
                f"conversations must hold one {IMAGE_MARK} for each image: "
                f"got {marks} marks and {len(self.images)} images"
            )

    @classmethod
    def from_caption(
        cls, image: ImageSource, caption: str, *, prompt: str = "", id: str | None = None
    ) -> Record:
        """The record that answers `image`, followed by `prompt`, with `caption`."""
        user = f"{IMAGE_MARK}\n{prompt}" if prompt else IMAGE_MARK
        return cls((Turn("user", user), Turn("assistant", caption)), (image,), id)


# -- files ---------------------------------------------------------------------------------------


def load_records(
    path: str | os.PathLike[str],
    image_root: str | os.PathLike[str] | None = None,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[Record]:
    """Read LLaVA-style or caption records from a JSON list or a JSONL file.

    A record is `{"id"?, "image"?: path or list of paths, "conversations": [{"from", "value"}]}` or
    `{"image", "caption"}`. Images are named here and opened by `Collator`.

    Args:
        path: The file; one that begins with `[` is a JSON list, any other has a record a line.
        image_root: The folder that relative image paths start from; the file's own by default.
        on_error: "raise", or "skip" to log a warning for each bad record and go on.

    Returns:
        The records, in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file, the record's number and the field that is wrong; or no record is left.
    """
    _check_choice("on_error", on_error, ("raise", "skip"))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a JSON or JSONL file: {path} is not a file")
    root = Path(os.path.abspath(path.parent if image_root is None else image_root))
    if not root.is_dir():
        raise FileNotFoundError(f"image_root must be a folder: {root} is not one")
    records = []
    for i, item in enumerate(_read_items(path)):
        try:
            records.append(parse_record(item, root))
        except ValueError as error:
            if on_error == "raise":
                raise ValueError(f"{path}: record {i}: {error}") from None
            _log.warning("%s: record %d skipped: %s", path, i, error)
    if not records:
        raise ValueError(f"path must hold at least one usable record: {path} holds none")
    return records


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text: {error}") from None


def _read_items(path: Path) -> list[Any]:
    text = _read(path)
    try:
        if text.lstrip().startswith("["):
            return cast(list[Any], json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: record {len(items)}, line {number}: not valid JSON: {error}; "
                "the file must be a JSON list or hold one record a line"
            ) from None
    return items


def parse_record(item: Any, image_root: str | os.PathLike[str] = ".") -> Record:
    """The record of one item of a file that `load_records` reads, or of a data set like it.

    Args:
        item: A mapping as there; an image may also be a PIL image.
        image_root: The folder that relative image paths start from, and that none may leave.

    Raises:
        ValueError: The field that is wrong.
    """
    root = Path(os.path.abspath(image_root))
    if not isinstance(item, dict):
        raise ValueError(f"a record must be an object: got {type(item).__name__}")
    if "video" in item:
        raise ValueError("video is not supported: sample its frames into image, a list of paths")
    named = item.get("image")
    names = [] if named is None else named if isinstance(named, list) else [named]
    images = tuple(_inside(i, root) if isinstance(i, str) else _as_image(i) for i in names)
    id = None if item.get("id") is None else str(item["id"])
    if "conversations" in item:
        turns = _turns(item["conversations"])
    elif "caption" in item:
        if len(images) != 1:
            raise ValueError(f"image must name the one image of the caption: got {len(images)}")
        if not isinstance(item["caption"], str) or not item["caption"].strip():
            raise ValueError(f"caption must be a non-empty string: got {item['caption']!r}")
        return Record.from_caption(images[0], item["caption"], id=id)
    else:
        raise ValueError(f"conversations or caption must be present: got {sorted(item)}")
    if images and not any(IMAGE_MARK in turn.text for turn in turns):
        # LLaVA's own convention: images that no mark places come before the first question.
        first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
        marked = f"{IMAGE_MARK}\n" * len(images) + turns[first].text
        turns[first] = Turn(turns[first].role, marked)
    return Record(tuple(turns), images, id)


def _turns(conversations: Any) -> list[Turn]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(
            f"conversations must be a non-empty list: got {type(conversations).__name__}"
        )
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict):
            raise ValueError(f"conversations[{i}] must be an object: got {type(turn).__name__}")
        role = turn.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(
                f"conversations[{i}].from must be one of {', '.join(_ROLES)}: got {role!r}"
            )
        if not isinstance(turn.get("value"), str):
            raise ValueError(
                f"conversations[{i}].value must be a string: got {turn.get('value')!r}"
            )
        turns.append(Turn(_ROLES[role], turn["value"]))
    return turns


def _as_image(image: Any) -> ImageSource:
    """A PIL image as it is; Pillow need not be installed to tell that it is none."""
    if not hasattr(image, "convert"):
        raise ValueError(f"image must be a path or a list of paths: got {image!r}")
    return cast("ImageSource", image)


def _inside(name: str, root: Path) -> Path:
    """The path of image `name`, which no `..` and no absolute name may lead out of `root`."""
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root) or path == root:
        raise ValueError(
            f"image must lie inside image_root: got {name!r}, which leads out of {root}; "
            "pass the image_root that holds every image"
        )
    return path


def image_folder(path: str | os.PathLike[str]) -> list[Path]:
    """The image files in a folder and the folders below it, sorted by path.

    Raises:
        FileNotFoundError: `path` is no folder.
        ValueError: It holds no file with a known image suffix.
    """
    found = _files(path, "images", IMAGE_SUFFIXES)
    if not found:
        raise ValueError(
            f"images must hold at least one image ({', '.join(sorted(IMAGE_SUFFIXES))}): "
            f"found none in {path}"
        )
    return found


def text_folder(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a folder, sorted by path: one a `.txt` file, one a line of a `.jsonl` file.

    Args:
        path: A folder (searched to the bottom), or one such file; a line of a `.jsonl` file is an
            object with the text under "text".

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: There is no text, or one is empty or not a string.
    """
    path = Path(path)
    files = [path] if path.is_file() else _files(path, "texts", frozenset({".jsonl", ".txt"}))
    texts: list[str] = []
    for file in files:
        if file.suffix.lower() == ".txt":
            texts.append(_text(_read(file), str(file)))
            continue
        for i, item in enumerate(_read_items(file)):
            value = item.get("text") if isinstance(item, dict) else None
            texts.append(_text(value, f"{file}: record {i}: text"))
    if not texts:
        raise ValueError(
            f"texts must hold at least one text (.txt or .jsonl): found none in {path}"
        )
    return texts


def _files(path: str | os.PathLike[str], name: str, suffixes: frozenset[str]) -> list[Path]:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{name} must be a folder: {path} is not one")
    found = (file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file for file in found if file.is_file() and not file.name.startswith("."))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must hold a non-empty text: got {value!r}")
    return value.strip()


def open_image(source: ImageSource) -> Image.Image:
    """`source`, a path or a PIL image, upright (EXIF) and in RGB.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no image that Pillow can read to its end.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "fastalign[hf]"') from error

    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source).convert("RGB")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"image must be a readable file: {path} is not a file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # SyntaxError is what Pillow raises for a broken PNG chunk.
        raise ValueError(f"image must be readable: {path}: {error}") from error


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}")


# -- batches -------------------------------------------------------------------------------------


@dataclass
class _Sample:
    ids: list[int]
    labels: list[int]
    aligned: dict[str, list[int]]
    tensors: dict[str, list[Tensor]]


class Collator:
    """Turns records into a right-padded batch for an image-text-to-text model of transformers.

    Each prompt, and each answer, is tokenised as the template renders it; a prompt that shows
    images goes through the processor, which expands their tokens. Only answers carry labels.

    Args:
        processor: The model's processor, with its chat template (`LlavaProcessor`, ...).
        max_length: Longest sequence, in tokens with the expanded image tokens; None for any.
        on_overflow: "raise", or "truncate" to cut the end of a sequence that is longer, never an
            image token.
        on_error: "raise", or "skip" to leave out a record that cannot be used (an unreadable
            image, no label, too long) with a logged warning; a batch with no record left raises.
        append_eos: End each answer with the tokenizer's end-of-sequence token where the template
            does not (LLaVA-1.5's does not).

    Raises:
        ValueError: The processor lacks a chat template, a tokenizer or an image token;
            `max_length` is less than 2; an option has another value than those above; or
            `append_eos` asks for a token that the tokenizer lacks.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        on_overflow: Literal["raise", "truncate"] = "raise",
        on_error: Literal["raise", "skip"] = "raise",
        append_eos: bool = False,
    ) -> None:
        _check_choice("on_overflow", on_overflow, ("raise", "truncate"))
        _check_choice("on_error", on_error, ("raise", "skip"))
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2 or None: got {max_length}")
        for name in ("tokenizer", "chat_template", "image_token"):
            if getattr(processor, name, None) is None:
                raise ValueError(
                    f"processor must have a {name}: {type(processor).__name__} has none; "
                    f"set processor.{name}"
                )
        self.processor = processor
        self.max_length = max_length
        self.on_overflow = on_overflow
        self.on_error = on_error
        tokenizer = processor.tokenizer
        self._image_ids = _image_ids(processor)
        # Only what the tokenizer itself would put first; a template that writes it is left alone.
        self._bos_text = tokenizer.bos_token
        self._bos = [i for i in tokenizer("a")["input_ids"][:1] if i == tokenizer.bos_token_id]
        self._eos = [tokenizer.eos_token_id] if append_eos else []
        if self._eos == [None]:
            raise ValueError("append_eos must be False: the tokenizer has no eos_token")
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad = next(i for i in padding if i is not None)

    def __call__(self, records: Sequence[Record | dict[str, Any]]) -> dict[str, Tensor]:
        """Collate `records` (b of them, L tokens the longest).

        Args:
            records: Records, or items that `parse_record` makes records of.

        Returns:
            `input_ids`, `attention_mask` and `labels` (b, L) int64, right padded; `labels` is -100
            but for the tokens of answers. With images also `pixel_values` and whatever else the
            processor returns, joined over all images of the batch.

        Raises:
            FileNotFoundError: An image is missing.
            ValueError: A record cannot be used; the message begins with its place or its id.
        """
        if not records:
            raise ValueError("records must hold at least one record: got none")
        samples = []
        for i, record in enumerate(records):
            id = record.get("id") if isinstance(record, dict) else record.id
            name = f"records[{i}]" if id is None else f"record {id}"
            try:
                if isinstance(record, dict):
                    record = parse_record(record)
                samples.append(self._sample(record))
            except (FileNotFoundError, ValueError) as error:
                if self.on_error == "raise":
                    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
                    raise kind(f"{name}: {error}") from error
                _log.warning("%s skipped: %s", name, error)
        if not samples:
            raise ValueError(f"records must hold a usable record: all {len(records)} were skipped")
        return self._pad_batch(samples)

    def _sample(self, record: Record) -> _Sample:
        sample = _Sample([], [], {}, {})
        images = [open_image(source) for source in record.images]
        before = ""
        for text, shown, is_answer in self._segments(record):
            ids, extra = self._encode(text, before, images[:shown])
            del images[:shown]
            aligned = {
                key: extra.pop(key)[0].tolist()[-len(ids) :] for key in _ALIGNED & extra.keys()
            }
            if not sample.ids and not (self._bos_text and text.startswith(self._bos_text)):
                ids = self._bos + ids
            if is_answer and self._eos and self._eos[0] not in ids:
                ids = ids + self._eos
            if not shown and not self._image_ids.isdisjoint(ids):
                raise ValueError(
                    f"conversations must not spell the image token {self.processor.image_token!r}: "
                    f"got it in the text of {'an answer' if is_answer else 'a prompt'}"
                )
            for key in aligned.keys() | sample.aligned.keys():
                values = aligned.get(key, [])
                known = sample.aligned.setdefault(key, [])
                known += [0] * (len(sample.ids) + len(ids) - len(values) - len(known)) + values
            sample.ids += ids
            sample.labels += ids if is_answer else [IGNORE_INDEX] * len(ids)
            for key, value in extra.items():
                sample.tensors.setdefault(key, []).append(value)
            before = text
        return self._fit(sample)

    def _segments(self, record: Record) -> Iterator[tuple[str, int, bool]]:
        """The rendered text cut where answers begin and end: (text, images shown, is an answer)."""
        messages: list[dict[str, Any]] = []
        done, shown = "", 0
        for turn in record.turns:
            message = _message(turn)
            shown += sum(part["type"] == "image" for part in message["content"])
            if turn.role == "assistant":
                prompt = self._render(messages, done, add_generation_prompt=True)
                full = self._render([*messages, message], prompt)
                yield prompt[len(done) :], shown, False
                yield full[len(prompt) :], 0, True
                done, shown = full, 0
            messages.append(message)

    def _render(self, messages: list[dict[str, Any]], prefix: str, **options: bool) -> str:
        text = cast(str, self.processor.apply_chat_template(messages, tokenize=False, **options))
        if not text.startswith(prefix):
            at = len(os.path.commonprefix([text, prefix]))
            raise ValueError(
                f"the chat template of {type(self.processor).__name__} must render a conversation "
                f"as a prefix of its continuation: after {text[max(0, at - 20) : at]!r} came "
                f"{text[at : at + 20]!r} where the shorter one has {prefix[at : at + 20]!r}; "
                "set processor.chat_template to one that leaves earlier turns as they are"
            )
        return text

    def _encode(
        self, text: str, before: str, images: list[Image.Image]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """Token ids of `text` where it follows `before`, and what else the processor returns."""
        # A SentencePiece tokenizer puts a space before whatever it sees first. The character before
        # `text` takes that space, and its own tokens, cut off again, show that nothing merged.
        anchor = self._tokens(before[-1:])
        if anchor and self.processor.tokenizer.unk_token_id not in anchor:
            ids, extra = self._call(before[-1:] + text, images)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :], extra
        return self._call(text, images)

    def _call(self, text: str, images: list[Image.Image]) -> tuple[list[int], dict[str, Tensor]]:
        if not images:
            return self._tokens(text), {}
        out = dict(
            self.processor(
                text=[text], images=[images], add_special_tokens=False, return_tensors="pt"
            )
        )
        out.pop("attention_mask", None)
        return out.pop("input_ids")[0].tolist(), out

    def _tokens(self, text: str) -> list[int]:
        if not text:
            return []
        # Not verbose: it would warn of lengths that `_fit` has yet to judge.
        options = {"add_special_tokens": False, "verbose": False}
        return list(self.processor.tokenizer(text, **options)["input_ids"])

    def _fit(self, sample: _Sample) -> _Sample:
        """`sample` cut to `max_length`, or the reason why it cannot be."""
        length, limit = len(sample.ids), self.max_length
        if limit is not None and length > limit:
            image = [i for i, id in enumerate(sample.ids) if id in self._image_ids]
            numbers = f"got {length} tokens, {len(image)} of them of images, and max_length={limit}"
            if image and image[-1] >= limit:
                raise ValueError(
                    f"max_length must hold every image token, as images are never cut: {numbers}; "
                    f"the last one is token {image[-1] + 1}: raise max_length, or pass fewer or "
                    "smaller images"
                )
            if self.on_overflow == "raise":
                raise ValueError(
                    f"a sequence must fit max_length: {numbers}; raise max_length, or pass "
                    'on_overflow="truncate" to cut the end of the text'
                )
            del sample.ids[limit:], sample.labels[limit:]
            for values in sample.aligned.values():
                del values[limit:]
            if all(label == IGNORE_INDEX for label in sample.labels):
                raise ValueError(
                    f"max_length must leave a label, but the first answer begins after it: "
                    f"{numbers}; raise max_length or shorten the prompt"
                )
        elif all(label == IGNORE_INDEX for label in sample.labels):
            raise ValueError("conversations must hold an answer with at least one token: got none")
        return sample

    def _pad_batch(self, samples: list[_Sample]) -> dict[str, Tensor]:
        longest = max(len(sample.ids) for sample in samples)

        def padded(rows: Iterable[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        batch = {
            "input_ids": padded((s.ids for s in samples), self._pad),
            "attention_mask": padded(([1] * len(s.ids) for s in samples), 0),
            "labels": padded((s.labels for s in samples), IGNORE_INDEX),
        }
        for key in sorted({key for s in samples for key in s.aligned}):
            batch[key] = padded((s.aligned.get(key, []) for s in samples), 0)
        for key in sorted({key for s in samples for key in s.tensors}):
            batch[key] = _join(key, [x for s in samples for x in s.tensors.get(key, [])])
        return batch


def _message(turn: Turn) -> dict[str, Any]:
    """The turn as content parts: a mark becomes an image, and takes the newlines around it."""
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(turn.text.split(IMAGE_MARK)):
        if i:
            content.append({"type": "image"})
        if text := piece.strip("\n") if IMAGE_MARK in turn.text else piece:
            content.append({"type": "text", "text": text})
    return {"role": turn.role, "content": content}


def _image_ids(processor: Any) -> frozenset[int]:
    ids = {processor.tokenizer.convert_tokens_to_ids(processor.image_token)}
    ids |= {
        getattr(processor, "image_token_id", None),
        *(getattr(processor, "image_token_ids", ())),
    }
    return frozenset(i for i in ids if isinstance(i, int))


def _join(key: str, values: list[Tensor]) -> Tensor:
    """Tensors of all images, one after the other; images cut into fewer tiles get empty ones."""
    if values[0].ndim == 5:  # (images, tiles, channels, height, width), LLaVA-NeXT and its kin
        tiles = max(value.shape[1] for value in values)
        values = [
            torch.cat([v, v.new_zeros(len(v), tiles - v.shape[1], *v.shape[2:])], 1) for v in values
        ]
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        raise ValueError(
            f"{key} must have one shape for all images of a batch: got "
            f"{sorted({tuple(value.shape[1:]) for value in values})}; "
            "let the image processor resize to one size, or pass one record at a time"
        )
    return torch.cat(values)
