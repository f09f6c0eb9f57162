"""What a CAL step costs beside plain fine-tuning, forward and backward of the whole model.

    python -m benchmarks.cal_step [--json FILE] [--save] [--rounds N] [--quick]

One model of LLaVA's classes with random weights and every parameter trained, at LLaVA-1.5's and
LLaVA-NeXT's numbers of image tokens. Rows are timed in turn: transformers' own loss, CAL as its
authors run it, and fastalign's; "branch" is the image-free forward alone. The ratios are of
medians, to transformers' step and, for the branch, to fastalign's fine-tuning step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._gpu_models import Shape, build, make_batch
from benchmarks._gpu_step import hf_cal, hf_sft
from benchmarks._turns import Row, llava_shape, parser, run, time_rows
from fastalign import objectives
from fastalign.models import VLM

SFT, BRANCH = "sft transformers", "branch"
FUSED = "sft fastalign"
Loss = Callable[[], Tensor]


_TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPES = (
    llava_shape("576 + 128 tokens", 24, 2, _TOWER, 512, 6),
    llava_shape("1600 + 128 tokens", 40, 1, _TOWER, 512, 6),
)
QUICK = (llava_shape("quick, 64 + 128 tokens", 8, 2, _TOWER, 64, 2),)


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
    runs = steps(model, make_batch(shape, device, dtype))
    base_of = {BRANCH: FUSED}
    return time_rows(
        "cal_step", shape.name, runs, device, rounds, lambda name: base_of.get(name, SFT)
    )


def main(argv: list[str] | None = None) -> int:
    return run(parser("cal_step", __doc__, 15).parse_args(argv), SHAPES, QUICK, measure)


if __name__ == "__main__":
    raise SystemExit(main())
