"""Packed attention: every back end that is installed against float64, and its time.

One unit a back end and dtype. Each case is computed forward and backward; the error of the output
and of each gradient is relative, of norms, to dense attention in float64, segment by segment. Times
are of forward and backward, taken in turn with `sdpa`, the back end that runs everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu_stage import FAILED, PASSED, Options, Unit, absent
from benchmarks._turns import Row, time_rows
from fastalign.models._packed import BACKENDS, LIBRARIES, Segments, obstacle, packed_attention
from fastalign.models._packed_backends import Call

BASE = "sdpa"
# The largest relative errors, as multiples of the dtype's eps, with which a back end passes. Both
# factors of the second product are rounded, and the gradient goes through four products.
BOUNDS = {"output": 1.0, "gradient": 2.0}
# Compiled products of float32 may run in TF32, which has 10 bits.
EPS = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-10}


@dataclass(frozen=True)
class Case:
    """A packed row.

    Args:
        name: Of the case.
        heads, key_heads, dim, width: Of the tensors.
        image: Tokens that are missing after each prompt; 0 for positions without gaps.
        window, softcap: Of the attention.
    """

    name: str
    heads: int
    key_heads: int
    dim: int
    width: int
    image: int = 576
    window: int | None = None
    softcap: float | None = None

    def small(self) -> "Case":
        """The same on a few heads and tokens."""
        window = self.window and 4
        heads = self.heads // self.key_heads
        return replace(self, heads=heads, key_heads=1, image=self.image // 64, window=window)

    def segments(self, options: Options) -> Segments:
        """Samples of different lengths, in each of which an image was dropped."""
        lengths = (9, 14, 6) if options.tiny else (99, 243, 180, 512, 131, 207, 330, 64)
        prompt = 5 if options.tiny else 35
        columns = torch.arange(max(lengths) + self.image)
        keep = columns < torch.tensor(lengths)[:, None] + self.image
        keep &= (columns < prompt) | (columns >= prompt + self.image)
        return Segments.from_mask(keep.to(options.device))

    def inputs(self, total: int, options: Options, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator(options.device).manual_seed(0)
        shapes = (self.heads, self.dim), (self.key_heads, self.dim), (self.key_heads, self.width)
        return [
            torch.randn(1, total, h, d, device=options.device, generator=generator)
            .to(dtype)
            .transpose(1, 2)
            for h, d in shapes
        ]


CASES = (
    Case("LLaVA-1.5-7B", 32, 32, 128, 128),
    Case("Qwen2-VL-7B, grouped heads", 28, 4, 128, 128),
    Case("heads of 80 channels", 16, 16, 80, 80),
    Case("values narrower than keys", 16, 16, 192, 128),
    Case("heads of 256 channels", 8, 4, 256, 256),
    Case("window without gaps", 32, 8, 128, 128, image=0, window=128),
    Case("window over gaps", 32, 8, 128, 128, window=128),
    Case("softcap", 8, 4, 128, 128, softcap=50.0),
)


def units(options: Options) -> Iterator[Unit]:
    """float32 comes last: it is not what models run in."""
    for dtype in [torch.bfloat16] if options.tiny else EPS:
        for backend in BACKENDS[1:]:
            name = f"{backend} {str(dtype).removeprefix('torch.')}"
            yield Unit(name, partial(_unit, backend, dtype, options))


def _unit(backend: str, dtype: torch.dtype, options: Options) -> dict[str, Any]:
    why = obstacle(backend, torch.device(options.device), dtype, head_dim=8)
    if backend == "flex" and not options.cuda:
        why = "has no gradient on the CPU"
    if why:
        return absent(why)
    cases = [case.small() for case in CASES] if options.tiny else CASES
    rows = [_case(backend, case, dtype, options) for case in cases]
    for row in rows:
        print(describe(row), flush=True)
    wrong = [row["case"] for row in rows if not row.get("passed", True)]
    status = FAILED if wrong else PASSED
    error = {"error": f"too far from float64: {', '.join(wrong)}"} if wrong else {}
    return {"status": status, **error, "version": _version(backend), "rows": rows}


def _case(backend: str, case: Case, dtype: torch.dtype, options: Options) -> dict[str, Any]:
    """Errors and times of one back end on one case, or why it does not run it."""
    segments = case.segments(options)
    windowed = case.window is not None and case.window < segments.span
    request: dict[str, Any] = {
        "head_dim": max(case.dim, case.width),
        "windowed": windowed,
        "gaps": windowed and not segments.counts_tokens(case.window or 0),
        "softcap": case.softcap is not None,
    }
    why = obstacle(backend, torch.device(options.device), dtype, **request)
    if why:
        return {"case": case.name, "refused": why}
    made = case.inputs(len(segments.rows), options, dtype)
    errors = _errors(backend, case, segments, made)
    bounds = [BOUNDS["output" if name == "output" else "gradient"] * EPS[dtype] for name in errors]
    passed = all(error <= bound for error, bound in zip(errors.values(), bounds, strict=True))
    times = _times(backend, case, segments, made, options)
    found = {row.impl: row.median_us for row in times}
    return {
        "case": case.name,
        "tokens": len(segments.rows),
        "errors": errors,
        "passed": passed,
        "median_us": found[backend],
        f"times_{BASE}": found[backend] / found[BASE],
        "rounds": 3 if options.tiny else 20,
    }


def _errors(backend: str, case: Case, segments: Segments, made: list[Tensor]) -> dict[str, float]:
    """Relative errors of the output and of the three gradients."""
    leaves = [x.detach().requires_grad_() for x in made]
    out = packed_attention(
        *_three(leaves), segments, window=case.window, softcap=case.softcap, backend=backend
    )
    generator = torch.Generator(out.device).manual_seed(1)
    cotangent = torch.randn(out.shape, device=out.device, generator=generator).to(out.dtype)
    found = [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
    true = reference(made, segments, case, cotangent)
    names = ("output", "query", "key", "value")
    return {
        name: float((got.double() - exact).norm() / exact.norm())
        for name, got, exact in zip(names, found, true, strict=True)
    }


def reference(
    made: list[Tensor], segments: Segments, case: Case, cotangent: Tensor
) -> list[Tensor]:
    """Output and gradients in float64: all scores of each segment, by positions."""
    leaves = [x.detach().double().requires_grad_() for x in made]
    call = Call(*_three(leaves), segments, case.dim**-0.5, case.window, case.softcap).ungrouped()
    lengths = list(segments.lengths)
    parts = zip(
        *(torch.split(x, lengths, 2) for x in (call.query, call.key, call.value)),
        torch.split(segments.positions, lengths),
        strict=True,
    )
    outputs = []
    for q, k, v, positions in parts:
        ahead = positions[:, None] - positions[None]
        seen = ahead >= 0
        if case.window is not None:
            seen &= ahead < case.window
        scores = q @ k.mT * call.scale
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    out = torch.cat(outputs, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.double())]


def _times(
    backend: str, case: Case, segments: Segments, made: list[Tensor], options: Options
) -> list[Row]:
    leaves = [x.detach().requires_grad_() for x in made]
    cotangent = torch.randn_like(made[2][:, :1].expand(1, case.heads, -1, -1))

    def step(name: str) -> None:
        out = packed_attention(
            *_three(leaves), segments, window=case.window, softcap=case.softcap, backend=name
        )
        torch.autograd.grad(out, leaves, cotangent)

    runs = {name: partial(step, name) for name in dict.fromkeys((BASE, backend))}
    rounds = 3 if options.tiny else 20
    return time_rows(
        *("packed_attention", case.name, runs, options.device, rounds),
        base_of=lambda name: BASE,
        peaks=False,
    )


def _three(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = tensors
    return query, key, value


def _version(backend: str) -> str:
    library = LIBRARIES.get(backend)
    return version((library and library.package) or "torch")


def describe(row: dict[str, Any]) -> str:
    """One line about a case."""
    if "refused" in row:
        return f"    {row['case']}: {row['refused']}"
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    ratio = row[f"times_{BASE}"]
    return f"    {row['case']}: {row['median_us']:.0f} us, {ratio:.2f} x {BASE}; errors: {errors}"
