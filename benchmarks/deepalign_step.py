"""What a DeepAlign step costs beside fine-tuning of the same adapters, forward and backward.

    python -m benchmarks.deepalign_step [--json FILE] [--save] [--rounds N] [--quick]

One model of LLaVA's classes with random weights, frozen, and shift modules after encoder layers 4
and 6; tower, adapters and decoder stand to each other about as those of LLaVA-1.5-7B do in the
published setting. The teacher's features lie in the batch. Rows are timed in turn; ratios are of
medians to fine-tuning of the same adapters by `objectives.sft`. "base states" is the second pass
alone, without the adapters; "every layer" pools the states of all decoder layers for the
classifier instead of those of the first fifth; "teacher" is a vision transformer of the student
tower's size, run on the batch's images: it is no part of the other rows.

"one by one" is the batch in micro-batches of one sample, each with its own pair only; "one by one,
all pairs" begins with the pass without gradient that makes the pairs of the whole step negatives of
one another (`objectives.mutual_shares`), and its ratio is to the former.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._gpu_models import Shape, build, make_batch
from benchmarks._gpu_step import Rung, hf_sft, trainable
from benchmarks._turns import Row, llava_shape, parser, run, time_rows
from fastalign import objectives
from fastalign.adapters import disabled
from fastalign.models import VLM, evaluating
from fastalign.objectives import DeepAlignConfig, DeepAlignState
from fastalign.teachers import PatchTeacher

SFT, ALONE = "sft of the adapters", "deepalign, one by one"

_TOWER = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 8}
SHAPES = (
    llava_shape("576 + 128 tokens", 24, 4, _TOWER, 512, 10, shift_hidden_dim=160),
    llava_shape("1600 + 128 tokens", 40, 2, _TOWER, 512, 10, shift_hidden_dim=160),
)
QUICK = (llava_shape("quick, 64 + 128 tokens", 8, 2, _TOWER, 64, 5, shift_hidden_dim=160),)


def steps(model: nn.Module, batch: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """What is timed, by the name of its row."""
    vlm = VLM(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    every = tuple(range(1, vlm.num_layers + 1))
    configs = {
        "deepalign": DeepAlignConfig(),
        "deepalign w/o intervention": DeepAlignConfig(without=("intervention",)),
        "deepalign w/o distillation": DeepAlignConfig(without=("distillation",)),
        "deepalign, every layer": DeepAlignConfig(layers=every),
    }
    states = {name: DeepAlignState(vlm, config) for name, config in configs.items()}

    def step(loss: Callable[[], Tensor]) -> None:
        loss().backward()  # type: ignore[no-untyped-call]
        for parameter in parameters:
            parameter.grad = None

    def deepalign(state: DeepAlignState) -> Tensor:
        return objectives.deepalign(vlm, batch, state=state)["loss"]

    def one_by_one(together: bool) -> None:
        state = states["deepalign"]
        parts = [{k: x[i : i + 1] for k, x in batch.items()} for i in range(len(batch["labels"]))]
        totals = {name: count.float() for name, count in objectives.counts(vlm, batch).items()}
        shares = objectives.mutual_shares(vlm, parts, state=state if together else None)
        for part, mutual in zip(parts, shares, strict=True):
            terms = objectives.deepalign(vlm, part, state=state, totals=totals, mutual=mutual)
            terms["loss"].backward()  # type: ignore[no-untyped-call]
        for parameter in parameters:
            parameter.grad = None

    def base_states() -> None:
        with evaluating(model), disabled(model):
            vlm.hidden_states(batch, states["deepalign"].layers)

    def teacher() -> None:
        seen(batch)

    seen = _teacher(vlm)
    return {
        "sft transformers": partial(step, partial(hf_sft, model, batch)),
        SFT: partial(step, lambda: objectives.sft(vlm, batch)["loss"]),
        **{name: partial(step, partial(deepalign, state)) for name, state in states.items()},
        ALONE: partial(one_by_one, False),
        ALONE + ", all pairs": partial(one_by_one, True),
        "base states": base_states,
        "teacher": teacher,
    }


def _teacher(vlm: VLM) -> PatchTeacher:
    """DINOv2 of the student tower's size, with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    vision, parameter = vlm.config.vision_config, next(vlm.model.parameters())
    config = Dinov2Config(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_hidden_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
    )
    model = Dinov2Model(config).to(parameter.device, parameter.dtype)
    same = ((0.5,) * 3, (0.5,) * 3)
    return PatchTeacher(model, student=same).to(parameter.device)


def measure(shape: Shape, device: str, rounds: int) -> list[Row]:
    """All rows of one shape; float32 on the CPU, bfloat16 with float32 adapters on CUDA."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build(shape, device, dtype).train()
    trainable(model, Rung("adapters", False), shape)
    runs = steps(model, make_batch(shape, device, dtype))
    base_of = lambda name: ALONE if name.endswith("all pairs") else SFT
    return time_rows("deepalign_step", shape.name, runs, device, rounds, base_of)


def main(argv: list[str] | None = None) -> int:
    return run(parser("deepalign_step", __doc__, 15).parse_args(argv), SHAPES, QUICK, measure)


if __name__ == "__main__":
    raise SystemExit(main())
