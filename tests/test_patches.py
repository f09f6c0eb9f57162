"""Image tokens as patches: each token's place, grid and pixels, in every family."""

import pytest
import torch

import fastalign as fa
from fastalign.models import query_attention
from fastalign.models._qformer import cross_attentions
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for

QFORMERS = ("instructblip", "instructblip_opt", "blip2")
WITH_PATCHES = [name for name in (*FAMILIES, *RECURRENT) if name not in (*QFORMERS, "mllama")]
# What each family's two image sizes are on the grid of its tokens.
GRIDS = {
    "llava": [(4, 4)],
    "llava_next": [(4, 4), (8, 6), (4, 4), (4, 8)],
    "llava_onevision": [(4, 4), (8, 6), (4, 4), (4, 8)],
    "internvl": [(2, 2), (2, 2), (2, 2)],
    "two_towers": [(4, 4)],
    "qwen2_vl": [(2, 3), (1, 2)],
    "qwen2_5_vl": [(2, 3), (1, 2)],
    "qwen3_vl": [(2, 3), (1, 2)],
    "qwen3_5": [(2, 3), (1, 2)],
    "lfm2_vl": [(2, 2)],
    "idefics3": [(2, 2)],
    "smolvlm": [(2, 2)],
    "mistral3": [(2, 2), (1, 2)],
    "gemma3": [(2, 2)],
    "paligemma": [(4, 4)],
    "paligemma2": [(4, 4)],
}


def case(name, samples=None):
    model = family(name)
    return fa.VLM(model), family_batch(name, model, samples or samples_for(name))


def blind_to_others(vlm):
    """Attention that adds nothing, so that a token of the tower depends on its own pixels alone."""
    for module in vlm.vision_tower.modules():
        for part in ("self_attn", "attn", "attention"):
            attention = getattr(module, part, None)
            for name, linear in () if attention is None else attention.named_modules():
                if name in ("o_proj", "out_proj", "proj", "projection_layer"):
                    torch.nn.init.zeros_(linear.weight)
                    if linear.bias is not None:
                        torch.nn.init.zeros_(linear.bias)


def embeddings(vlm, batch, pixels):
    """What the decoder is handed, (b * L, d), as a function of the pixels."""
    seen = {}
    handle = vlm.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    inputs = {k: v for k, v in batch.items() if k != "labels"} | {"pixel_values": pixels}
    vlm.model(**inputs, use_cache=False)
    handle.remove()
    return seen["inputs_embeds"].flatten(0, 1)


def seen_pixels(vlm, batch, pixels, gradient):
    """For each view the pixels with a gradient, (H, W) bool."""
    marked = torch.where(gradient != 0, 1e6, pixels.detach().clamp(-100, 100))
    return [(view == 1e6).any(0) for view in vlm.views({**batch, "pixel_values": marked})]


def inside(mask, grid, row, column):
    """Whether the pixels lie in the cell of a grid, at least one of them."""
    (height, width), (rows, columns) = mask.shape, grid
    where = mask.nonzero()
    cells = where * torch.tensor([rows, columns]) // torch.tensor([height, width])
    return len(where) > 0 and bool((cells == torch.tensor([row, column])).all())


@pytest.mark.parametrize("name", WITH_PATCHES)
def test_each_token_sees_the_pixels_of_its_cell_and_no_others(name):
    """Two samples with two images of two sizes and one with one: the gradient says who sees what.

    ConvNeXt's cells see beyond their borders, so the two-tower form is judged by its CLIP alone.
    """
    vlm, batch = case(name, None if name.startswith("pali") else ["titiyy", "tyyiy", "ityiyy"])
    blind_to_others(vlm)
    if name == "two_towers":
        torch.nn.init.zeros_(vlm.model.model.value.weight)
    pixels = batch["pixel_values"].clone().requires_grad_()
    rows, patches = embeddings(vlm, batch, pixels), vlm.patches(batch)
    cells = [
        (v, r, c) for v, (h, w) in enumerate(patches.grids) for r in range(h) for c in range(w)
    ]
    assert len(cells) == len(patches.places) == patches.cu_seqlens[-1]
    for place, (view, row, column) in zip(patches.places.tolist(), cells, strict=True):
        (gradient,) = torch.autograd.grad(rows[place].square().sum(), pixels, retain_graph=True)
        masks = seen_pixels(vlm, batch, pixels, gradient)
        assert inside(masks.pop(view), patches.grids[view], row, column), (view, row, column)
        assert not any(mask.any() for mask in masks)


@pytest.mark.parametrize("name", WITH_PATCHES)
def test_grids_and_rows_in_their_order(name):
    vlm, batch = case(name)
    patches, hidden = vlm.patches(batch), torch.randn(*batch["input_ids"].shape, 3)
    grids = GRIDS[name]
    assert list(patches.grids[: len(grids)]) == grids
    assert len(patches.grids) == vlm.count_views(batch) == len(vlm.views(batch))
    assert torch.equal(patches.places, patches.places.unique()), "row-major, none twice"
    assert bool(vlm.vision_mask(batch).flatten()[patches.places].all())
    assert torch.equal(patches.of(hidden), hidden.view(-1, 3)[patches.places])


def test_row_ends_of_llava_next_are_no_patches():
    vlm, batch = case("llava_next", ["tiyy"])
    patches = vlm.patches(batch)
    assert vlm.vision_mask(batch).sum() - len(patches.places) == 8, "one a row of the tiles"


def test_onevision_shrinks_what_is_too_large_and_leaves_several_images_whole():
    model = family("llava_onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    vlm, layout = fa.VLM(model), family_batch("llava_onevision", model, ["tiyy"])
    # (8, 6) cells are more than 1.21 times one tile's 16: sqrt(48 / 16) = 1.73 times fewer a side.
    image = torch.tensor([[500] * (16 + 4 * (3 + 1)) + [7]])
    batch = {"input_ids": image, "pixel_values": layout["pixel_values"]}
    batch |= {"image_sizes": layout["image_sizes"], "attention_mask": torch.ones_like(image)}
    assert vlm.patches(batch).grids == ((4, 4), (4, 3))
    vlm.hidden_states(batch, [1])  # the model itself counts its tokens the same
    several = {**batch, "batch_num_images": torch.tensor([2])}
    several["input_ids"] = torch.tensor([[500] * 34 + [7]])
    several["pixel_values"] = layout["pixel_values"].repeat(2, 1, 1, 1, 1)[:, :1]
    several["image_sizes"] = layout["image_sizes"].repeat(2, 1)
    several["attention_mask"] = torch.ones_like(several["input_ids"])
    assert vlm.patches(several).grids == ((4, 4), (4, 4))
    assert [view.shape for view in vlm.views(several)] == [(3, 56, 56)] * 2
    vlm.hidden_states(several, [1])


def test_count_of_image_tokens_is_checked():
    vlm, batch = case("llava", ["tiyy"])
    batch["input_ids"][0, 1] = 7
    with pytest.raises(ValueError, match="must hold 16 image tokens for the 1 images of llava: go"):
        vlm.patches(batch)


def test_errors_without_images_or_grids():
    vlm, batch = case("llava", ["tiyy"])
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="no pixel_values"):
        vlm.patches(batch)
    assert vlm.count_views(batch) == 0
    with pytest.raises(ValueError, match="by cross-attention"):
        case("mllama")[0].patches(case("mllama")[1])
    with pytest.raises(ValueError, match="Q-Former's queries"):
        case("blip2")[0].patches(case("blip2")[1])
    with pytest.raises(ValueError, match="llava has none"):
        vlm.queries(batch)


@pytest.mark.parametrize("name", QFORMERS)
def test_where_queries_look_is_the_attention_of_the_model(name):
    vlm, batch = case(name)
    vlm.model.set_attn_implementation("eager")
    own = []
    handle = cross_attentions(vlm.model)[-1].register_forward_hook(
        lambda module, args, output: own.append(output[1])
    )
    with query_attention(vlm.model) as looks:
        vlm.model(**batch)
    handle.remove()
    assert torch.allclose(looks[0], own[0].mean(1), atol=1e-6)
    assert torch.equal(vlm.forward(batch).looks, looks[0])
    assert torch.allclose(looks[0].sum(-1), torch.ones(()), atol=1e-5)
    queries = vlm.queries(batch)
    assert queries.grids == ((1, 4),) * 4 == ((1, 4),) * vlm.count_views(batch)
    assert torch.equal(queries.places, vlm.vision_mask(batch).flatten().nonzero()[:, 0])


def test_images_of_mllama_are_counted_without_padding():
    vlm, batch = case("mllama")
    assert vlm.count_views(batch) == sum(sample.count("i") for sample in samples_for("mllama"))


# Passes that end early


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "blip2"])
def test_layers_above_the_last_one_wanted_do_not_run(name):
    vlm, batch = case(name)
    whole = vlm.hidden_states(batch)
    runs = []
    for k, layer in enumerate(vlm.layers, 1):
        layer.register_forward_hook(lambda module, args, output, k=k: runs.append(k))
    with torch.no_grad():
        first, second = vlm.hidden_states(batch, [2, 1])
    assert runs == [1, 2], "hooks of the last one run, those above never"
    assert torch.equal(first, whole[1]) and torch.equal(second, whole[0])
    runs.clear()
    with torch.no_grad():
        vlm.hidden_states(batch, [1, 4])
    vlm.hidden_states(batch, [1])  # with a gradient the pass is whole
    assert runs == [1, 2, 3, 4] * 2


def test_early_end_leaves_no_hook_and_spares_an_engine():
    vlm, batch = case("llava", ["tiyy"])
    before = [len(layer._forward_hooks) for layer in vlm.layers]
    with torch.no_grad():
        vlm.hidden_states(batch, [1])
    assert [len(layer._forward_hooks) for layer in vlm.layers] == before
    vlm.layers[0]._hf_hook = object()  # an engine's
    ran = []
    vlm.layers[-1].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        vlm.hidden_states(batch, [1])
    assert ran == [1]
