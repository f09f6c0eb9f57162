"""What moves MIR and what does not, on the demo's base model; and how exact its root is.

    python -m benchmarks.mir_invariance [--json FILE] [--only TABLE ...] [--quick]

"data" compares seen with new scenes, and a scene's caption with other text; "settings" the paper's
choices with those of the released code; "samples" has the form of the MIR paper's Table 6; "moca"
trains a calibration, a projector, and both, on the caption loss; and "root" is the relative error
of the trace of the root by each method. MIR is that of the paper (outliers removed, every text
token). All of it takes a few minutes of a CPU.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from benchmarks.__main__ import write
from fastalign import diagnostics, linalg, objectives
from fastalign.adapters import AdapterConfig, attach
from fastalign.demo.base import build_processor, load_base
from fastalign.demo.dataset import SceneDataset
from fastalign.demo.evaluate import evaluate
from fastalign.demo.scenes import Scenes, Split, scenes, vocabulary
from fastalign.models import VLM, evaluating

Row = dict[str, Any]
BASE_SEED = 0  # of the scenes that the shipped base was trained on
SETS, SAMPLES = 5, 100
SIZES = (1, 5, 10, 25, 50, 100, 200, 400)
WIDTH = 512


def measured(vlm: VLM, data: SceneDataset, rows: range, **options: Any) -> Row:
    """`measure_mir` over the scenes of `data` at `rows`."""
    batches = (data.batch(rows[i : i + 50]) for i in range(0, len(rows), 50))
    with warnings.catch_warnings():  # few samples give singular covariances: that is measured here
        warnings.simplefilter("ignore", UserWarning)
        return diagnostics.measure_mir(vlm, batches, **options)


def over_sets(vlm: VLM, data: Scenes, sets: int, size: int, resamples: int = 0) -> list[Row]:
    """`measured` of `sets` sets of `size` scenes that share none."""
    shown = SceneDataset(data, build_processor())
    rows = [range(i * size, (i + 1) * size) for i in range(sets)]
    return [measured(vlm, shown, chosen, resamples=resamples) for chosen in rows]


def spread(results: list[Row]) -> Row:
    """Of the MIR of two sets or more."""
    values = [result["mir"] for result in results]
    found = torch.tensor(values, dtype=torch.float64)
    sd = float(found.std())
    return {"mean": float(found.mean()), "sd": sd, "min": min(values), "max": max(values)}


# -- data ----------------------------------------------------------------------------------------


def data_table(sets: int, size: int) -> Iterator[Row]:
    """Kinds of scenes, and kinds of text beside the same images."""
    vlm = VLM(load_base())

    def row(name: str, data: Scenes) -> Row:
        return {"data": name, **spread(over_sets(vlm, data, sets, size))}

    n = sets * size
    yield row("scenes of the base's training", scenes(n, seed=BASE_SEED))
    kinds: tuple[tuple[str, Split], ...] = (
        ("new scenes, known pairs of colour and object", "train"),
        ("new scenes, pairs never shown", "heldout"),
    )
    for name, split in kinds:
        yield row(name, scenes(n, seed=7, split=split))
    new = scenes(n, seed=7)
    yield row("the same images, captions of other images", replace(new, captions=_moved(new)))
    yield row("the same images, words drawn at random", replace(new, captions=_random_words(new)))


def _moved(data: Scenes) -> list[str]:
    """Each scene gets the next one's caption."""
    return [*data.captions[1:], data.captions[0]]


def _random_words(data: Scenes) -> list[str]:
    """As many words as each caption has, uniform over the vocabulary."""
    rng, words = np.random.default_rng(0), vocabulary()
    return [" ".join(rng.choice(words, len(c.split()))) for c in data.captions]


# -- settings ------------------------------------------------------------------------------------


def settings_table(size: int) -> Iterator[Row]:
    """MIR of the same scenes in the paper's form, and with what the released code does instead."""
    vlm, data = VLM(load_base()), SceneDataset(scenes(size, seed=7), build_processor())
    released = {"outliers": "median", "text": "after", "method": "official_fast"}
    choices = [{}, *({name: value} for name, value in released.items()), released]
    for options in choices:
        found = measured(vlm, data, range(size), **options)
        name = ", ".join(options.values()) or "the paper's"
        yield {"settings": name, "mir": found["mir"], **_numbered(found["fid"])}


def _numbered(fid: list[float]) -> Row:
    return {f"layer {k}": value for k, value in enumerate(fid, 1)}


# -- samples -------------------------------------------------------------------------------------


def samples_table(sizes: tuple[int, ...], sets: int) -> Iterator[Row]:
    """Mean and range over random sets, by the number of samples in a set.

    With as many samples as the command takes by default also what it gives as the standard error.
    """
    vlm, data = VLM(load_base()), scenes(sets * max(sizes), seed=8)
    for size in sizes:
        results = over_sets(vlm, data, sets, size, 10 if size == SAMPLES else 0)
        errors = [r["mir_standard_error"] for r in results if "mir_standard_error" in r]
        error = sum(errors) / sets if errors else None
        yield {"samples": size, **spread(results), "standard error": error}


# -- MoCa ----------------------------------------------------------------------------------------


def moca_table(seeds: int, steps: int, judged: int) -> Iterator[Row]:
    """MIR and cross-entropy before and after training on captions, with and without MoCa.

    Only what is named is trained: u and v of MoCa on the shipped base; and, as in pre-training, the
    projector from random weights, alone and together with u and v.
    """
    test = SceneDataset(scenes(judged, seed=1, split="heldout"), build_processor())
    arms = (("u and v", False, True), ("projector", True, False), ("projector, u, v", True, True))
    for name, anew, calibrated in arms:
        for seed in range(seeds):
            model: Any = load_base()
            trained = _trained(model, anew, calibrated, seed)
            row = {"trained": name, "seed": seed}
            for when in ("before", "after"):
                value = measured(VLM(model), test, range(judged))["mir"]
                row |= {f"mir {when}": value, f"ce {when}": evaluate(model, test)["ce"]}
                if when == "before":
                    _train(model, trained, seed, steps)
            yield row


def _trained(model: Any, anew: bool, calibrated: bool, seed: int) -> list[Row]:
    """Prepare `model`, and give what is to be trained with its learning rate."""
    model.requires_grad_(False)
    groups: list[Row] = []
    if anew:
        projector = model.model.multi_modal_projector
        torch.manual_seed(seed)
        for module in projector.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        groups.append({"params": list(projector.parameters()), "lr": 3e-3})
    if calibrated:
        adapter = attach(model, AdapterConfig(shift_layers=(), calibration=True))
        groups.append({"params": list(adapter.parameters()), "lr": 1e-2})
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_()
    return groups


def _train(model: Any, groups: list[Row], seed: int, steps: int) -> None:
    """Adam on the cross-entropy of captions, 16 scenes a step, one cycle of the rate."""
    data = SceneDataset(scenes(16 * steps, seed=100 + seed), build_processor())
    vlm, optimizer = VLM(model), torch.optim.Adam(groups)
    rates = [group["lr"] for group in groups]
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    for step in range(steps):
        batch = data.batch(range(16 * step, 16 * (step + 1)))
        objectives.sft(vlm, batch)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()


# -- root ----------------------------------------------------------------------------------------


def problems(d: int, scenes_shown: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and factors F, G of pairs of covariances F F^T, G G^T, float64."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, 2 * d, d, generator=generator, dtype=torch.float64)
    yield "Wishart, 2 d rows each", _factor(rows[0]), _factor(rows[1])
    i = torch.arange(1, d + 1, dtype=torch.float64)
    for k in (2, 4, 6, 8, 10):
        power = i ** (-k * math.log(10) / math.log(d))
        yield f"power law, condition 1e{k}", *pair(power, False)
        if k == 4:
            yield "the same, four massive dimensions", *pair(power, True)
    for layer, factors in enumerate(_layers(scenes_shown), 1):
        yield f"layer {layer} of the demo's base, d = 192", *factors


def _factor(rows: Tensor) -> Tensor:
    """R^T of the centred rows' QR: a factor of their covariance, without squaring them."""
    centred = rows - rows.mean(0)
    return torch.linalg.qr(centred).R.mT / math.sqrt(len(rows) - 1)


def _layers(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of image and text covariances in the scale of MIR, layer by layer."""
    vlm, shown = VLM(load_base()), SceneDataset(scenes(count, seed=9), build_processor())
    found: list[list[list[Tensor]]] = [[[], []] for _ in range(vlm.num_layers)]
    with evaluating(vlm.model):
        for i in range(0, count, 50):
            batch = shown.batch(range(i, min(i + 50, count)))
            for layer, states in zip(found, vlm.hidden_states(batch), strict=True):
                masks = (vlm.vision_mask(batch), vlm.text_mask(batch))
                for kept, mask in zip(layer, masks, strict=True):
                    kept.append(states[mask].double())
    for layer in found:
        vision, text = (torch.cat(parts) for parts in layer)
        scale = text.norm(dim=1).mean().reciprocal()
        yield _factor(scale * vision), _factor(scale * text)


def pair(values: Tensor, massive: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Square roots F, (d, d) float64, of two covariances F F^T with partly shared directions."""
    d = len(values)
    generator = torch.Generator().manual_seed(seed)

    def rotation(near: Tensor | None = None) -> Tensor:
        noise = torch.randn(d, d, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(noise).Q
        if near is not None:
            u, _, vh = torch.linalg.svd(0.7 * near + 0.3 * q)
            q = u @ vh
        return q

    first = rotation()
    factors = [first * values.sqrt(), rotation(first) * values.sqrt()]
    if massive:  # four dimensions with 30 to 1,000 times the mean variance
        where = torch.randperm(d, generator=generator)[:4]
        times = ((1e3, 3e2, 1e2, 5e1), (7e2, 5e2, 3e1, 8e1))
        for factor, sizes in zip(factors, times, strict=True):
            variance = factor.square().sum(1)
            wanted = variance.mean() * torch.tensor(sizes, dtype=torch.float64)
            factor[where] *= (wanted / variance[where]).sqrt()[:, None]
    # MIR's scale: text rows of mean norm 1, image rows twice as long.
    return 2 * factors[0] / factors[0].norm(), factors[1] / factors[1].norm()


def released_accurate(a: Tensor, b: Tensor) -> float:
    """Trace of scipy's root of the product in float32."""
    product = (a.float() @ b.float()).numpy()
    return float(np.trace(scipy.linalg.sqrtm(product)).real)


def released_fast(a: Tensor, b: Tensor) -> float:
    """Trace of what five steps of the released iteration make of the product, in float32."""
    product = a.float() @ b.float()
    y, z = product, torch.eye(len(a))
    for _ in range(5):
        y = (y + torch.linalg.inv(z) @ product) / 2
        z = (z + torch.linalg.inv(y) @ product) / 2
    return float(y.trace())


def _trace(method: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor], float]:
    return lambda a, b: float(linalg.trace_sqrtm_product(a.to(dtype), b.to(dtype), method=method))


METHODS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "eigh": _trace("eigh", torch.float64),
    "newton_schulz, float32": _trace("newton_schulz", torch.float32),
    "released accurate": released_accurate,
}
REPLACEMENTS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "released fast / T": released_fast,
    "Tr(A B) / T": lambda a, b: float((a * b.mT).sum()),
}


def root_table(d: int, scenes_shown: int) -> Iterator[Row]:
    """Relative errors of T = Tr (A B)^(1/2), and what the released fast mode has in its place.

    The truth is a sum of singular values of the product of known factors.
    """
    for name, x, y in problems(d, scenes_shown):
        truth = float(torch.linalg.svdvals(x.mT @ y).sum())
        a, b = x @ x.mT, y @ y.mT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            errors = {method: abs(run(a, b) / truth - 1) for method, run in METHODS.items()}
            ratios = {method: run(a, b) / truth for method, run in REPLACEMENTS.items()}
        yield {"covariances": name, **errors, **ratios}


# -- the command ---------------------------------------------------------------------------------


def tables(quick: bool) -> dict[str, Callable[[], Iterator[Row]]]:
    if quick:
        return {
            "data": lambda: data_table(2, 10),
            "settings": lambda: settings_table(10),
            "samples": lambda: samples_table((1, 10), 2),
            "moca": lambda: moca_table(1, 4, 16),
            "root": lambda: root_table(32, 20),
        }
    return {
        "data": lambda: data_table(SETS, SAMPLES),
        "settings": lambda: settings_table(SAMPLES),
        "samples": lambda: samples_table(SIZES, 10),
        "moca": lambda: moca_table(3, 40, 100),
        "root": lambda: root_table(WIDTH, 400),
    }


def cell(value: Any) -> str:
    if isinstance(value, float):
        small = 0 < abs(value) < 1e-3
        return f"{value:.1e}" if small else f"{value:.4f}"
    return "-" if value is None else str(value)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mir_invariance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--only", nargs="+", choices=tables(True), help="these tables")
    parser.add_argument("--quick", action="store_true", help="small sets, to see that it runs")
    options = parser.parse_args(argv)
    found: list[Row] = []
    for name, make in tables(options.quick).items():
        if options.only and name not in options.only:
            continue
        for i, row in enumerate(make()):
            if i == 0:
                print(f"\n{name}\n" + " | ".join(row))
            print(" | ".join(cell(value) for value in row.values()), flush=True)
            found.append({"table": name, **row})
    if options.json:
        write(options.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
