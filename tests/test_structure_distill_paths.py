"""Structure distillation as it is computed: kernels and panels against the reference in float64."""

import pytest
import torch
from _paths import compiled
from fastalign_kernels import native
from fastalign_kernels import structure_distill as kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastalign.ops.structure_distill as op
from fastalign import losses
from fastalign.ops import _structure_portable as portable
from fastalign.ops.structure_distill import (
    StructureDistill,
    StructureDistillNative,
    StructureDistillPortable,
    compute,
)
from fastalign.reference import structure_distill as reference
from fastalign.testing import assert_as_accurate, cases
from fastalign.testing.cases import DTYPES

needs_products = pytest.mark.skipif(
    native.OBSTACLE is None and not native.MULTIPLIES_BFLOAT16,
    reason="this processor has no products of bfloat16 matrices",
)
FUNCTIONS = [
    pytest.param(StructureDistill, id="kernels"),
    pytest.param(StructureDistillPortable, id="portable"),
    pytest.param(StructureDistillNative, id="native", marks=[compiled(), needs_products]),
]
any_shape = pytest.mark.parametrize("function", FUNCTIONS[:2])
every_path = pytest.mark.parametrize("function", FUNCTIONS)
compiled_path = pytest.mark.parametrize("function", FUNCTIONS[2:])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def patches(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + 0.3).to(dtype)


def value_and_grad(fn, student: Tensor, teacher: Tensor, *rest, **options):
    leaf = student.detach().clone().requires_grad_()
    value = fn(leaf, teacher, *rest, **options)
    (grad,) = torch.autograd.grad(
        value, leaf, torch.linspace(0.5, 1.5, value.numel()).to(value).view_as(value)
    )
    return value.detach(), grad


def check(function, student: Tensor, teacher: Tensor, cu_seqlens=None, **options):
    """As accurate as the reference at the same type; every image by itself, and with its factor."""
    options = {"reduction": "none", **options}
    if function is StructureDistillNative:  # whose instruction takes no other
        student, teacher = student.bfloat16(), teacher.bfloat16()
    found = value_and_grad(
        lambda h, g: compute(function, h, g, cu_seqlens, **options), student, teacher
    )
    options.pop("max_seqlen", None)
    eager = value_and_grad(reference, student, teacher, cu_seqlens, **options)
    exact = value_and_grad(reference, student.double(), teacher.double(), cu_seqlens, **options)
    # A similarity near 1 is known to a unit of float32, and so is the difference of two of them.
    eps = torch.finfo(torch.float32).eps
    largest = float(exact[0].amax()) if exact[0].numel() else 1.0
    noise = 4 * eps / min(max(largest, 1e-6), 1.0) ** 0.5
    for x, plain, true in zip(found, eager, exact, strict=True):
        # A loss or a gradient that is 0 but for rounding has no relative error.
        if true.numel() and true.abs().max() < 1e-12:
            assert x.shape == true.shape and x.abs().max() < 1e-6
        else:
            # The gradient's other factor, R', is rounded to its type as well.
            rounding = torch.finfo(x.dtype).eps / 2 if x.dtype == student.dtype else 0.0
            assert_as_accurate(x, plain, true, noise=noise + rounding)


@any_shape
@pytest.mark.parametrize("case", cases("structure_distill"), ids=str)
def test_cases(case, function, device):
    check(function, *case.inputs(device))


@compiled_path
@pytest.mark.parametrize("case", cases("structure_distill"), ids=str)
def test_compiled_cases(case, function):
    student, teacher, cu_seqlens = case.inputs("cpu")
    longest = max([0, *cu_seqlens.diff().tolist()]) if cu_seqlens is not None else case.shape[1]
    if case.dtype != torch.bfloat16 or longest > case.shape[2]:
        # Not for it: the public function takes the portable path.
        assert not native.takes_structure(student, teacher, longest)
        loss = losses.structure_distill(student, teacher, cu_seqlens=cu_seqlens)
        assert torch.equal(loss, compute(StructureDistillPortable, student, teacher, cu_seqlens))
        return
    assert native.takes_structure(student, teacher, longest)
    check(function, student, teacher, cu_seqlens)
    loss = losses.structure_distill(student, teacher, cu_seqlens=cu_seqlens)
    assert torch.equal(loss, compute(function, student, teacher, cu_seqlens))


@compiled_path
@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("n", [63, 64, 70, 129])
def test_compiled_options(function, negatives, similarity, n):
    """Rows and columns at the borders of tiles of 64, of odd widths too."""
    student, teacher = patches(2, n, 131), patches(2, n, 41, seed=1)
    student[1, 2] = 0
    teacher[0, n - 1] = 0
    check(function, student, teacher, negatives=negatives, similarity=similarity)
    offsets = torch.tensor([0, 3, 3, n, 2 * n], dtype=torch.int64)
    rows = student.flatten(0, 1), teacher.flatten(0, 1)
    check(function, *rows, offsets, negatives=negatives, similarity=similarity, max_seqlen=130)


@any_shape
@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
# R' is kept, or the gradient.
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 96), (torch.float32, 24)])
def test_options(function, dtype, negatives, similarity, width, device):
    student, teacher = patches(2, 70, width, dtype=dtype), patches(2, 70, 40, seed=1, dtype=dtype)
    options = {"negatives": negatives, "similarity": similarity}
    check(function, student.to(device), teacher.to(device), **options)


@any_shape
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_clipped_similarity_of_zero_has_a_derivative(function, similarity, device):
    """R = I - 1 1^T, so the loss is 2 / 4 and the gradient 2 (2 R / 4) H = R."""
    student, teacher = torch.eye(2, device=device)[None], torch.ones(1, 2, 1, device=device)
    options = {"negatives": "clip", "similarity": similarity}
    for loss in (
        lambda h: compute(function, h, teacher, **options).sum(),
        lambda h: reference(h, teacher, **options),
    ):
        leaf = student.clone().requires_grad_()
        value = loss(leaf)
        assert float(value.detach()) == 0.5
        assert torch.equal(*torch.autograd.grad(value, leaf), student - 1)


@any_shape
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_levels_and_reductions(function, reduction, level, device):
    student, teacher = patches(3, 10, 5).to(device), patches(3, 10, 4, seed=1).to(device)
    check(function, student, teacher, level=level, reduction=reduction)
    offsets = torch.tensor([0, 4, 4, 5, 30], dtype=torch.int32)
    rows = student.flatten(0, 1), teacher.flatten(0, 1)
    check(function, *rows, offsets, level=level, reduction=reduction)


# -- how the work is cut ---------------------------------------------------------------------------


@pytest.fixture(params=[1, 150_000], ids=["one tile a panel", "a few tiles a panel"])
def small_panels(request, monkeypatch):
    monkeypatch.setattr(kernels, "PANEL_BYTES", request.param)
    monkeypatch.setattr(portable, "PANEL", 48)
    monkeypatch.setattr(portable, "BAND", 48)


@any_shape
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 150), (torch.bfloat16, 40)])
def test_panels(function, dtype, width, small_panels, device):
    """Tiles beside and below the panel, and images that start or end inside one."""
    student, teacher = patches(3, 140, width, dtype=dtype), patches(3, 140, 24, seed=1, dtype=dtype)
    student[1, 2] = 0
    check(function, student.to(device), teacher.to(device), negatives="clip")


@any_shape
@pytest.mark.parametrize("width", [150, 40])
@pytest.mark.parametrize("known", [True, False])
def test_ragged_panels(function, width, known, small_panels, monkeypatch, device):
    """Also where the host cannot see how long an image is, as with offsets on a GPU."""
    if not known:
        monkeypatch.setattr(op, "_longest", lambda cu_seqlens, max_seqlen, rows: rows)
    lengths = torch.tensor([40, 1, 0, 130, 29, 0, 64, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device)
    student, teacher = patches(264, width).to(device), patches(264, 24, seed=1).to(device)
    check(function, student, teacher, offsets.int(), negatives="clip_teacher")
    check(function, student[:41], teacher[:41], offsets[:3])


def test_tiles_of_128(monkeypatch, device):
    monkeypatch.setattr(kernels, "_block", lambda *_: 128)
    student, teacher = patches(2, 150, 160).to(device), patches(2, 150, 33, seed=1).to(device)
    check(StructureDistill, student, teacher)
    check(StructureDistill, student[..., :40], teacher)


def test_large_work_gets_large_tiles():
    # 4 x 576: five tiles of 128, 15 on and above the diagonal, 60 in all. 40 images have 600.
    assert kernels._block(4, 576, 2, True) == 64 and kernels._block(40, 576, 2, True) == 128
    assert kernels._block(1, 4096, 2, True) == 128
    assert kernels._block(40, 576, 4, True) == 64 and kernels._block(40, 576, 2, False) == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU decides")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [104, 40])
def test_descriptors(monkeypatch, dtype, width):
    """The path of sm_90: rows beyond an image are those of the next, or zeros after the last."""
    monkeypatch.setattr(kernels, "_use_descriptors", lambda *_: True)
    student, teacher = patches(2, 70, width, dtype=dtype), patches(2, 70, 48, seed=1, dtype=dtype)
    check(StructureDistill, student, teacher)
    offsets = torch.tensor([0, 70, 71, 140], dtype=torch.int32)
    check(StructureDistill, student.flatten(0, 1), teacher.flatten(0, 1), offsets)


@every_path
def test_nothing_is_kept_without_gradient(function, device):
    student, teacher = patches(2, 70, 96).to(device), patches(2, 70, 40, seed=1).to(device)
    student, teacher = student.bfloat16(), teacher.bfloat16()
    expected = reference(student, teacher)
    torch.testing.assert_close(compute(function, student, teacher), expected)
    with torch.no_grad():
        found = compute(function, student.requires_grad_(), teacher)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_no_matrix_of_patches_on_the_cpu():
    """With n = 1024 beside widths of 24 and 16, the largest tensor is a panel or the gradient."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    student, teacher = patches(1024, 24), patches(1024, 16, seed=1)
    for negatives in ("keep", "clip"):
        arguments = (student, teacher, None, 1, 1024, True, negatives, portable.GRADIENT)
        largest = 0
        with Watch():
            portable.structure_distill_fwd._init_fn(*arguments)
        assert 0 < largest <= (1024 * 64 if negatives == "keep" else portable.PANEL * 1024)


# -- numbers ---------------------------------------------------------------------------------------


def near(loss: float, n: int, d: int) -> tuple[Tensor, Tensor]:
    """A student that differs from its teacher by a rotation and as much noise as gives `loss`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = normal(n, 16) @ normal(16, d) + 4.0 * normal(d) + 0.3 * normal(n, d)
    rotation = torch.linalg.qr(normal(d, d)).Q
    noise = normal(n, d) * torch.linalg.vector_norm(teacher, dim=1, keepdim=True) / d**0.5
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        student = teacher @ rotation + middle * noise
        found = reference(student[None], teacher[None]).item()
        low, high = (middle, high) if found < loss else (low, middle)
    assert found == pytest.approx(loss, rel=1e-3)
    return student, teacher


# Twice what was measured for 4 x 576 patches of widths 4096 and 1024, mean cosine 0.77.
@pytest.mark.parametrize(
    ("loss", "kernel_bound", "portable_bound"),
    [(1e-2, 2.2e-4, 1e-6), (1e-4, 2.2e-4, 1.2e-5), (1e-6, 3.4e-4, 1.8e-4)],
)
def test_gradient_of_features_that_are_near(loss, kernel_bound, portable_bound, device):
    student, teacher = (x.bfloat16() for x in near(loss, 576, 128))
    leaf = student.double().requires_grad_()
    exact = reference(leaf[None], teacher.double()[None])
    (expected,) = torch.autograd.grad(exact, leaf)
    errors = {}
    for module in (kernels, portable):
        # The gradient before it is rounded to the type of `student`.
        value, gradient, _, factor = module.structure_distill_fwd(
            student.to(device), teacher.to(device), None, 1, 576, True, "keep", module.GRADIENT
        )
        error = (gradient.cpu() * factor.cpu() - expected).norm() / expected.norm()
        errors[module] = float(error)
        assert value.item() == pytest.approx(exact.item(), rel=2e-5)
    assert errors[kernels] <= kernel_bound and errors[portable] <= portable_bound


@every_dtype
def test_gradient_is_orthogonal_to_the_patches(dtype, device):
    """The radial part comes from the R' that was rounded, so that it is taken out exactly."""
    student, teacher = patches(1, 130, 140, dtype=dtype), patches(1, 130, 40, seed=1, dtype=dtype)
    arguments = (student[0].to(device), teacher[0].to(device), None, 1, 130, True, "keep")
    _, gradient, _, _ = kernels.structure_distill_fwd(*arguments, kernels.GRADIENT)
    gradient, rows = gradient.double().cpu(), student[0].double()
    cosine = (gradient * rows).sum(1) / gradient.norm(dim=1) / rows.norm(dim=1)
    assert cosine.abs().max() < 1e-6


@any_shape
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("scale", [2e-3, 1.0, 500.0])
@pytest.mark.parametrize("width", [96, 24])
def test_float16_does_not_leave_its_range(function, similarity, scale, width, device):
    """R' is R over two norms: without the power of two it would be 4e-6 R, or overflow."""
    factor, power = (scale, 2.0**12) if similarity == "cosine" else (min(scale, 4.0), 1.0)
    student = (factor * patches(1, 70, width)).half()
    teacher = patches(1, 70, 40, seed=1).half()

    def scaled(fn, **options):
        # As a mixed-precision trainer scales the loss: a gradient alone may be near 1e-7.
        return lambda h, g: power * fn(h, g, similarity=similarity, **options)

    fused = scaled(lambda h, g, **options: compute(function, h, g, **options))
    found = value_and_grad(fused, student.to(device), teacher.to(device))
    exact = value_and_grad(scaled(reference), student.double(), teacher.double())
    for x, true in zip(found, exact, strict=True):
        bound = 6e-8 + 2e-3 * float(true.abs().max())
        torch.testing.assert_close(x.double().cpu(), true, rtol=4e-3, atol=bound)


@pytest.mark.parametrize("norm", [1e-20, 1e-17, 1e17])
def test_extreme_rows(norm, device):
    """Kernels square in float32: rows below 1e-18 are zero, the others are as any."""
    student, teacher = patches(1, 5, 8), patches(1, 5, 4, seed=1)
    far = student.clone()
    far[0, 2] *= norm / far[0, 2].norm()
    expected = student.clone()
    if norm < 1e-18:
        expected[0, 2] = 0
    found = compute(StructureDistill, far.to(device), teacher.to(device))
    torch.testing.assert_close(found.cpu(), reference(expected, teacher))


@compiled_path
@pytest.mark.parametrize("width", [96, 97])
@pytest.mark.parametrize("scale", [1e-39, 1e-36, 1e-25, 1e-20, 1e-16, 1e16, 1e20, 1e30, 1e36])
def test_rows_of_any_norm(function, scale, width):
    """Squares leave float32, and numbers below 1e-38 are 0 to the instruction."""
    student, teacher = patches(2, 70, width), patches(2, 70, 40, seed=1)
    student[0, 3] *= scale
    student[1] *= scale
    student[1, 5] = 0
    teacher[1, 7:9] *= scale
    student, teacher = student.bfloat16(), teacher.bfloat16()
    found, expected = (
        value_and_grad(lambda h, g, f=f: compute(f, h, g, reduction="none"), student, teacher)
        for f in (function, StructureDistillPortable)
    )
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1].isinf(), expected[1].isinf())  # 1 / |h| is beyond the type
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    rows = expected[1].float().nan_to_num(0.0, 0.0, 0.0)
    bound = rows.abs().amax(-1, keepdim=True) * torch.finfo(torch.bfloat16).eps
    assert ((found[1].float().nan_to_num(0.0, 0.0, 0.0) - rows).abs() <= bound).all()


@compiled_path
def test_rows_may_start_anywhere(function):
    """Numbers of 16 bits are read in pairs."""
    student, teacher = patches(1, 70, 96).bfloat16(), patches(1, 70, 40, seed=1).bfloat16()
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (student, teacher)]
    assert all(x.data_ptr() % 4 == 2 and x.is_contiguous() for x in shifted)
    found, expected = (
        value_and_grad(lambda h, g: compute(function, h, g), *rows)
        for rows in (shifted, (student, teacher))
    )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@compiled_path
def test_dot_products_are_those_of_float32(function):
    student, teacher = patches(2, 70, 96), patches(2, 70, 40, seed=1)
    for h, g in ((1e-12, 1e-12), (1e7, 1e7), (1e-3, 1e5)):
        check(function, h * student, g * teacher, similarity="dot")
    # Products beyond float32 are infinite, and so is the loss.
    far = (1e25 * student).bfloat16(), teacher.bfloat16()
    for f in (function, StructureDistillPortable):
        assert not compute(f, *far, similarity="dot").isfinite()


@compiled_path
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_infinite_rows_give_nan(function, bad):
    student, teacher = patches(3, 70, 96).bfloat16(), patches(3, 70, 40, seed=1).bfloat16()
    student[1, 7, 3], teacher[2, 69, 0] = bad, bad
    for f in (function, StructureDistillPortable):
        value, grad = value_and_grad(
            lambda h, g, f=f: compute(f, h, g, reduction="none"), student, teacher
        )
        assert value.isnan().tolist() == [False, True, True]
        assert grad[0].isfinite().all() and grad[1].isnan().all() and grad[2].isnan().any()


@compiled_path
def test_threads_change_no_bit(function):
    student, teacher = patches(3, 200, 333).bfloat16(), patches(3, 200, 77, seed=1).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                value_and_grad(
                    lambda h, g: compute(function, h, g, reduction="none"), student, teacher
                )
            )
    finally:
        torch.set_num_threads(before)
    for value, grad in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(grad, found[0][1])


@compiled_path
def test_offsets_are_checked(function):
    """Also where no one read them before, as in a compiled graph: they are used as addresses."""
    rows = patches(6, 8).bfloat16()
    for offsets, longest, message in (
        ([0, 2, 6], 3, "max_seqlen must be at least 4: got 3"),
        ([0, 4, 2, 6], 6, "cu_seqlens must rise from 0 to 6"),
        ([0, 2, 7], 6, "cu_seqlens must rise from 0 to 6"),
        ([1, 6], 6, "cu_seqlens must rise from 0 to 6"),
    ):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        arguments = (rows, rows, cu_seqlens, len(offsets) - 1, longest, True, "keep", 1)
        with pytest.raises(RuntimeError, match=message):
            native.structure_distill_fwd(*arguments)


@any_shape
def test_types_may_differ(function, device):
    for h, g in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16)):
        student, teacher = patches(2, 70, 96, dtype=h), patches(2, 70, 33, seed=1, dtype=g)
        check(function, student.to(device), teacher.to(device))


@every_path
def test_nan_stays_in_its_image(function, device):
    student, teacher = patches(3, 70, 24), patches(3, 70, 8, seed=1)
    if function is StructureDistillNative:
        student, teacher = patches(3, 70, 72).bfloat16(), teacher.bfloat16()
    student[1, 7, 3] = torch.nan
    teacher[2, 69, 0] = torch.nan
    for options in ({}, {"negatives": "clip"}, {"negatives": "clip_teacher", "similarity": "dot"}):
        value, grad = value_and_grad(
            lambda h, g, options=options: compute(function, h, g, reduction="none", **options),
            student.to(device), teacher.to(device),
        )  # fmt: skip
        assert value.isnan().tolist() == [False, True, True]
        assert grad[0].isfinite().all() and grad[1].isnan().any() and grad[2].isnan().any()


@every_path
def test_strided_inputs(function, device):
    student = patches(72, 2, 70).to(device).transpose(0, 1).transpose(1, 2)
    teacher = patches(1, 70, 16, seed=1).to(device).expand(2, 70, 16)
    check(function, student, teacher)


# -- arguments -------------------------------------------------------------------------------------


def test_longest_image():
    student, teacher = patches(6, 4), patches(6, 3, seed=1)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    expected = losses.structure_distill(student, teacher, cu_seqlens=offsets)
    for bound in (4, 5, 100):
        found = losses.structure_distill(student, teacher, cu_seqlens=offsets, max_seqlen=bound)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="max_seqlen must be at least 4, .*: got 3"):
        losses.structure_distill(student, teacher, cu_seqlens=offsets, max_seqlen=3)
    with pytest.raises(ValueError, match="max_seqlen must be None without cu_seqlens"):
        losses.structure_distill(student[None], teacher[None], max_seqlen=6)
