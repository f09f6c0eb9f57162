"""Batches of written samples, for trainers that draw indices."""

import torch

from fastalign.testing.models import TOKENS, llava_batch


def sample(samples, index):
    """Sample `index` of an endless repetition of `samples`, with teacher features of its own."""
    batch = llava_batch([samples[index % len(samples)]], seed=index)
    if "pixel_values" in batch:
        generator = torch.Generator().manual_seed(index)
        batch["teacher"] = torch.randn(1, TOKENS, 5, generator=generator)
    return batch


def collate(samples, indices):
    """A batch in which no sample depends on its company."""
    return merged([sample(samples, index) for index in indices])


def merged(batches):
    """Batches of one sample as one, padded to the longest."""
    length = max(b["input_ids"].shape[1] for b in batches)
    merged = {}
    for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        rows = [
            torch.nn.functional.pad(b[name], (0, length - b[name].shape[1]), value=value)
            for b in batches
        ]
        merged[name] = torch.cat(rows)
    for name in ("pixel_values", "teacher"):
        images = [b[name] for b in batches if name in b]
        if images:
            merged[name] = torch.cat(images)
    return merged
