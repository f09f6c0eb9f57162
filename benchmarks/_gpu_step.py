"""Training steps of 7B models: what CAL and DeepAlign add to supervised fine-tuning.

Forward, backward and AdamW on random weights and tokens. Methods of one group train the same
parameters of the same model on the same batch, and are timed in turn. As much is trained as fits:
every parameter, the same with checkpointed layers, or the decoder's last two layers and head; in
DeepAlign's group its adapters. A row says which.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import device_name, quantiles
from benchmarks._gpu_models import (
    FLOPS,
    IMAGE,
    SHAPES,
    TINY_SHAPES,
    Shape,
    build,
    forward_flops,
    make_batch,
    peak_tflops,
)
from benchmarks._gpu_stage import FAILED, PASSED, Options, Unit, absent
from fastalign import losses, objectives
from fastalign.adapters import AdapterConfig, adapter_of, attach
from fastalign.models import VLM, layer_stack
from fastalign.objectives import DeepAlignState

DTYPE = torch.bfloat16
TITLES = ("ms", "p10", "p90", "tokens/s", "MFU", "peak MiB")
LAST = 2  # decoder layers that are trained where not all can be
Loss = Callable[[], Tensor]


class Rung(NamedTuple):
    """How much is trained: "all", "last" or "adapters"; with checkpointed layers or without."""

    trained: str
    checkpointed: bool


GROUPS = {
    "full": (Rung("all", False), Rung("all", True), Rung("last", False), Rung("last", True)),
    "adapters": (Rung("adapters", False), Rung("adapters", True)),
}


def units(options: Options) -> Iterator[Unit]:
    for shape in TINY_SHAPES if options.tiny else SHAPES:
        for group in GROUPS:
            yield Unit(f"{shape.name} {group}", partial(_group, shape, group, options))


def _group(shape: Shape, group: str, options: Options) -> dict[str, Any]:
    """The first rung at which every method has memory for a step."""
    if not (options.cuda or options.tiny):
        return absent("needs CUDA: 7B models are stepped on a GPU")
    tried = []
    for rung in GROUPS[group]:
        gc.collect()
        if options.cuda:
            torch.cuda.empty_cache()
        try:
            rows = measure_group(shape, group, rung, options.device)
        except torch.OutOfMemoryError:
            tried.append(f"{rung.trained}{', checkpointed' if rung.checkpointed else ''}")
            print(f"    too little memory for {tried[-1]}", flush=True)
            continue
        failed = [f"{row['method']}: {row['failed']}" for row in rows if "failed" in row]
        record = {"status": FAILED, "error": "; ".join(failed)} if failed else {"status": PASSED}
        return {**record, "too_large": tried, "flops": FLOPS, "rows": rows}
    return absent(f"too little memory: {'; '.join(tried)}")


def measure_group(shape: Shape, group: str, rung: Rung, device: str) -> list[dict[str, Any]]:
    """Rows of every method of a group.

    Raises:
        torch.OutOfMemoryError: A method's step does not fit.
    """
    torch.manual_seed(0)
    model = build(shape, device, DTYPE)
    if rung.checkpointed:
        hf: Any = model
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    parameters = trainable(model, rung, shape)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device == "cuda")
    batch = make_batch(shape, device, DTYPE)
    methods = full_methods(model, batch) if group == "full" else adapter_methods(model, batch)
    about = {
        "model": shape.name,
        "batch": shape.batch,
        "length": batch["input_ids"].shape[1],
        "image_tokens": shape.image_tokens,
        "tokens": int(batch["attention_mask"].sum()),
        "labels": int((batch["labels"] != -100).sum()),
        "optimizer": "AdamW",
        "trained": rung.trained,
        "checkpointed": rung.checkpointed,
        "trained_parameters": sum(p.numel() for p in parameters),
        "model_tflop": model_flops(model, shape, batch, rung) / 1e12,
    }
    steps, others = {}, []
    for method, loss in methods.items():
        step = partial(_step, loss, optimizer)
        try:
            step()
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            others.append({**about, "method": method, "failed": f"{type(error).__name__}: {error}"})
            optimizer.zero_grad(set_to_none=True)
            continue
        steps[method] = step
    rows = [_row(about, method, *timed, device) for method, timed in _timed(steps, device).items()]
    print_rows(rows + others)
    return rows + others


def trainable(model: nn.Module, rung: Rung, shape: Shape) -> list[nn.Parameter]:
    """Freeze what a rung does not train, and attach adapters where it trains them."""
    anything: Any = model
    if rung.trained == "adapters":
        attach(model, AdapterConfig(shape.shift_layers, shape.shift_hidden_dim))
        model.requires_grad_(False)
        adapter_of(model).float().requires_grad_(True)  # float32, as fastalign.train keeps them
    elif rung.trained == "last":
        model.requires_grad_(False)
        for layer in list(layer_stack(anything.get_decoder()))[-LAST:]:
            layer.requires_grad_(True)
        anything.get_output_embeddings().requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def full_methods(model: nn.Module, batch: dict[str, Any]) -> dict[str, Loss]:
    """Plain fine-tuning and CAL, of transformers' outputs and of fastalign's objectives."""
    vlm = VLM(model)
    return {
        "SFT, transformers": partial(hf_sft, model, batch),
        "SFT, fastalign": lambda: objectives.sft(vlm, batch)["loss"],
        "CAL, as published": partial(hf_cal, model, batch),
        "CAL, fastalign": lambda: objectives.cal(vlm, batch)["loss"],
    }


def adapter_methods(model: nn.Module, batch: dict[str, Any]) -> dict[str, Loss]:
    """Fine-tuning of DeepAlign's adapters, plainly and by its joint loss.

    Teacher features are in the batch, computed before, and the classifier is not fitted: the time
    of a step does not depend on its values.
    """
    vlm = VLM(model)
    state = DeepAlignState(vlm)
    device = batch["input_ids"].device.type
    autocast = partial(torch.autocast, device, torch.bfloat16)

    def sft() -> Tensor:
        with autocast():
            return hf_sft(model, batch)

    def deepalign() -> Tensor:
        with autocast():
            return objectives.deepalign(vlm, batch, state=state)["loss"]

    return {"SFT, transformers": sft, "DeepAlign, fastalign": deepalign}


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in ("labels", "teacher")}


def hf_sft(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """transformers' own loss, logits at every token."""
    loss: Tensor = model(**_inputs(batch), labels=batch["labels"], use_cache=False).loss
    return loss


def hf_cal(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    r"""CAL as its authors run it: a second pass of full length with the image tokens masked.

    Logits at every token of both passes; $\sum_j w_j CE_j / (\sum_j w_j + 10^{-6})$.
    """
    inputs = _inputs(batch)
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    picked = targets.clamp_min(0)[..., None]
    with torch.no_grad():
        text = batch["attention_mask"] * (batch["input_ids"] != IMAGE)
        blind = model(**{**inputs, "attention_mask": text}, use_cache=False).logits[:, :-1]
        delta = (logits.gather(2, picked) - blind.gather(2, picked)).float().flatten()
        del blind
        weights = losses.contrast_weights(delta, compat="official") * (targets != -100).flatten()
    ce = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    loss: Tensor = (weights * ce).sum() / (weights.sum() + 1e-6)
    return loss


def _step(loss: Loss, optimizer: torch.optim.Optimizer) -> None:
    loss().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _timed(
    steps: Mapping[str, Callable[[], None]], device: str, rounds: int = 10, seconds: float = 30.0
) -> dict[str, tuple[list[float], float | None]]:
    """Microseconds of every step, taken in turn after a warm-up, and the peak memory in MiB."""
    cuda = device == "cuda"
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, float | None] = dict.fromkeys(steps)
    begin = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: (times[name], peaks[name]) for name in steps}


def model_flops(model: nn.Module, shape: Shape, batch: dict[str, Any], rung: Rung) -> float:
    """FLOPs that a step of plain fine-tuning needs, see FLOPS."""
    whole = forward_flops(model, shape, batch)
    if rung.trained == "last":
        return whole + 2 * forward_flops(model, shape, batch, LAST)
    return whole * (3 if rung.trained == "all" else 2)


def _row(
    about: dict[str, Any], method: str, times: list[float], peak: float | None, device: str
) -> dict[str, Any]:
    found = quantiles(times)
    seconds = found["median_us"] / 1e6
    most = peak_tflops(device_name(device))
    rate = about["model_tflop"] / seconds
    return {
        **about,
        "method": method,
        **{name.replace("_us", "_ms"): us / 1e3 for name, us in found.items()},
        "repetitions": len(times),
        "tokens_per_s": about["tokens"] / seconds,
        "model_tflop_per_s": rate,
        "peak_tflop_per_s": most,
        "model_flops_utilisation": None if most is None else rate / most,
        "peak_mib": peak,
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line a method."""
    about = rows[0]
    print(
        f"    {about['model']}, {about['batch']} x {about['length']} tokens, trained: "
        f"{about['trained']}{', checkpointed' if about['checkpointed'] else ''}"
    )
    print(
        f"    {'method':22} {'ms':>9} {'p10':>9} {'p90':>9} {'tokens/s':>9} {'MFU':>6} {'MiB':>8}"
    )
    for row in rows:
        reason = row.get("failed")
        if reason:
            print(f"    {row['method']:22} {reason}", flush=True)
            continue
        mfu, peak = row["model_flops_utilisation"], row["peak_mib"]
        columns = [f"{row[key]:.1f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        columns += [f"{row['tokens_per_s']:.0f}", "-" if mfu is None else f"{mfu:.3f}"]
        columns.append("-" if peak is None else f"{peak:.0f}")
        print(f"    {row['method']:22}" + "".join(f"{text:>10}" for text in columns), flush=True)
