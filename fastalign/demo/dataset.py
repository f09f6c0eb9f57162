"""Scenes as the tensors that a model takes: tokens once, pixels when asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastalign.demo.base import SPECIAL_TOKENS
from fastalign.demo.scenes import ATTRIBUTES, IMAGE_SIZE, Scenes

if TYPE_CHECKING:
    from transformers import LlavaProcessor

IGNORE_INDEX = -100
_PAD = SPECIAL_TOKENS.index("<pad>")


class SceneDataset(Dataset[dict[str, Any]]):
    """The samples that the processor's chat template gives for `scenes.records()`, made quickly.

    Captions are tokenised once. Pixels are normalised as an image is asked for: 12,288 numbers
    take microseconds, and the bytes take a quarter of the memory that the floats would.

    Args:
        scenes: What to show.
        processor: The processor of `build_processor`, or one loaded from a folder of `save_base`.
        teacher: Features of a frozen teacher, (len(scenes), n, C), or None.

    Raises:
        ValueError: A caption holds a word that the tokenizer does not know, or `teacher` has
            another length than `scenes`.
    """

    def __init__(
        self, scenes: Scenes, processor: LlavaProcessor, *, teacher: Tensor | None = None
    ) -> None:
        if teacher is not None and len(teacher) != len(scenes):
            raise ValueError(
                f"teacher must have one row for each of the {len(scenes)} scenes: "
                f"got shape {tuple(teacher.shape)}"
            )
        self.scenes = scenes
        self.teacher = teacher
        parts: Any = processor
        tokenizer, pixels = parts.tokenizer, parts.image_processor
        self.attribute_ids = {
            name: torch.tensor(tokenizer.convert_tokens_to_ids(list(words)))
            for name, words in ATTRIBUTES.items()
        }
        self._images = torch.from_numpy(scenes.images)
        scale = torch.tensor(pixels.image_std)
        self._gain = (pixels.rescale_factor / scale)[:, None, None]
        self._offset = (torch.tensor(pixels.image_mean) / scale)[:, None, None]

        blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
        turn = {"role": "user", "content": [{"type": "image"}]}
        prompt = parts.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        self._prompt = torch.tensor(parts(text=[prompt], images=[blank])["input_ids"][0])
        ends = [caption + tokenizer.eos_token for caption in scenes.captions]
        self._answers = [torch.tensor(ids) for ids in tokenizer(ends)["input_ids"]] if ends else []
        for caption, answer in zip(scenes.captions, self._answers, strict=True):
            if bool((answer == tokenizer.unk_token_id).any()):
                raise ValueError(
                    f"scenes must have captions of the tokenizer's own words: got {caption!r}"
                )

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Returns:
            input_ids (t,) int64: prompt, caption, `<eos>`; labels (t,) int64: -100 on the prompt;
            pixel_values (3, 64, 64) float32; index; and teacher (n, C) where there is one.
        """
        answer = self._answers[index]
        item = {
            "input_ids": torch.cat([self._prompt, answer]),
            "labels": torch.cat([torch.full_like(self._prompt, IGNORE_INDEX), answer]),
            "pixel_values": self._images[index].movedim(-1, 0) * self._gain - self._offset,
            "index": index,
        }
        if self.teacher is not None:
            item["teacher"] = self.teacher[index]
        return item

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`collate` of the samples at `indices`."""
        return collate([self[i] for i in indices])


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Samples of `SceneDataset` as one right-padded batch.

    Args:
        items: At least one sample; all of them with teacher features, or none.

    Returns:
        input_ids, attention_mask, labels (b, t) int64, padded with `<pad>`, 0 and -100;
        pixel_values (b, 3, 64, 64) float32; teacher (b, n, C) where the samples have it.

    Raises:
        ValueError: `items` is empty.
    """
    if not items:
        raise ValueError("items must hold at least one sample: got none")
    ids = [item["input_ids"] for item in items]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=_PAD),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(
            [item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX
        ),
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
    }
    if "teacher" in items[0]:
        batch["teacher"] = torch.stack([item["teacher"] for item in items])
    return batch
