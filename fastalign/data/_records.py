"""Records of images and conversations, and the files and folders that hold them."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastalign.data._errors import SampleError, check_choice

if TYPE_CHECKING:
    from fastalign.data._images import ImageSource

IMAGE_MARK = "<image>"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
_log = logging.getLogger("fastalign.data")


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
        images: Paths, bytes of files or PIL images, in the order of the marks; opened when
            collated.
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
                raise SampleError(
                    f"conversations[{i}].value must hold the text to learn: got an empty answer",
                    "empty_text",
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
    check_choice("on_error", on_error, ("raise", "skip"))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a JSON or JSONL file: {path} is not a file")
    root = Path(os.path.abspath(path.parent if image_root is None else image_root))
    if not root.is_dir():
        raise FileNotFoundError(f"image_root must be a folder: {root} is not one")
    records = []
    for i, item in enumerate(read_items(path)):
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


def read_items(path: Path) -> list[Any]:
    """The items of a JSON list or a JSONL file, as they are."""
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
        item: A mapping as there; an image may also be a PIL image or the bytes of a file.
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
            raise SampleError(
                f"caption must be a non-empty string: got {item['caption']!r}", "empty_text"
            )
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
    """A PIL image or bytes as they are; Pillow need not be installed to tell other things."""
    if not isinstance(image, bytes) and not hasattr(image, "convert"):
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
        for i, item in enumerate(read_items(file)):
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
