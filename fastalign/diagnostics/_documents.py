"""The texts of files, read piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PIECE = 2**16  # characters read from a file at a time


def documents(path: str | os.PathLike[str]) -> Iterator[Iterable[str]]:
    """The texts of a file or a folder, each as pieces in order, read as they are taken.

    A `.txt` file is one text, its pieces about 65,536 characters that end with a line or a word; a
    line of a `.jsonl` file is one, under "text". A folder is searched to the bottom.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: There is no such file in the folder, or a line is no object with a text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"texts must be a file or a folder: {path} is neither")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (".txt", ".jsonl"))
    if not files:
        raise ValueError(f"texts must hold at least one .txt or .jsonl file: {path} holds none")
    for file in files:
        if file.suffix.lower() == ".jsonl":
            yield from _lines(file)
        else:
            yield _pieces(file)


def _lines(file: Path) -> Iterator[list[str]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not valid JSON: {error}") from None
            if not isinstance(item, dict) or not isinstance(item.get("text"), str):
                raise ValueError(f'{file}, line {number}: must be an object with "text"')
            yield [item["text"]]


def _pieces(file: Path) -> Iterator[str]:
    rest = ""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while read := stream.read(_PIECE):
                text = rest + read
                # Before the blank: tokenizers take it with the word that follows.
                end = max(text.rfind("\n") + 1, 0) or max(text.rfind(" "), 0) or len(text)
                rest = text[end:]
                yield text[:end]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be UTF-8 text: {error}") from None
    if rest:
        yield rest
