"""Patches in the hidden states of every vision tower: a shift moves them to their neighbours.

Pixels, patch embeddings and positions are set so that the first channel of the hidden states says
which patch of which picture a row is. What a shift module adds to each row is then known without
a word about the order in which the tower keeps its rows.
"""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import fastalign as fa
from fastalign.adapters import AdapterConfig, attach
from fastalign.models import layer_stack
from fastalign.models._towers import block_order, describe_tower, tower_layout
from fastalign.testing.families import family

P = 14  # pixels of a patch's side


def codes(number, h, w):
    """Which patch it is, (h, w): 10000 picture + 100 row + column, all from 1."""
    return 10000 * number + 100 * torch.arange(1, h + 1)[:, None] + torch.arange(1, w + 1) + 0.0


def pixels(number, h, w, height=None, width=None):
    """A picture (3, H, W) whose every pixel holds its patch's code; zero beyond h x w patches."""
    picture = torch.zeros(height or h, width or w)
    picture[:h, :w] = codes(number, h, w)
    return picture.repeat_interleave(P, 0).repeat_interleave(P, 1).expand(3, -1, -1)


def dense(**options):
    """Three pictures of 4 x 6 patches."""
    return {"pixel_values": torch.stack([pixels(k, 4, 6) for k in (1, 2, 3)]), **options}, [(4, 6)]


def ragged():
    sizes = [(4, 4), (2, 3), (3, 1)]
    pictures = [pixels(k, h, w, 4, 4) for k, (h, w) in enumerate(sizes, 1)]
    image_sizes = torch.tensor(sizes) * P
    return {"pixel_values": torch.stack(pictures), "image_sizes": image_sizes}, sizes


def tiles():
    """A picture that fills its tile, and two that leave some of theirs empty."""
    sizes = [(4, 6), (2, 5), (3, 1)]
    pictures = [pixels(k, h, w, 4, 6) for k, (h, w) in enumerate(sizes, 1)]
    mask = torch.zeros(3, 4, 6, dtype=torch.bool)
    for k, (h, w) in enumerate(sizes):
        mask[k, :h, :w] = True
    return {"pixel_values": torch.stack(pictures), "patch_attention_mask": mask}, sizes


def rows_of_patches():
    sizes = [(3, 5), (4, 2)]
    values = torch.zeros(2, 16, 3 * P * P)
    for k, (h, w) in enumerate(sizes):
        values[k, : h * w] = codes(k + 1, h, w).flatten()[:, None]
    mask = (values[..., 0] != 0).long()
    shapes = torch.tensor(sizes)
    return {
        "pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes
    }, sizes  # fmt: skip


def blocks():
    """Images of three sizes, in the order that Qwen's own processor gives, and a video."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False
    )
    sizes = [(6, 10), (2, 4), (4, 6), (4, 6), (4, 6)]
    made = [pixels(k, h, w) for k, (h, w) in enumerate(sizes, 1)]
    values = [
        processor(np.asarray(picture), return_tensors="pt", input_data_format="channels_first")
        for picture in made
    ]
    rows = torch.cat([value["pixel_values"] for value in values]).float()
    thw = torch.tensor([[1, 6, 10], [1, 2, 4], [3, 4, 6]])  # the last is a video of three frames
    return {"hidden_states": rows, "grid_thw": thw}, sizes


TOWERS = {
    "llava": lambda: dense(interpolate_pos_encoding=True),
    "llava_onevision": lambda: dense(interpolate_pos_encoding=True),
    "internvl": dense,
    "two_towers": lambda: dense(interpolate_pos_encoding=True),
    "qwen2_vl": blocks,
    "qwen2_5_vl": blocks,
    "qwen3_vl": blocks,
    "qwen3_vl_moe": blocks,
    "qwen3_5": blocks,
    "qwen3_5_moe": blocks,
    "idefics3": tiles,
    "smolvlm": tiles,
    "mistral3": ragged,
    "gemma3": lambda: dense(interpolate_pos_encoding=True),
    "paligemma": lambda: dense(interpolate_pos_encoding=True),
    "instructblip": lambda: dense(interpolate_pos_encoding=True),
    "blip2": lambda: dense(interpolate_pos_encoding=True),
    "lfm2_vl": rows_of_patches,
}


def mixture(name):
    """The mixtures of experts of Qwen3-VL and Qwen3.5, whose towers have names of their own."""
    kind = {"qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5_moe": "Qwen3_5Moe"}[name]
    dense = family(name.removesuffix("_moe")).config
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    names += ("num_position_embeddings", "patch_size", "deepstack_visual_indexes")
    vision = dense.vision_config.to_dict()
    text = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_experts": 2}
    config = getattr(transformers, f"{kind}Config")(
        vision_config={k: vision[k] for k in names if k in vision},
        text_config={**text, "moe_intermediate_size": 8, "num_attention_heads": 4},
        image_token_id=500,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


class Same(nn.Module):
    """A layer that gives its input back."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def telling(name):
    """A model whose first tower layer puts out the codes in the first channel, and its tower."""
    model = mixture(name) if name.endswith("_moe") else family(name)
    vlm = fa.VLM(model)
    tower = vlm.vision_tower
    with torch.no_grad():
        for key, parameter in tower.named_parameters():
            if any(part in key for part in ("position", "pos_embed", "class_embed", "cls_token")):
                parameter.zero_()
        for key, module in list(tower.named_modules()):
            if "patch" in key and isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
                module.weight.zero_().flatten(1)[0, 0] = 1.0
                if module.bias is not None:
                    module.bias.zero_()
            if key in ("pre_layrnorm", "ln_pre"):
                setattr(tower, key, nn.Identity())
    layer_stack(tower)[0] = Same(describe_tower(model.config.vision_config).width)
    return model, tower


def neighbour_kernel(shift, row, col):
    """Set a shift module to h' = h + (the first channel of the neighbour at an offset)."""
    middle = shift.conv1.kernel_size[0] // 2
    with torch.no_grad():
        for parameter in shift.parameters():
            parameter.zero_()
        shift.conv1.weight[0, 0, middle, middle] = 1.0
        shift.conv2.weight[0, 0, middle + row, middle + col] = 1.0


def moved(name, row, col):
    """Codes of all rows, and what the shift module added to them, (rows,) each; and the sizes."""
    model, tower = telling(name)
    adapter = attach(model, AdapterConfig(shift_layers=(1,), shift_hidden_dim=2))
    neighbour_kernel(adapter.shifts["1"], row, col)
    inputs, sizes = TOWERS[name]()
    seen = {}

    def keep(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.update(before=hidden.flatten(0, -2), after=output.flatten(0, -2))

    layer_stack(tower)[0].register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        tower(**inputs)
    before, after = seen["before"], seen["after"]
    assert torch.equal(after[:, 1:], before[:, 1:])
    return before[:, 0], after[:, 0] - before[:, 0], sizes


@pytest.mark.parametrize(("row", "col"), [(0, -1), (-1, 0), (1, 1)], ids=["left", "up", "diagonal"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_shift_brings_the_neighbour(name, row, col):
    code, added, sizes = moved(name, row, col)
    number, r, c = code.long() // 10000, code.long() // 100 % 100, code.long() % 100
    if len(sizes) == 1:
        sizes = sizes * 3
    heights, widths = (torch.tensor([0, *side]) for side in zip(*sizes, strict=True))
    inside = (r + row >= 1) & (r + row <= heights[number])
    inside &= (c + col >= 1) & (c + col <= widths[number])
    expected = torch.where(inside & (code > 0), code + 100 * row + col, 0.0)
    assert torch.equal(added, expected)
    # Every patch is there once, and nearly every one has this neighbour.
    patches = code[code > 0].sort().values
    every = torch.cat([codes(k, h, w).flatten() for k, (h, w) in enumerate(sizes, 1)])
    assert torch.equal(patches, every.sort().values)
    assert (added > 0).sum() == sum((h - abs(row)) * (w - abs(col)) for h, w in sizes)


def test_blocks_and_windows_by_hand():
    # 4 x 6 patches, blocks of 2 x 2: the second patch of row 0 is in block 0, the third in block 1.
    assert block_order((4, 6), 2).view(4, 6).tolist() == [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
        [12, 13, 16, 17, 20, 21],
        [14, 15, 18, 19, 22, 23],
    ]
    # Windows of 2 x 2 blocks: the third block of each row comes in a window after the first four.
    assert block_order((4, 6), 2, window=2).view(4, 6).tolist() == [
        [0, 1, 4, 5, 16, 17],
        [2, 3, 6, 7, 18, 19],
        [8, 9, 12, 13, 20, 21],
        [10, 11, 14, 15, 22, 23],
    ]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3", "llava", "idefics3"])
def test_hidden_states_of_another_shape_are_refused(name):
    config = family(name).config.vision_config
    layout = tower_layout(config, (), TOWERS[name]()[0])
    shape = (*layout.shape[:-1], layout.shape[-1] + 1, 32)
    with pytest.raises(ValueError, match="hidden states of the vision tower must be"):
        layout.apply(None, torch.zeros(shape))


def test_unknown_towers_are_named():
    with pytest.raises(TypeError, match=r"cannot be mllama_vision_model.*tiles.*clip_vision_model"):
        describe_tower(family("mllama").config.vision_config)
    from transformers import ViTConfig

    with pytest.raises(TypeError, match=r"cannot be vit \(ViTConfig\).*unknown; supported are"):
        tower_layout(ViTConfig(), (torch.zeros(1, 3, 224, 224),), {})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "mistral3"])
def test_positional_arguments_are_those_of_the_tower(name):
    config, (inputs, _) = family(name).config.vision_config, TOWERS[name]()
    named, placed = tower_layout(config, (), inputs), tower_layout(config, (*inputs.values(),), {})
    assert (named.shape, named.grids) == (placed.shape, placed.grids)
