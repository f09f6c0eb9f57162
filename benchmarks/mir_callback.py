"""What measuring MIR every few steps costs a training, as a share of its time.

    python -m benchmarks.mir_callback [--json FILE] [--save] [--rounds N] [--quick]

One model of LLaVA's classes with random weights; a step is forward, backward and AdamW on 8
samples, by fine-tuning of every weight and of adapters in a frozen base. A measurement is that of
`MIRCallback` and of `mir_every`, of 100 samples. Rows are timed in turn; the ratio is of medians,
to a step of the same kind. What is printed last follows from them: with a measurement that takes
as long as r steps, one every n steps has the share r / (n + r) of the time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._gpu_models import Shape, build, make_batch
from benchmarks._gpu_step import Rung, trainable
from benchmarks._turns import Row, llava_shape, parser, run, time_rows
from fastalign import objectives
from fastalign._run.mir_watch import MIRWatch
from fastalign.models import VLM

EVERY, LIMIT = 500, 0.02  # the default, and the share that is to be kept
STEPS = {"every weight": "step of every weight", "adapters": "step of adapters"}

_TOWER = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 8}
SHAPES = (llava_shape("576 + 128 tokens", 24, 8, _TOWER, 512, 10, shift_hidden_dim=160),)
QUICK = (llava_shape("quick, 64 + 128 tokens", 8, 2, _TOWER, 64, 5, shift_hidden_dim=160),)


def stepper(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """A whole step of `model`'s trainable weights, which stay as they are."""
    vlm = VLM(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        loss: Tensor = objectives.sft(vlm, batch)["loss"]
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def watch_of(batch: dict[str, Any], samples: int) -> MIRWatch:
    """Over so many samples, those of `batch` again and again."""
    count = -(-samples // len(batch["input_ids"]))
    settings: dict[str, Any] = {"every": EVERY, "patience": None, "min_delta": 0.0, "seed": 0}
    settings |= {"collate": None, "batch_size": len(batch["input_ids"])}
    return MIRWatch([batch] * count, samples=samples, **settings)


def measure(shape: Shape, device: str, rounds: int) -> list[Row]:
    """All rows of one shape; float32 on the CPU, bfloat16 with float32 adapters on CUDA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = make_batch(shape, device, dtype)
    whole = build(shape, device, dtype).train()
    tuned = build(shape, device, dtype).train()
    trainable(tuned, Rung("adapters", False), shape)
    samples = 8 if shape in QUICK else 100
    runs: dict[str, Callable[[], Any]] = {}
    bases: dict[str, str] = {}
    for (kind, step), model in zip(STEPS.items(), (whole, tuned), strict=True):
        runs[step] = stepper(model, batch)
        name = f"MIR of {samples} samples, {kind}"
        runs[name] = partial(watch_of(batch, samples).measure, VLM(model), 0, 1)
        bases |= {name: step, step: step}
    rows = time_rows(
        "mir_callback", shape.name, runs, device, rounds, bases.__getitem__, peaks=False
    )
    for text in shares(rows):
        print(text, flush=True)
    return rows


def shares(rows: Sequence[Row]) -> list[str]:
    """What each measurement costs at the default, and from which interval on it costs less."""
    told = []
    for row in rows:
        if row.impl.startswith("MIR"):
            share, least = row.ratio / (EVERY + row.ratio), row.ratio * (1 / LIMIT - 1)
            told.append(
                f"{row.impl}: {share:.2%} of the time with one every {EVERY} steps; "
                f"below {LIMIT:.0%} from every {int(least) + 1} steps on"
            )
    return told


def main(argv: list[str] | None = None) -> int:
    options = parser("mir_callback", __doc__, 5).parse_args(argv)
    return run(options, SHAPES, QUICK, measure)


if __name__ == "__main__":
    raise SystemExit(main())
