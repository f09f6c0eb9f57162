"""A small LLaVA of the real classes with random weights, and batches for it."""

from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VOCABULARY, SIDE, PATCH = 3, 64, 16, 4
TOKENS = (SIDE // PATCH) ** 2


def tiny_llava(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 3,
    head_scale: float = 1.0,
    tied: bool = False,
) -> nn.Module:
    """LLaVA-1.5 with a 4-layer ViT on 4 x 4 patches and a decoder of width 32.

    Args:
        seed: Of the weights.
        dtype: Of the weights.
        layers: Of the decoder.
        head_scale: Factor on the output embedding: above 1, label logits differ by more than the
            lower clamp of CAL, which random weights otherwise never pass.
        tied: Share the input and output embeddings.
    """
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=24,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlavaForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # large enough that an image changes the text's states
                    fan_in = parameter[0].numel()
                    parameter.normal_(0.0, 1.5 * fan_in**-0.5)
            model.get_output_embeddings().weight.mul_(head_scale)  # type: ignore[operator]
    return model.to(dtype).eval()


def llava_batch(
    samples: list[str], *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """A right-padded batch, one letter a piece of each sample.

    "t": a text token without label; "y": a labelled one; "i": an image of 16 tokens.

    >>> llava_batch(["ttiyyy", "tyy"])["input_ids"].shape
    torch.Size([2, 21])
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for sample in samples:
        row: list[int] = []
        label: list[int] = []
        for piece in sample:
            if piece == "i":
                row += [IMAGE] * TOKENS
                label += [-100] * TOKENS
                continue
            token = int(torch.randint(4, VOCABULARY, (1,), generator=generator))
            row.append(token)
            label.append(token if piece == "y" else -100)
        rows.append(row)
        labels.append(label)
    length = max(map(len, rows))
    batch: dict[str, Any] = {
        "input_ids": _padded(rows, length, 0),
        "attention_mask": _padded([[1] * len(row) for row in rows], length, 0),
        "labels": _padded(labels, length, -100),
    }
    images = sum(sample.count("i") for sample in samples)
    if images:
        pixels = torch.randn(images, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        batch["pixel_values"] = pixels.to(dtype)
    return batch


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
