"""`fastalign diagnose WHAT`: diagnostics of the papers, each as a table, a file and a figure."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fastalign.commands import options as of
from fastalign.commands.console import bar, batches, parse, table
from fastalign.commands.pictures import attention, prompt_of, words
from fastalign.commands.results import curves, finish, interval


def run(argv: list[str]) -> None:
    """Run one diagnostic; SystemExit with status 2 where there is no such one."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name in DIAGNOSTICS:
        DIAGNOSTICS[name](rest)
    else:
        print(f"fastalign diagnose: no diagnostic {name!r}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """The diagnostics, a line each."""
    lines = [f"  {name:<11}{command.__doc__}" for name, command in DIAGNOSTICS.items()]
    return "\n".join(["usage: fastalign diagnose WHAT [OPTIONS]", "", *lines, "", "WHAT --help"])


# -- images with texts ---------------------------------------------------------------------------


def _samples(options: of.Samples) -> list[Any]:
    """The records of the options, before the model is loaded, which takes longer."""
    from fastalign.commands.inputs import at_least_one, drawn, pairs

    at_least_one(options, "samples", "batch_size")
    if options.data is not None and options.images is None and options.texts is None:
        return drawn(options.data, options.image_root, options.samples, options.seed)
    if options.data is None and options.images is not None and options.texts is not None:
        return pairs(options.images, options.texts, options.samples, options.seed)
    raise ValueError(
        "images and texts must be given, or data in place of both: got "
        f"images={options.images}, texts={options.texts}, data={options.data}"
    )


def _batches(vlm: Any, processor: Any, options: of.Samples, records: list[Any]) -> Iterator[Any]:
    from fastalign.commands.inputs import collator
    from fastalign.progress import peak_memory_mib

    size = options.batch_size
    groups = [records[i : i + size] for i in range(0, len(records), size)]
    device = next(vlm.model.parameters()).device
    collate = collator(vlm, processor, options.max_length)
    return batches(groups, collate, lambda: peak_memory_mib(device))


def gap(argv: list[str]) -> None:
    """Distance, norms and cosines of vision and text tokens, layer by layer."""
    options = parse(of.Gap, argv, "diagnose gap")
    records = _samples(options)
    vlm, processor = options.load()

    from fastalign import diagnostics

    data = diagnostics.modality_gap(vlm, _batches(vlm, processor, options, records))
    data |= {"samples": len(records), "seed": options.seed}
    moments = ("relative_distance", "cosine", "vision_norm", "text_norm")
    names = (*moments, "within_vision", "within_text", "between")
    rows = [
        (str(k), *(f"{data[name][i]:.3g}" for name in names)) for i, k in enumerate(data["layer"])
    ]
    header = ("layer", "distance", "cosine", "|vision|", "|text|", "vision", "text", "between")
    table("Modality gap by layer (last three: mean cosines)", header, rows, right=True)
    print(f"{data['vision_tokens']} vision and {data['text_tokens']} text tokens")
    finish(options, data, lambda: diagnostics.plot_modality_gap(curves(options, data)))


def embedding(argv: list[str]) -> None:
    """Vision and text tokens in the plane by t-SNE, layer by layer."""
    options = parse(of.Embedding, argv, "diagnose embedding")
    records = _samples(options)
    vlm, processor = options.load()

    from fastalign import diagnostics

    data = diagnostics.token_embedding(
        vlm,
        _batches(vlm, processor, options, records),
        options.layers or None,
        tokens=options.tokens,
        perplexity=options.perplexity,
        seed=options.seed,
    )
    rows = [(str(k), f"{share:.3f}") for k, share in data["own_neighbour"].items()]
    title = f"Tokens whose nearest is of their modality, {data['tokens']} of each"
    table(title, ("layer", "share"), rows, right=True)
    data["samples"] = len(records)
    finish(options, data, lambda: diagnostics.plot_token_embedding(data))


# -- probe, perplexity, blind --------------------------------------------------------------------


def probe(argv: list[str]) -> None:
    """Accuracy of a linear classifier on the visual states of each layer."""
    options = parse(of.Probe, argv, "diagnose probe")

    from fastalign.commands.inputs import at_least_one, classes_of, collator
    from fastalign.data import Record

    at_least_one(options, "batch_size")
    files, classes = classes_of(options.images, options.per_class, options.seed)
    vlm, processor = options.load()

    from fastalign import diagnostics
    from fastalign.progress import peak_memory_mib

    records = [Record.from_caption(file, options.text) for file in files]
    starts = range(0, len(records), options.batch_size)
    groups = [records[i : i + options.batch_size] for i in starts]
    device = next(vlm.model.parameters()).device
    collate = collator(vlm, processor)
    inputs = batches(
        groups, collate, lambda: peak_memory_mib(device), after="classifiers of the layers ..."
    )
    data = diagnostics.linear_probe(
        vlm,
        zip(inputs, (classes[i : i + options.batch_size] for i in starts), strict=True),
        options.layers or None,
        folds=options.folds,
        regularization=options.regularization,
        seed=options.seed,
    )
    found = [("tower", data["tower"])] if data["tower"] is not None else []
    names = ("accuracy", "interval", "shuffled")
    found += [(str(k), {n: data[n][i] for n in names}) for i, k in enumerate(data["layer"])]
    rows = [
        (name, f"{x['accuracy']:.3f}", interval(x["interval"]), f"{x['shuffled']:.3f}")
        for name, x in found
    ]
    table("Linear probe", ("layer", "accuracy", "95 %", "classes shuffled"), rows, right=True)
    print(f"{data['samples']} images of {data['classes']} classes, chance {data['chance']:.3f}")
    finish(options, data, lambda: diagnostics.plot_linear_probe(curves(options, data)))


def perplexity(argv: list[str]) -> None:
    """Perplexity on running text, with and without the adapter."""
    options = parse(of.Perplexity, argv, "diagnose perplexity")

    from fastalign import diagnostics

    # Opened before the model is loaded, which takes longer.
    if next(iter(diagnostics.documents(options.texts)), None) is None:
        raise ValueError(f"texts must hold at least one text: found none in {options.texts}")
    vlm, processor = options.load()
    prefix = None if options.image is None else prompt_of(vlm, processor, options.image)
    with bar(None) as move:
        data = diagnostics.perplexity(
            vlm,
            processor,
            _counted(options.texts, move),
            window=options.window,
            stride=options.stride,
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            prefix=prefix,
        )
    found = {"model": data}
    if "without_adapter" in data:
        found = {"with the adapter": data, "without": data["without_adapter"]}
    rows = [
        (name, f"{x['perplexity']:.4g}", f"{x['nats']:.4f}", interval(x["interval"]))
        for name, x in found.items()
    ]
    table("Perplexity", ("", "perplexity", "nats / token", "95 %"), rows, right=True)
    print(f"{data['tokens']} tokens in {data['windows']} windows of {data['window']}")
    if "difference" in data:
        change = data["difference"]
        print(
            f"difference with the adapter: {change['nats']:+.5f} nats "
            f"({interval(change['interval'])})"
        )
    data |= {"texts": options.texts, "image": options.image}
    finish(options, data, lambda: diagnostics.plot_perplexity(curves(options, data)))


def _counted(texts: Path, move: Callable[..., None]) -> Iterator[Iterator[str]]:
    """The documents, with the characters that have been read shown on the bar."""
    from fastalign.diagnostics import documents

    def count(pieces: Iterable[str]) -> Iterator[str]:
        for piece in pieces:
            yield piece
            move(advance=len(piece), text="characters")

    return (count(pieces) for pieces in documents(texts))


def blind(argv: list[str]) -> None:
    """Accuracy of answers with the right image, with another's, and with none."""
    options = parse(of.Blind, argv, "diagnose blind")

    from fastalign.commands.inputs import at_least_one, collator, drawn

    at_least_one(options, "samples", "batch_size")
    records = drawn(options.data, options.image_root, options.samples, options.seed)
    vlm, processor = options.load()

    from fastalign import diagnostics

    collate = collator(vlm, processor, options.max_length)
    with bar(3 * -(-len(records) // options.batch_size)) as move:

        def shown(group: Any) -> Any:
            batch = collate(group)
            move()
            return batch

        data = diagnostics.blind_accuracy(vlm, records, shown, batch_size=options.batch_size)
    labels = {"image": "right image", "shuffled": "another's image", "none": "no image"}
    rows = [_blind_row(label, data[name]) for name, label in labels.items()]
    for name, label in (("shuffled", "right less another's"), ("none", "right less none")):
        rows.append(_blind_row(label, data["difference"][name]))
    header = ("± 95 %", "token accuracy", "nats / token")
    table("With and without the image", header, rows, right=True)
    print(f"{data['samples']} samples, {data['tokens']} label tokens")
    if data["same_image"]:
        print(f"{data['same_image']} samples have another sample's image that is their own")
    data |= {"data": options.data, "seed": options.seed}
    finish(options, data, lambda: diagnostics.plot_blind_accuracy(curves(options, data)))


def _blind_row(label: str, rates: dict[str, Any]) -> tuple[str, ...]:
    cells = [label]
    for name in ("accuracy", "cross_entropy"):
        half = rates[f"{name}_interval"][1] - rates[name]
        cells.append(f"{rates[name]:.4f} ± {half:.4f}")
    return tuple(cells)


DIAGNOSTICS: dict[str, Callable[[list[str]], None]] = {
    "gap": gap,
    "embedding": embedding,
    "attention": attention,
    "words": words,
    "probe": probe,
    "perplexity": perplexity,
    "blind": blind,
}
