"""Shapes and dtypes of each op: small and odd ones for tests, those of named models for timing."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Generator, Tensor

Inputs = tuple[Tensor | None, ...]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One shape and dtype of one op.

    Args:
        op: Name of the op.
        shape: Sizes that its inputs are made from: (t, v, d) for label_logits and
            linear_cross_entropy, (b, n, d, dt) for structure_distill, (t,) or (t, b) for
            contrast_weights, (..., n, d) for syrk, else (..., d).
        dtype: Of the activations.
        variant: "" or a way in which the inputs differ, see the functions below.
        model: The model whose shape this is; "" for a case of a test.
        quick: Small enough for a smoke run on a CPU.
        large: Too large for a CPU: gigabytes in float64, or minutes.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    variant: str = ""
    model: str = ""
    quick: bool = False
    large: bool = False

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join(part for part in (self.model, size, dtype, self.variant) if part)

    def inputs(self, device: str | torch.device = "cpu") -> Inputs:
        """The arguments of the op, the same every time."""
        made = _INPUTS[self.op](self, torch.Generator().manual_seed(0))
        return tuple(x if x is None else x.to(device) for x in made)


def cases(op: str, *, bench: bool = False, quick: bool = False) -> list[Case]:
    """Cases of `op` for tests; with `bench` those to time, of them the small ones with `quick`."""
    found = [case for case in _CASES if case.op == op and bool(case.model) == bench]
    return [case for case in found if case.quick] if quick else found


def _normal(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Tensor:
    return torch.randn(shape, generator=g).to(dtype)


def _hadamard_reweight(case: Case, g: Generator) -> Inputs:
    """h, w; the second row of h is 0. Variant "shared": w is (d,)."""
    h = _normal(case.shape, case.dtype, g)
    if not case.model:
        h.view(-1, case.shape[-1])[1:2] = 0
    w_shape = case.shape[-1:] if case.variant == "shared" else case.shape
    return h, _normal(w_shape, case.dtype, g)


def _label_logits(case: Case, g: Generator) -> Inputs:
    """hidden, weight, labels, bias; every fourth label is ignored. Variant "bias": not None."""
    t, v, d = case.shape
    labels = torch.randint(v, (t,), generator=g)
    labels[3::4] = -100
    bias = _normal((v,), case.dtype, g) if case.variant == "bias" else None
    hidden, weight = _normal((t, d), case.dtype, g), _normal((v, d), case.dtype, g)
    return hidden, weight, labels, bias


def _linear_cross_entropy(case: Case, g: Generator) -> Inputs:
    """hidden, weight, labels, token_weights, bias; logits have a standard deviation of 2.

    In a test every fourth label is ignored. Variants: "bias", not None; "ignored", all labels.
    """
    t, v, d = case.shape
    labels = torch.randint(v, (t,), generator=g)
    if not case.model:
        labels[3::4] = -100
    if case.variant == "ignored":
        labels[:] = -100
    weights = 1.0 + 4.0 * torch.rand(t, generator=g)
    bias = _normal((v,), case.dtype, g) if case.variant == "bias" else None
    hidden = _normal((t, d), case.dtype, g)
    weight = (2.0 * d**-0.5 * torch.randn((v, d), generator=g)).to(case.dtype)
    return hidden, weight, labels, weights, bias


def _calibrate(case: Case, g: Generator) -> Inputs:
    """x, vision_mask, scale, shift. Variant "float32": the dtype of scale and shift."""
    *rows, d = case.shape
    dtype = torch.float32 if case.variant == "float32" else case.dtype
    mask = torch.rand(rows, generator=g) < 0.75
    return _normal(case.shape, case.dtype, g), mask, *(_normal((d,), dtype, g) for _ in range(2))


def _contrast_weights(case: Case, g: Generator) -> Inputs:
    """delta, on both sides of the clamp, and cu_seqlens, which is None for a shape of (t,).

    Variant "packed": b samples of random lengths; in a test the second one is empty.
    """
    t, *samples = case.shape
    delta = (2 + 4 * torch.randn(t, generator=g)).to(case.dtype)
    if case.variant != "packed":
        return delta, None
    cuts = torch.randint(t + 1, (samples[0] - 1,), generator=g).sort().values
    if not case.model:
        cuts[1:2] = cuts[:1]
    ends = torch.tensor([0, t])
    return delta, torch.cat([ends[:1], cuts, ends[1:]]).to(torch.int32)


def _structure_distill(case: Case, g: Generator) -> Inputs:
    """student, teacher, cu_seqlens, which is None but for the variant "ragged".

    "ragged": b images of at most n patches, packed; in a test one has 1 patch and one has none.
    """
    b, n, d, dt = case.shape
    if case.variant != "ragged":
        return _features((b, n, d), case.dtype, g), _features((b, n, dt), case.dtype, g), None
    cycle = (1.0, 0.37, 0.71, 0.2, 0.93, 0.55)
    lengths = [int(n * cycle[i % 6]) for i in range(b)]
    if not case.model:
        lengths = [(n, 1, 0, n // 2 | 1)[i % 4] for i in range(b)]
    rows = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return _features((rows, d), case.dtype, g), _features((rows, dt), case.dtype, g), offsets


def _syrk(case: Case, g: Generator) -> Inputs:
    """x, and y, which is None but for the variant "y". Variant "square": x is symmetric, y is x."""
    *batch, n, d = case.shape
    if case.variant == "square":
        x = _symmetric(case.shape, case.dtype, g)
        return x, x.clone()
    x = _normal(case.shape, case.dtype, g)
    return x, _symmetric((*batch, d, d), case.dtype, g) if case.variant == "y" else None


def _symmetric(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Tensor:
    half = torch.randn(shape, generator=g)
    return (half + half.mT).to(dtype)


def _features(shape: tuple[int, ...], dtype: torch.dtype, g: Generator) -> Tensor:
    """Patches as of a vision model: a common mean, 16 directions, noise, and norms that differ.

    The cosine of two patches is 0.7 in the mean over wide features.
    """
    d, rank = shape[-1], 16
    mean, basis = torch.randn(d, generator=g), torch.randn(rank, d, generator=g) / rank**0.5
    latent = torch.randn(*shape[:-1], rank, generator=g)
    noise = torch.randn(shape, generator=g)
    patches = 0.7**0.5 * mean + 0.25**0.5 * latent @ basis + 0.05**0.5 * noise
    scale = torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=g))
    features: Tensor = scale * patches
    return features.to(dtype)


_INPUTS: dict[str, Callable[[Case, Generator], Inputs]] = {
    "hadamard_reweight": _hadamard_reweight,
    "label_logits": _label_logits,
    "linear_cross_entropy": _linear_cross_entropy,
    "calibrate": _calibrate,
    "contrast_weights": _contrast_weights,
    "structure_distill": _structure_distill,
    "syrk": _syrk,
}

# Empty, one element, each odd width, batched; 1025 spills over a power of two.
_ROWS = [(0, 8), (1, 1), (3, 2), (4, 3), (2, 3, 7), (5, 127), (3, 128), (2, 2, 129), (2, 1025)]
# No image, no patch, one patch (the loss is 0), widths 1 (the gradient is 0), 3, 33, 65, 127.
_PATCHES = [
    *((0, 3, 8, 8), (2, 0, 8, 3), (1, 1, 1, 1), (3, 1, 33, 65), (1, 5, 1, 3), (2, 2, 3, 1)),
    (2, 3, 3, 33),
    *((2, 7, 65, 127), (2, 17, 128, 64), (1, 33, 127, 65), (1, 65, 33, 3), (1, 70, 130, 16)),
]
_TOKENS = (0, 1, 2, 3, 127, 129, 1025)
# No matrix, no row, one entry, odd sizes on both sides of a tile of 64, batches.
_MATRICES = [
    *((0, 3, 8), (0, 5), (2, 0, 3), (1, 1), (3, 7), (7, 3), (129, 33), (33, 127), (127, 129)),
    *((2, 7, 33), (3, 2, 65, 16), (2, 130, 64)),
]
_PACKED = [(0, 4, 8, 8), (3, 9, 3, 33), (5, 35, 33, 17), (4, 35, 66, 17), (4, 66, 65, 127)]
_BF16 = torch.bfloat16
_CASES = [
    *(Case("hadamard_reweight", s, t) for s, t in product(_ROWS, DTYPES)),
    *(Case("hadamard_reweight", (2, 3, 33), t, "shared") for t in DTYPES),
    *(
        Case("label_logits", s, t)
        for s, t in product(
            [(0, 5, 8), (1, 1, 1), (4, 3, 2), (5, 9, 3), (6, 4, 7), (9, 5, 127), (4, 7, 1025)],
            DTYPES,
        )
    ),
    *(Case("label_logits", (40, 2, 129), t, "bias") for t in DTYPES),  # 15 tokens a label
    *(
        Case("linear_cross_entropy", s, t)
        for s, t in product(
            [
                *((0, 5, 8), (1, 1, 1), (4, 3, 2), (5, 9, 3), (8, 4, 7), (9, 5, 127)),
                *((4, 1025, 7), (3, 7, 1025), (2, 5000, 3)),
            ],
            DTYPES,
        )
    ),
    *(Case("linear_cross_entropy", s, t, "bias") for s, t in product([(9, 129, 33)], DTYPES)),
    *(Case("linear_cross_entropy", (3, 8, 4), t, "ignored") for t in DTYPES),
    *(Case("calibrate", s, t) for s, t in product(_ROWS, DTYPES)),
    *(Case("calibrate", (2, 9, 33), t, "float32") for t in DTYPES),
    *(Case("contrast_weights", (n,), t) for n, t in product(_TOKENS, DTYPES)),
    *(Case("contrast_weights", (n, 5), t, "packed") for n, t in product(_TOKENS, DTYPES)),
    *(Case("structure_distill", s, t) for s, t in product(_PATCHES, DTYPES)),
    *(Case("structure_distill", s, t, "ragged") for s, t in product(_PACKED, DTYPES)),
    *(Case("syrk", s, t, v) for s, t, v in product(_MATRICES, DTYPES, ("", "y"))),
    *(Case("syrk", (2, 65, 65), t, "square") for t in DTYPES),
    # Vision tokens of 8 images, then a batch of 4 samples with their text.
    Case("hadamard_reweight", (576, 1024), _BF16, model="quick", quick=True),
    Case("hadamard_reweight", (8 * 576, 4096), _BF16, model="LLaVA-1.5-7B"),
    Case("hadamard_reweight", (8 * 576, 4096), _BF16, "shared", model="LLaVA-1.5-7B"),
    Case("hadamard_reweight", (8 * 256, 3584), _BF16, model="InternVL3-8B"),
    Case("label_logits", (128, 1000, 1024), _BF16, model="quick", quick=True),
    Case("label_logits", (2048, 32064, 4096), _BF16, model="LLaVA-1.5-7B"),
    Case("label_logits", (2048, 152064, 3584), _BF16, model="Qwen2.5-VL-7B", large=True),
    # The labels of a micro-batch; ignored ones are left out before the call.
    Case("linear_cross_entropy", (128, 2000, 256), _BF16, model="quick", quick=True),
    Case("linear_cross_entropy", (512, 49280, 576), torch.float32, model="SmolVLM-256M"),
    Case("linear_cross_entropy", (512, 49280, 576), _BF16, model="SmolVLM-256M"),
    Case("linear_cross_entropy", (2048, 32064, 4096), _BF16, model="LLaVA-1.5-7B", large=True),
    Case("linear_cross_entropy", (2048, 152064, 3584), _BF16, model="Qwen2.5-VL-7B", large=True),
    Case("linear_cross_entropy", (2048, 262208, 2560), _BF16, model="Gemma3-4B", large=True),
    Case("calibrate", (2, 288, 1024), _BF16, "float32", model="quick", quick=True),
    Case("calibrate", (4, 704, 4096), _BF16, "float32", model="LLaVA-1.5-7B"),
    Case("calibrate", (2, 3072, 4096), _BF16, "float32", model="LLaVA-NeXT-7B"),
    Case("calibrate", (4, 1536, 3584), _BF16, "float32", model="Qwen2.5-VL-7B"),
    # The labels of a micro-batch, all positions of one as the released code takes them, and the
    # labels of a step of 128 samples.
    Case("contrast_weights", (1024, 8), variant="packed", model="quick", quick=True),
    Case("contrast_weights", (2048, 16), variant="packed", model="LLaVA-1.5-7B"),
    Case("contrast_weights", (2 * 3071,), model="LLaVA-NeXT-7B"),
    Case("contrast_weights", (65536, 128), variant="packed", model="Qwen2.5-VL-7B"),
    # The model's patches against those of a ViT-L; ragged: images of several resolutions.
    Case("structure_distill", (2, 128, 256, 128), _BF16, model="quick", quick=True),
    Case("structure_distill", (4, 576, 4096, 1024), _BF16, model="LLaVA-1.5-7B"),
    Case("structure_distill", (2, 2880, 4096, 1024), _BF16, model="LLaVA-NeXT-7B", large=True),
    Case("structure_distill", (6, 1280, 3584, 1024), _BF16, "ragged", model="Qwen2.5-VL-7B"),
    Case("structure_distill", (8, 256, 3584, 1024), _BF16, model="InternVL3-8B"),
    Case("structure_distill", (4, 1369, 1024, 1024), _BF16, model="DINOv2-L14-518px"),
    Case("structure_distill", (1, 4096, 384, 384), _BF16, model="ViT-S"),
    # Hidden states into a Gram matrix, and the square of a Newton-Schulz step: one, and all layers.
    Case("syrk", (512, 256), _BF16, "y", model="quick", quick=True),
    Case("syrk", (4096, 576), _BF16, model="SmolVLM-256M"),
    Case("syrk", (30, 576, 576), torch.float16, "square", model="SmolVLM-256M"),
    Case("syrk", (1369, 1024), torch.float32, model="DINOv2-L14-518px"),
    Case("syrk", (4096, 4096), _BF16, model="LLaVA-1.5-7B", large=True),
    Case("syrk", (4096, 4096), torch.float16, "square", model="LLaVA-1.5-7B", large=True),
    Case("syrk", (3584, 3584), torch.float16, "square", model="Qwen2.5-VL-7B", large=True),
]
