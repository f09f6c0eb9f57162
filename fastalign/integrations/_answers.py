"""What an image-text-to-text model answers, and how likely it finds an answer that is given.

Each conversation is rendered and encoded on its own, as `fastalign.data.Collator` does it, so that
what a model sees does not depend on what it is batched with. Nothing here knows of a library for
evaluation.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastalign.data import IMAGE_MARK, plain_template
from fastalign.data._processors import ALIGNED, encode, join, marks_answers

if TYPE_CHECKING:
    from PIL import Image

MAX_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for an answer.

    Attributes:
        messages: Turns of {"role": ..., "content": parts}; a part is {"type": "image"} or
            {"type": "text", "text": ...}.
        images: RGB, one for each image part, in order.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        parts = [part["type"] for turn in self.messages for part in turn["content"]]
        if parts.count("image") != len(self.images):
            raise ValueError(
                f"a prompt must have an image for each of its image parts: got {len(self.images)} "
                f"images and {parts.count('image')} parts"
            )


@dataclass(frozen=True)
class Answer:
    """Text of an answer, and how many tokens went in and came out."""

    text: str
    input_tokens: int
    output_tokens: int


def question(text: str, images: Sequence[Image.Image] = ()) -> Prompt:
    """One turn of the user: the images where `<image>` stands in `text`, else before it.

    Raises:
        ValueError: There are marks, but not as many as images.
    """
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        pieces = [""] * len(images) + [text]
    elif len(pieces) != len(images) + 1:
        raise ValueError(
            f"a question must have one {IMAGE_MARK} for each image, or none: got "
            f"{len(pieces) - 1} and {len(images)} images in {text[:80]!r}"
        )
    content: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i:
            content.append({"type": "image"})
        if piece:
            content.append({"type": "text", "text": piece})
    return Prompt(({"role": "user", "content": content},), tuple(images))


def generation_options(
    options: Mapping[str, Any], known: Sequence[str]
) -> tuple[dict[str, Any], set[str]]:
    """What `generate` takes of a task's settings, and the names of those that it does not know.

    Sampling is on where `do_sample` says so, or is absent, and the temperature is above 0; without
    it the settings that shape a distribution are left out, greedy or beam search remain.
    """
    given = {k: v for k, v in options.items() if k != "until" and v is not None}
    unknown = {name for name in given if name not in known}
    made = {k: v for k, v in given.items() if k not in unknown}
    made.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    made.setdefault("num_beams", 1)
    temperature = made.get("temperature")
    sample = bool(made.get("do_sample", bool(temperature))) and temperature != 0
    made["do_sample"] = sample
    if not sample:
        # None, not absent: the checkpoint's own generation settings would fill them in.
        made |= {"temperature": None, "top_p": None, "top_k": None}
    return made, unknown


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """`text` up to the first of the strings in `until`; empty strings end nothing."""
    ends = [until] if isinstance(until, str) else list(until or ())
    places = [text.find(end) for end in ends if end]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def batches(keys: Sequence[Hashable], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of items with equal keys, at most `size` together, the longest first."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    for group in groups.values():
        group.sort(key=lambda i: -lengths[i])
        yield from (group[start : start + size] for start in range(0, len(group), size))


@dataclass
class _Encoded:
    ids: list[int]
    aligned: dict[str, list[int]]
    tensors: dict[str, Tensor]


class Responder:
    """A model with its processor, ready to be asked.

    Args:
        model: In evaluation mode, on its device.
        processor: With its chat template; one that has none gets `plain_template`.
        max_length: Most tokens of a prompt and its answer together; None for any.
        system_prompt: The system turn of every conversation that has none; "" for none.

    Raises:
        ValueError: `max_length` is less than 2.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_length: int | None = None,
        system_prompt: str = "",
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be at least 2 or None: got {max_length}")
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.system_prompt = system_prompt
        tokenizer = processor.tokenizer
        self._template = getattr(processor, "chat_template", None) or plain_template(processor)
        self._bos_text = tokenizer.bos_token
        # Only what the tokenizer itself would put first.
        self._bos = [i for i in tokenizer("a")["input_ids"][:1] if i == tokenizer.bos_token_id]
        padding = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad: int = next(i for i in padding if i is not None)
        self._known = vars(model.generation_config)

    def render(self, prompt: Prompt) -> str:
        """The text of `prompt` by the chat template, up to where the answer begins."""
        messages = list(prompt.messages)
        if self.system_prompt and messages[0]["role"] != "system":
            content = [{"type": "text", "text": self.system_prompt}]
            messages.insert(0, {"role": "system", "content": content})
        text: str = self.processor.apply_chat_template(
            messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        return text

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded inputs of the model, up to where the answers begin.

        Returns:
            `input_ids` and `attention_mask` (b, L) int64, what the processor gives for images,
            pixels in the model's dtype; on the model's device.

        Raises:
            ValueError: Some prompts have images and some have none, or one cannot be encoded.
        """
        if len({bool(prompt.images) for prompt in prompts}) != 1:
            raise ValueError("prompts of a batch must all have images, or all have none")
        return self._pad_rows([self._encode(self.render(p), p.images) for p in prompts])

    def _pad_rows(self, rows: list[_Encoded]) -> dict[str, Tensor]:
        longest = max(len(row.ids) for row in rows)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[fill] * (longest - len(row)) + row for row in values])

        inputs = {
            "input_ids": padded([row.ids for row in rows], self._pad),
            "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        }
        for key in sorted({key for row in rows for key in row.aligned}):
            inputs[key] = padded([row.aligned.get(key, []) for row in rows], 0)
        keys = {key for row in rows for key in row.tensors}
        inputs |= join({k: [row.tensors[k] for row in rows if k in row.tensors] for k in keys})
        device, dtype = self.model.device, self.model.dtype
        return {
            key: value.to(device, dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def _encode(self, text: str, images: Sequence[Image.Image]) -> _Encoded:
        extra: dict[str, Tensor] = {}
        if images:
            ids, extra = encode(self.processor, text, images)
        else:
            ids = self._tokens(text)
        aligned = {key: extra.pop(key)[0].tolist() for key in ALIGNED & extra.keys()}
        starts = bool(self._bos_text) and text.startswith(self._bos_text)
        if not starts and set(self._bos).isdisjoint(ids):
            ids = self._bos + ids
            aligned = {key: [0] * len(self._bos) + values for key, values in aligned.items()}
        return _Encoded(ids, aligned, extra)

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def unknown_options(self, options: Mapping[str, Any]) -> set[str]:
        """Names of settings that the model's `generate` does not have."""
        return generation_options(options, tuple(self._known))[1]

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Answer]:
        """Generate the answers to `prompts` in one batch, two where only some have images.

        Args:
            prompts: At least one.
            options: Of `generate`, and `until`: strings that end an answer.

        Returns:
            One answer for each prompt, without special tokens and what `until` cuts off.

        Raises:
            ValueError: A prompt fills `max_length`.
        """
        found: dict[int, Answer] = {}
        settings, _ = generation_options(options, tuple(self._known))
        until = options.get("until")
        for seen in (True, False):
            places = [i for i, prompt in enumerate(prompts) if bool(prompt.images) == seen]
            if places:
                answers = self._generate([prompts[i] for i in places], settings, until)
                found.update(zip(places, answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    def _generate(
        self, prompts: list[Prompt], settings: dict[str, Any], until: Any
    ) -> list[Answer]:
        batch = self.batch(prompts)
        lengths = batch["attention_mask"].sum(1).tolist()
        room = [self._room(length, settings["max_new_tokens"]) for length in lengths]
        out: Tensor = self.model.generate(
            **batch, **settings | {"max_new_tokens": max(room)}, pad_token_id=self._pad
        )
        ids = batch["input_ids"]
        # A model that generates from embeddings alone returns the new tokens only.
        if torch.equal(out[:, : ids.shape[1]], ids):
            out = out[:, ids.shape[1] :]
        answers = []
        for row, length, limit in zip(out.tolist(), lengths, room, strict=True):
            new = row[:limit]
            while new and new[-1] == self._pad:
                new.pop()
            text = self.processor.tokenizer.decode(
                new, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers.append(Answer(cut(text, until), length, len(new)))
        return answers

    def _room(self, length: int, wanted: int) -> int:
        if self.max_length is None:
            return wanted
        if length >= self.max_length:
            raise ValueError(
                f"max_length must hold a prompt and one token of its answer: got a prompt of "
                f"{length} tokens and max_length={self.max_length}; raise max_length"
            )
        return min(wanted, self.max_length - length)

    @torch.no_grad()
    def score(self, prompt: Prompt, continuation: str) -> tuple[float, bool]:
        """How likely `continuation` is after `prompt`.

        Both are tokenised together, and a token that spans the end of the prompt counts to the
        continuation.

        Returns:
            Sum of the log-probabilities of its tokens, divided by their number (nats per token),
            and whether each of them is the likeliest.

        Raises:
            ValueError: The continuation has no token.
        """
        text = self.render(prompt)
        row = self._encode(text, prompt.images)
        count = self._append(row, text, continuation)
        if not count:
            raise ValueError(f"a continuation must have a token: got {continuation!r}")
        batch = self._pad_rows([row])
        few = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        logits: Tensor = self.model(**batch, **{"logits_to_keep": count + 1} if few else {}).logits
        logits = logits[0, -count - 1 : -1].float()
        target = batch["input_ids"][0, -count:]
        right = logits.gather(1, target[:, None])[:, 0]
        mean = (right - logits.logsumexp(1)).mean()
        return float(mean), bool((logits.argmax(1) == target).all())

    def _append(self, row: _Encoded, text: str, continuation: str) -> int:
        """Put `continuation` behind the prompt `text` in `row`; the number of its tokens."""
        before, whole = self._tokens(text), self._tokens(text + continuation)
        same = len(os.path.commonprefix([before, whole]))
        kept, new = len(row.ids) - (len(before) - same), whole[same:]
        if row.ids[kept:] != before[same:]:  # the processor put something behind the prompt
            kept, new = len(row.ids), self._tokens(continuation)
        row.ids[kept:] = new
        for key, values in row.aligned.items():
            answers = key == "token_type_ids" and marks_answers(self.processor)
            values[kept:] = [int(answers)] * len(new)
        return len(new)
