"""Models of published sizes from their configuration alone, random batches, and their FLOPs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import layer_stack

IMAGE = 3  # the image token; random text begins after it

_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_CLIP_L |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}
_VICUNA_7B = {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008}
_VICUNA_7B |= {"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096}
_TINY_CLIP = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4}
_TINY_CLIP |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 24}
_TINY_LLAMA = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
_TINY_LLAMA |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}


@dataclass(frozen=True)
class Shape:
    """One model at one batch.

    Args:
        name: Of the model.
        vision, text: Sizes, for CLIPVisionConfig and LlamaConfig.
        tiles: False for one view of each image (LLaVA-1.5); true for LLaVA-NeXT's five, of a square
            image of twice the tower's side.
        batch: Samples.
        prompt: Text tokens before the image.
        question, answer: Fewest and most text tokens after it, without and with a label.
        shift_layers, shift_hidden_dim: Of DeepAlign's adapters, 200 M parameters as published.
    """

    name: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    tiles: bool
    batch: int
    prompt: int = 35
    question: tuple[int, int] = (16, 48)
    answer: tuple[int, int] = (48, 160)
    shift_layers: tuple[int, ...] = (4, 6)
    shift_hidden_dim: int = 5440

    @property
    def side(self) -> int:
        """Patches along one side of the tower's input."""
        patches: int = self.vision["image_size"] // self.vision["patch_size"]
        return patches

    @property
    def image_tokens(self) -> int:
        """Of one image: its patches; LLaVA-NeXT adds the four tiles and one token for each line."""
        return self.side**2 + self.tiles * (4 * self.side**2 + 2 * self.side)

    @property
    def views(self) -> int:
        """Inputs of the tower for one image."""
        return 5 if self.tiles else 1


SHAPES = (
    Shape("LLaVA-1.5-7B", _CLIP_L, _VICUNA_7B, tiles=False, batch=4),
    Shape("LLaVA-NeXT-7B", _CLIP_L, _VICUNA_7B, tiles=True, batch=2),
)
_SHORT: dict[str, Any] = {"prompt": 3, "question": (2, 4), "answer": (3, 6)}
_SHORT |= {"shift_layers": (1, 2), "shift_hidden_dim": 8}
TINY_SHAPES = (
    Shape("tiny LLaVA-1.5", _TINY_CLIP, _TINY_LLAMA, tiles=False, batch=3, **_SHORT),
    Shape("tiny LLaVA-NeXT", _TINY_CLIP, _TINY_LLAMA, tiles=True, batch=2, **_SHORT),
)


def build(shape: Shape, device: str, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, made on the device."""
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaNextConfig,
    )

    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**shape.vision),
        "text_config": LlamaConfig(**shape.text, rms_norm_eps=1e-5, **special),
        "image_token_index": IMAGE,
        "image_seq_length": shape.image_tokens,
    }
    if shape.tiles:
        side = 2 * shape.vision["image_size"]
        config: Any = LlavaNextConfig(**options, image_grid_pinpoints=[[side, side]])
    else:
        config = LlavaConfig(**options)
    auto: Any = AutoModelForImageTextToText
    with torch.device(device):
        model: nn.Module = auto.from_config(config, dtype=dtype)
    return model


def make_batch(shape: Shape, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Right-padded samples of one image and one answer each, of random tokens and lengths.

    `teacher` are the patch features that DeepAlign distils, of the vision tower's grid and width.
    """
    g = torch.Generator().manual_seed(seed)

    def between(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=g))

    lengths = [(between(shape.question), between(shape.answer)) for _ in range(shape.batch)]
    start = shape.prompt + shape.image_tokens
    longest = start + max(map(sum, lengths))
    ids = torch.randint(IMAGE + 1, shape.text["vocab_size"], (shape.batch, longest), generator=g)
    ids[:, shape.prompt : start] = IMAGE
    columns, labels = torch.arange(longest), torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, (question, answer) in enumerate(lengths):
        mask[i] = columns < start + question + answer
        labelled = mask[i].bool() & (columns >= start + question)
        labels[i, labelled] = ids[i, labelled]
    ids[mask == 0] = 0
    side = shape.vision["image_size"]
    views = (shape.batch, 5) if shape.tiles else (shape.batch,)
    pixels = torch.randn(*views, 3, side, side, generator=g)
    width = shape.vision["hidden_size"]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch |= {"pixel_values": pixels.to(dtype)}
    # Of LLaVA-NeXT's whole picture and of its tiles together.
    pictures = shape.batch * (2 if shape.tiles else 1)
    batch |= {"teacher": torch.randn(pictures, shape.side**2, width, generator=g)}
    if shape.tiles:
        batch["image_sizes"] = torch.full((shape.batch, 2), 2 * side)
    return {name: x.to(device) for name, x in batch.items()}


FLOPS = (
    "Forward: 2 N t of each part's N parameters in matrices and the t tokens it sees, padding not "
    "counted, the head at every token; and 4 d L^2 a layer for attention over L tokens, half of it "
    "where causal. A step is 3 times that where everything is trained, 2 times where adapters at "
    "its beginning are (theirs not counted), and the forward with 2 times the trained layers and "
    "head where only these are. Second passes without gradient and recomputation are not counted."
)


def forward_flops(
    model: nn.Module, shape: Shape, batch: Mapping[str, Tensor], layers: int = 0
) -> float:
    """FLOPs of one forward pass, see FLOPS.

    Args:
        model: See `build`.
        shape: Of the model.
        batch: See `make_batch`.
        layers: Only so many of the decoder's last layers and the head; 0 for everything.
    """
    anything: Any = model
    lengths = batch["attention_mask"].sum(1).double()
    text, vision = shape.text, shape.vision
    stack = layer_stack(anything.get_decoder())
    chosen = list(stack)[-layers:] if layers else list(stack)
    decoder = sum(map(matrices, chosen)) + matrices(anything.get_output_embeddings())
    total: float = 2 * decoder * float(lengths.sum())
    total += len(chosen) * 2 * text["hidden_size"] * float(lengths.square().sum())
    if layers:
        return total
    views, patches = shape.batch * shape.views, shape.side**2 + 1  # with the class token
    tower = anything.get_encoder(modality="image")
    total += 2 * matrices(tower) * views * patches
    total += vision["num_hidden_layers"] * 4 * vision["hidden_size"] * views * patches**2
    projector: int = text["hidden_size"] * (vision["hidden_size"] + text["hidden_size"])
    return total + 2 * projector * views * shape.side**2


def matrices(module: nn.Module) -> int:
    """Parameters that are multiplied with: those of linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv2d)
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, kinds))


# Dense bfloat16 TFLOP/s of the makers' data sheets, by a word of the device's name.
_PEAKS = {
    ("H100", "PCIe"): 756.0,
    ("H100", "NVL"): 835.0,
    ("H100",): 989.0,
    ("H200",): 989.0,
    ("GH200",): 989.0,
    ("H20",): 148.0,
    ("B200",): 2250.0,
    ("A100",): 312.0,
    ("L40S",): 362.0,
    ("L4",): 121.0,
    ("4090",): 165.0,
}


def peak_tflops(device: str) -> float | None:
    """The most that a device of this name computes in dense bfloat16, or None if not known."""
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    fitting = [names for names in _PEAKS if words.issuperset(names)]
    return _PEAKS[max(fitting, key=len)] if fitting else None
