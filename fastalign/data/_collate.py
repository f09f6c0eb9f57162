"""The collator: records rendered, tokenised, checked and padded to one batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from fastalign.data._errors import SampleError, check_choice, reason_of
from fastalign.data._images import MAX_PIXELS, for_processor, open_image
from fastalign.data._pack import IGNORE_INDEX as IGNORE_INDEX
from fastalign.data._pack import Sample, pack
from fastalign.data._processors import ALIGNED, encode, image_ids, join, marks_answers
from fastalign.data._records import IMAGE_MARK, Record, Turn, parse_record

if TYPE_CHECKING:
    from PIL import Image

_log = logging.getLogger("fastalign.data")


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
        pack_text: Samples without an image share rows, as many as the longest sample of the batch
            has room for. The model keeps them apart by `segments` (see `fastalign.VLM`).
        max_pixels: See `open_image`. An image more than 200 times as long as wide is an error, and
            one of 1 or 3 rows is doubled, as processors would take its rows for channels.

    Raises:
        ValueError: The processor lacks a chat template, a tokenizer or an image token;
            `max_length` is less than 2; an option has another value than those above;
            `append_eos` asks for a token that the tokenizer lacks; or `pack_text` is asked of
            PaliGemma, whose attention before an answer goes both ways.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        on_overflow: Literal["raise", "truncate"] = "raise",
        on_error: Literal["raise", "skip"] = "raise",
        append_eos: bool = False,
        pack_text: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        check_choice("on_overflow", on_overflow, ("raise", "truncate"))
        check_choice("on_error", on_error, ("raise", "skip"))
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
        self.max_pixels = max_pixels
        tokenizer = processor.tokenizer
        self._image_ids = image_ids(processor)
        self._marks_answers = marks_answers(processor)
        self.pack_text = pack_text
        if pack_text and self._marks_answers:
            raise ValueError(
                f"pack_text must be False for {type(processor).__name__}: its model's attention "
                "goes both ways before an answer, so that samples of one row would see each other"
            )
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
            but for the tokens of answers. Where rows hold several samples also `segments`, (b, L)
            int64: the number of each token's sample within its row, -1 for padding. With images
            also `pixel_values` and whatever else the processor returns, joined over all images of
            the batch.

        Raises:
            FileNotFoundError: An image is missing.
            SampleError: A record cannot be used; the message begins with its place or its id, and
                `reason` tells why. A `ValueError`.
            ValueError: There is no record, or images of several cannot be joined.
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
                    if isinstance(error, FileNotFoundError):
                        raise FileNotFoundError(f"{name}: {error}") from error
                    raise SampleError(f"{name}: {error}", reason_of(error)) from error
                _log.warning("%s skipped: %s", name, error)
        if not samples:
            raise ValueError(f"records must hold a usable record: all {len(records)} were skipped")
        return self._pad_batch(pack(samples) if self.pack_text else samples)

    def _sample(self, record: Record) -> Sample:
        sample = Sample([], [], {}, {})
        opened = (open_image(source, max_pixels=self.max_pixels) for source in record.images)
        guesses = hasattr(self.processor, "image_processor")
        images = [for_processor(image, guesses_channels=guesses) for image in opened]
        before = ""
        for text, shown, is_answer in self._segments(record):
            ids, extra = self._encode(text, before, images[:shown])
            del images[:shown]
            aligned = {
                key: extra.pop(key)[0].tolist()[-len(ids) :] for key in ALIGNED & extra.keys()
            }
            # A processor may put it behind the images (PaliGemma, the Q-Former models).
            starts = bool(self._bos_text) and text.startswith(self._bos_text)
            if not sample.ids and not starts and set(self._bos).isdisjoint(ids):
                ids = self._bos + ids
            if is_answer and self._eos and self._eos[0] not in ids:
                ids = ids + self._eos
            if not shown and not self._image_ids.isdisjoint(ids):
                raise ValueError(
                    f"conversations must not spell the image token {self.processor.image_token!r}: "
                    f"got it in the text of {'an answer' if is_answer else 'a prompt'}"
                )
            if is_answer and self._marks_answers:
                aligned["token_type_ids"] = [1] * len(ids)
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
        try:
            return encode(self.processor, text, images)
        except (ArithmeticError, IndexError, RuntimeError) as error:
            raise SampleError(
                f"{type(self.processor).__name__} must be able to take the images: it failed on "
                f"{[image.size for image in images]}: {type(error).__name__}: {error}",
                "image_size",
            ) from error

    def _tokens(self, text: str) -> list[int]:
        if not text:
            return []
        # Not verbose: it would warn of lengths that `_fit` has yet to judge.
        options = {"add_special_tokens": False, "verbose": False}
        return list(self.processor.tokenizer(text, **options)["input_ids"])

    def _fit(self, sample: Sample) -> Sample:
        """`sample` cut to `max_length`, or the reason why it cannot be."""
        length, limit = len(sample.ids), self.max_length
        if limit is not None and length > limit:
            image = [i for i, id in enumerate(sample.ids) if id in self._image_ids]
            numbers = f"got {length} tokens, {len(image)} of them of images, and max_length={limit}"
            if image and image[-1] >= limit:
                raise SampleError(
                    f"max_length must hold every image token, as images are never cut: {numbers}; "
                    f"the last one is token {image[-1] + 1}: raise max_length, or pass fewer or "
                    "smaller images",
                    "too_long",
                )
            if self.on_overflow == "raise":
                raise SampleError(
                    f"a sequence must fit max_length: {numbers}; raise max_length, or pass "
                    'on_overflow="truncate" to cut the end of the text',
                    "too_long",
                )
            del sample.ids[limit:], sample.labels[limit:]
            for values in sample.aligned.values():
                del values[limit:]
            if all(label == IGNORE_INDEX for label in sample.labels):
                raise SampleError(
                    f"max_length must leave a label, but the first answer begins after it: "
                    f"{numbers}; raise max_length or shorten the prompt",
                    "too_long",
                )
        elif all(label == IGNORE_INDEX for label in sample.labels):
            raise SampleError(
                "conversations must hold an answer with at least one token: got none", "empty_text"
            )
        return sample

    def _pad_batch(self, samples: list[Sample]) -> dict[str, Tensor]:
        longest = max(len(sample.ids) for sample in samples)

        def padded(rows: Iterable[list[int]], value: int) -> Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

        batch = {
            "input_ids": padded((s.ids for s in samples), self._pad),
            "attention_mask": padded(([1] * len(s.ids) for s in samples), 0),
            "labels": padded((s.labels for s in samples), IGNORE_INDEX),
        }
        if any(s.segments and s.segments[-1] for s in samples):
            batch["segments"] = padded((s.segments for s in samples), -1)
        for key in sorted({key for s in samples for key in s.aligned}):
            batch[key] = padded((s.aligned.get(key, []) for s in samples), 0)
        keys = {key for s in samples for key in s.tensors}
        batch |= join({key: [x for s in samples for x in s.tensors.get(key, [])] for key in keys})
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
