"""The vocabulary's words nearest to each patch: a logit lens on the image tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastalign.diagnostics._figures import new_figure
from fastalign.diagnostics._modalities import check_image_tokens, check_layers, each_state, to_model
from fastalign.models import VLM, Batch, evaluating, first_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What decoders of transformers call the norm behind their last layer.
_FINAL_NORMS = ("norm", "final_layer_norm", "embedding_norm")


class PatchWords(NamedTuple):
    """A patch, by picture, row and column, and its nearest words, the nearest first.

    Attributes:
        scores: Probabilities of the words; at layer 0, cosines with their embeddings.
    """

    view: int
    row: int
    column: int
    words: tuple[str, ...]
    scores: tuple[float, ...]


def nearest_words(
    vlm: VLM,
    tokenizer: Any,
    batch: Batch,
    layers: Sequence[int] | None = None,
    *,
    top: int = 5,
    chunk: int = 8192,
) -> dict[int, list[PatchWords]]:
    """The words that each patch's state is nearest to, at some decoder layers (logit lens).

    A layer's state goes through the decoder's final norm and the output embedding, as if it were
    that of the last layer; the words are those of the largest logits. At layer 0, what the decoder
    is handed, they are those of the largest cosine with the input embeddings.

    Args:
        vlm: The model; run in evaluation mode, which is put back, without gradient.
        tokenizer: Its processor or tokenizer, which turns ids into text.
        batch: With images; tensors are moved to the model's device.
        layers: 0 to K; 0, the middle and the last by default.
        top: Words for each patch.
        chunk: Rows of the vocabulary at a time: (n, chunk) logits of n patches exist at once.

    Returns:
        For each layer the patches of all pictures, in order.

    Raises:
        ValueError: A layer does not exist, `top` or `chunk` is below 1, `top` exceeds the
            vocabulary, the decoder's output is not a final norm of its last layer, or image tokens
            are no patches.
    """
    check_image_tokens(vlm)
    depth = vlm.num_layers
    chosen = check_layers(vlm, (0, (depth + 1) // 2, depth) if layers is None else layers, first=0)
    words, embeddings = vlm.head.weight, vlm.model.get_input_embeddings().weight
    if not 1 <= top <= min(len(words), len(embeddings)) or chunk < 1:
        raise ValueError(
            f"top must lie in 1..{min(len(words), len(embeddings))} and chunk be at least 1: got "
            f"{top} and {chunk}"
        )
    inputs = to_model(vlm, batch)
    patches = vlm.patches(inputs)
    states: dict[int, Tensor] = {}

    def visit(k: int, hidden: Tensor) -> None:
        if k in chosen or k == depth:
            states[k] = patches.of(hidden)

    with evaluating(vlm.model):
        with _last_layer(vlm) as before_norm:
            each_state(vlm, inputs, visit)
        finish = _final_norm(vlm, patches.of(before_norm[-1]), states[depth])
        found = {}
        for k in chosen:
            if k == 0:
                found[k] = _cosines(states[0], embeddings, top, chunk)
            else:
                rows = states[k] if k == depth else finish(states[k])
                found[k] = _probabilities(vlm, rows, top, chunk)
    return {k: _named(tokenizer, patches.grids, *best) for k, best in found.items()}


@contextmanager
def _last_layer(vlm: VLM) -> Iterator[list[Tensor]]:
    """Keep the output of the last layer before the final norm."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(first_tensor(output).detach().clone())

    handle = vlm.layers[-1].register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _final_norm(vlm: VLM, before: Tensor, after: Tensor) -> Any:
    """What leads from the last layer's output to the decoder's, and was seen to do so here."""
    decoder = vlm.decoder
    names = [n for n in _FINAL_NORMS if isinstance(getattr(decoder, n, None), nn.Module)]
    candidates = [getattr(decoder, name) for name in names] or [nn.Identity()]
    for candidate in candidates:
        steps = [candidate, getattr(decoder, "project_out", None)]  # OPT-350M narrows after it
        finish = nn.Sequential(*(step for step in steps if step is not None))
        result = finish(before)
        if result.shape == after.shape:
            error = float((result.double() - after.double()).abs().max())
            if error <= 0.01 * float(after.double().abs().max()):
                return finish
    raise ValueError(
        f"{type(decoder).__name__} must make its output from its last layer by a norm called "
        f"{', '.join(_FINAL_NORMS)}: none of {names} gives it, so that its intermediate layers "
        "cannot be read"
    )


def _probabilities(vlm: VLM, rows: Tensor, top: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of the likeliest words of each row, (n, top) both."""
    head = vlm.head
    total = rows.new_full((len(rows),), -torch.inf, dtype=torch.float32)

    def logits(start: int, weight: Tensor) -> Tensor:
        nonlocal total
        bias = None if head.bias is None else head.bias[start : start + len(weight)].float()
        z = F.linear(rows.float(), weight.float(), bias) * vlm.logit_scale
        if vlm.softcap is not None:
            z = vlm.softcap * (z / vlm.softcap).tanh()
        total = torch.logaddexp(total, z.logsumexp(1))
        return z

    ids, best = _best(head.weight, logits, top, chunk)
    return ids, (best - total[:, None]).exp()


def _cosines(rows: Tensor, embeddings: Tensor, top: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Ids and cosines of the nearest input embeddings of each row, (n, top) both."""
    unit = F.normalize(rows.float(), dim=1)

    def cosines(start: int, weight: Tensor) -> Tensor:
        return unit @ F.normalize(weight.float(), dim=1).T

    return _best(embeddings, cosines, top, chunk)


def _best(weight: Tensor, score: Any, top: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Ids and scores of the `top` best rows of the vocabulary, which is read by chunks."""
    ids, best = None, None
    for start in range(0, len(weight), chunk):
        scores = score(start, weight[start : start + chunk])
        values, found = scores.topk(min(top, scores.shape[1]), dim=1)
        found = found + start
        if ids is not None and best is not None:
            values, found = torch.cat([best, values], 1), torch.cat([ids, found], 1)
            values, order = values.topk(min(top, values.shape[1]), dim=1)
            found = found.gather(1, order)
        ids, best = found, values
    assert ids is not None and best is not None
    return ids, best


def _named(
    tokenizer: Any, grids: Sequence[tuple[int, int]], ids: Tensor, scores: Tensor
) -> list[PatchWords]:
    decode = getattr(tokenizer, "tokenizer", tokenizer).decode
    texts = {i: decode([i]) for i in sorted(set(ids.flatten().tolist()))}
    places = [
        (view, row, column)
        for view, (height, width) in enumerate(grids)
        for row in range(height)
        for column in range(width)
    ]
    rows = zip(places, ids.tolist(), scores.tolist(), strict=True)
    return [PatchWords(*at, tuple(texts[i] for i in best), tuple(s)) for at, best, s in rows]


def plot_nearest_words(
    data: Mapping[int, Sequence[PatchWords]], *, view: int = 0, image: Any = None
) -> Figure:
    """A panel for each layer: the nearest word of each patch in its place.

    Args:
        data: A result of `nearest_words`.
        view: Which picture.
        image: The picture, (H, W, 3) or a PIL image, shown faintly behind the words.

    Raises:
        ValueError: There is no such picture.
    """
    known = {patch.view for patches in data.values() for patch in patches}
    if view not in known:
        raise ValueError(f"view must be one of {sorted(known)}: got {view}")
    some = [patch for patch in next(iter(data.values())) if patch.view == view]
    height, width = some[-1].row + 1, some[-1].column + 1
    figure = new_figure(max(3.0, 0.62 * width) * len(data), max(2.4, 0.45 * height) + 0.6)
    for place, (k, patches) in enumerate(data.items(), start=1):
        axes = figure.add_subplot(1, len(data), place)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        mine = [patch for patch in patches if patch.view == view]
        if image is None:
            scores = torch.tensor([patch.scores[0] for patch in mine]).view(height, width)
            axes.imshow(scores.numpy(), cmap="Blues", alpha=0.6, extent=extent, aspect="auto")
        else:
            axes.imshow(image, alpha=0.35, extent=extent, aspect="auto")
        for patch in mine:
            # A $ would begin a formula.
            word = patch.words[0].strip().replace("$", r"\$")[:12]
            axes.text(patch.column, patch.row, word, ha="center", va="center", fontsize=6)
        axes.set_xlabel("patch column")
        axes.set_title("input: nearest embedding" if int(k) == 0 else f"layer {k}")
        if place == 1:
            axes.set_ylabel("patch row")
    return figure
