"""What a CAL step costs beside plain fine-tuning, forward and backward of the whole model.

    python -m benchmarks.cal_step [--json FILE] [--save] [--rounds N] [--quick]

One model of LLaVA's classes with random weights and every parameter trained, at LLaVA-1.5's and
LLaVA-NeXT's numbers of image tokens. Rows are timed in turn: transformers' own loss, CAL as its
authors run it, and fastalign's; "branch" is the image-free forward alone. The ratios are of
medians, to transformers' step and, for the branch, to fastalign's fine-tuning step.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _interleaved_us, _peak_mib, device_name, quantiles, results_file
from benchmarks.__main__ import merged, write
from benchmarks._gpu_models import Shape, build, make_batch
from benchmarks._gpu_step import hf_cal, hf_sft
from fastalign import objectives
from fastalign.models import VLM

SFT, BRANCH = "sft transformers", "branch"
FUSED = "sft fastalign"
Loss = Callable[[], Tensor]


def _shape(name: str, side: int, batch: int, width: int = 512, layers: int = 6) -> Shape:
    """`side` squared image tokens and 128 of text, 80 of them labels, behind a small tower."""
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 14 * side, "patch_size": 14}
    text = {"vocab_size": 1000, "hidden_size": width, "intermediate_size": 1376 * width // 512}
    text |= {"num_hidden_layers": layers, "num_attention_heads": 8}
    text |= {"max_position_embeddings": 4096}
    return Shape(
        *(name, {**vision, "projection_dim": 64}, text),
        tiles=False,
        batch=batch,
        prompt=35,
        question=(13, 13),
        answer=(80, 80),
    )


SHAPES = (_shape("576 + 128 tokens", 24, 2), _shape("1600 + 128 tokens", 40, 1))
QUICK = (_shape("quick, 64 + 128 tokens", 8, 2, width=64, layers=2),)


@dataclass(frozen=True)
class Row:
    """One way to make a step at one shape.

    Attributes:
        op, case, impl, device: As in the rows of `python -m benchmarks`.
        ratio: Of its median to that of transformers' fine-tuning; of the branch, to fastalign's.
        peak_mib: Most memory that a step holds beyond what it starts with.
    """

    op: str
    case: str
    impl: str
    device: str
    median_us: float
    p10_us: float
    p90_us: float
    ratio: float
    peak_mib: float


def steps(model: nn.Module, batch: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """What is timed, by the name of its row."""
    vlm = VLM(model)
    with torch.no_grad():
        out, _ = vlm.forward_with_contrast(batch)

    def step(loss: Loss) -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return {
        SFT: partial(step, partial(hf_sft, model, batch)),
        FUSED: partial(step, lambda: objectives.sft(vlm, batch)["loss"]),
        "cal as published": partial(step, partial(hf_cal, model, batch)),
        "cal fastalign": partial(step, lambda: objectives.cal(vlm, batch)["loss"]),
        BRANCH: lambda: vlm.contrast_from(batch, out),
    }


def measure(shape: Shape, device: str, rounds: int) -> list[Row]:
    """All rows of one shape; float32 on the CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(shape, device, dtype).train()
    batch = make_batch(shape, device, dtype)
    runs = steps(model, batch)
    peaks = {name: _peak_mib(run, device) for name, run in runs.items()}
    times = _interleaved_us(runs, device, rounds=rounds, seconds=float("inf"))
    found = {name: quantiles(us) for name, us in times.items()}
    rows = []
    for name, us in found.items():
        base = found[FUSED if name == BRANCH else SFT]["median_us"]
        about = ("cal_step", shape.name, name, device_name(device))
        rows.append(Row(*about, **us, ratio=us["median_us"] / base, peak_mib=peaks[name]))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cal_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--save", action="store_true", help="keep them in benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each row")
    parser.add_argument("--quick", action="store_true", help="one small shape, three rounds")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for shape in QUICK if options.quick else SHAPES:
        new = measure(shape, device, 3 if options.quick else options.rounds)
        print(f"\n{shape.name}, batch {shape.batch}, on {new[0].device}")
        print(f"{'':20} {'median ms':>10} {'p10':>8} {'p90':>8} {'ratio':>7} {'peak MiB':>9}")
        for row in new:
            ms = (1e-3 * us for us in (row.median_us, row.p10_us, row.p90_us))
            columns = "{:10.1f} {:8.1f} {:8.1f}".format(*ms)
            print(f"{row.impl:20} {columns} {row.ratio:7.3f} {row.peak_mib:9.1f}", flush=True)
        rows += [asdict(row) for row in new]
        if options.json:
            write(options.json, rows)
    if options.save:
        write(results_file(device), merged(results_file(device), rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
