"""The diagnostics of one image: attention and words; and the prompt that shows an image."""

from pathlib import Path
from typing import Any

from fastalign.commands import options as of
from fastalign.commands.console import parse, table
from fastalign.commands.results import finish


def prompt_of(vlm: Any, processor: Any, image: Path) -> dict[str, Any]:
    """A batch of the prompt that shows an image, without the answer that a record must have."""
    from fastalign.commands.inputs import collator
    from fastalign.data import IGNORE_INDEX, Record

    batch = dict(collator(vlm, processor)([Record.from_caption(image, "A photo.")]))
    labels = batch.pop("labels")
    end = int((labels[0] != IGNORE_INDEX).nonzero()[0])
    # Inputs with a value for each token end where the answer begins.
    aligned = {"input_ids", "attention_mask", "cross_attention_mask"}
    aligned |= {"token_type_ids", "mm_token_type_ids"}
    return {k: v[:, :end] if k in aligned else v for k, v in batch.items()}


def _one(options: of.Attention | of.Words) -> tuple[Any, Any, Any]:
    """The model, its processor and a batch of one image."""
    from fastalign.commands.inputs import collator
    from fastalign.data import Record, open_image

    image = open_image(options.image)
    record = Record.from_caption(image, options.text, prompt=options.prompt)
    vlm, processor = options.load()
    return vlm, processor, collator(vlm, processor)([record])


def _picture(vlm: Any, batch: Any, view: int) -> Any:
    """A view as the model is given it, cropped and resized, (H, W, 3) between 0 and 1."""
    views = vlm.views(batch)
    if not 0 <= view < len(views):
        raise ValueError(f"view must lie in 0..{len(views) - 1}: got {view}")
    pixels = views[view].float().permute(1, 2, 0)
    low, high = pixels.aminmax()
    return ((pixels - low) / (high - low).clamp_min(1e-6)).numpy()


def attention(argv: list[str]) -> None:
    """Share of attention from text to an image, by layer and head, and its map."""
    options = parse(of.Attention, argv, "diagnose attention")
    vlm, _, batch = _one(options)

    from fastalign import diagnostics

    maps = True
    try:
        vlm.patches(batch)
    except ValueError as error:  # a Q-Former's queries have no grid, but attract attention
        maps = False
        print(f"no maps: {error}")
    found = diagnostics.image_attention(vlm, batch, maps=maps)
    rows = [
        (str(k), f"{share.mean():.3f}", f"{share.min():.3f}", f"{share.max():.3f}")
        for k, share in zip(found.layers, found.share, strict=True)
    ]
    table("Attention on image tokens", ("layer", "mean", "least head", "most"), rows, right=True)
    print(f"{found.queries} text tokens; attention to all tokens alike: {found.uniform:.3f}")
    data = {
        "layer": list(found.layers),
        "share": found.share.tolist(),
        "total": found.total.tolist(),
        "uniform": found.uniform,
        "queries": found.queries,
        "grids": list(found.grids),
        "maps": [found.map_of(i).mean(1).tolist() for i in range(len(found.grids))],
        "image": options.image,
    }
    shown = _picture(vlm, batch, options.view) if maps else None
    finish(
        options,
        data,
        lambda: diagnostics.plot_image_attention(
            found, view=options.view, layer=options.layer, image=shown
        ),
    )


_SHOWN = 64  # patches in the table of words


def words(argv: list[str]) -> None:
    """The words nearest to each patch of an image, at some layers (logit lens)."""
    options = parse(of.Words, argv, "diagnose words")
    vlm, processor, batch = _one(options)
    shown = _picture(vlm, batch, options.view)

    from fastalign import diagnostics

    layers = options.layers or None
    found = diagnostics.nearest_words(vlm, processor, batch, layers, top=options.top)
    columns = list(zip(*found.values(), strict=True))
    mine = [patches for patches in columns if patches[0].view == options.view]
    rows = [
        (f"{p[0].row}, {p[0].column}", *(f"{x.words[0]!r} {x.scores[0]:.3f}" for x in p))
        for p in mine[:_SHOWN]
    ]
    header = ("row, column", *("input" if k == 0 else f"layer {k}" for k in found))
    table("Nearest word of each patch (input: cosine; layers: probability)", header, rows)
    if len(mine) > _SHOWN:
        print(f"and {len(mine) - _SHOWN} patches more: --json has all of them")
    data = {
        "layers": {k: [patch._asdict() for patch in patches] for k, patches in found.items()},
        "image": options.image,
    }
    finish(
        options,
        data,
        lambda: diagnostics.plot_nearest_words(found, view=options.view, image=shown),
    )
