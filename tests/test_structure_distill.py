"""Structure distillation: numbers worked out by hand, options, borders, contracts."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastalign.losses import resample_grid, structure_distill

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
SEEDS = st.integers(0, 2**31)


def patches(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def test_two_patches_by_hand():
    # S_h = I. S_g has 1 / sqrt 2 off the diagonal: two entries of R^2 = 1/2, over n^2 = 4.
    student = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    loss = structure_distill(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    # dL/dH^ = 4/4 R H^ with R = -1/sqrt 2 off the diagonal; each row is orthogonal to its patch
    # already, and is divided by that patch's length (2 and 1).
    r = math.sqrt(0.5)
    expected = torch.tensor([[[0.0, -r / 2], [-r, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(student.grad, expected)


def test_dot_by_hand():
    # S_h = diag(4, 1), S_g = [[1, 1], [1, 2]]: R^2 sums to 9 + 1 + 1 + 1, over 4.
    student = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    assert structure_distill(student, teacher, similarity="dot").item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("negatives", "expected"), [("keep", 0.08), ("clip", 0.0), ("clip_teacher", 0.5)]
)
def test_negatives_by_hand(negatives, expected):
    # Off the diagonal the student has -1 and the teacher -0.6: R = 0.4, 0 - 0 and -1 - 0.
    student = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0], [-0.6, 0.8]]])
    loss = structure_distill(student, teacher, negatives=negatives)
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("negatives", ["keep", "clip", "clip_teacher"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_is_the_gram_anchoring_loss(negatives, similarity, level):
    """DINOv3: squared error of the Gram matrices, the teacher clamped before the joint mask."""
    student, teacher = patches(2, 7, 4).requires_grad_(), patches(2, 7, 4, seed=1)
    leaf = student.detach().clone().requires_grad_()
    h, g = (F.normalize(x, dim=-1) if similarity == "cosine" else x for x in (leaf, teacher))
    if level == "batch":
        h, g = h.flatten(0, 1), g.flatten(0, 1)
    s_h, s_g = h @ h.mT, g @ g.mT
    if negatives != "keep":
        s_g = torch.where(s_g < 0, 0.0, s_g)
        off = s_h < 0 if negatives == "clip" else (s_h < 0) & (s_g < 0)
        s_h = torch.where(off, 0.0, s_h)
    expected = F.mse_loss(s_h, s_g)
    expected.backward()
    loss = structure_distill(
        student, teacher, similarity=similarity, negatives=negatives, level=level
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(student.grad, leaf.grad)


def test_level_batch_by_hand():
    # One patch an image: within images nothing differs; among both, R = -1 twice, over N^2 = 4.
    student = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    teacher = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert structure_distill(student, teacher).item() == 0.0
    for s, t, offsets in (
        (student, teacher, None),
        (student[:, 0], teacher[:, 0], None),
        (student[:, 0], teacher[:, 0], torch.tensor([0, 1, 2], dtype=torch.int32)),
    ):
        loss = structure_distill(s, t, level="batch", cu_seqlens=offsets)
        assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_is_each_image_by_itself(dtype):
    lengths = [3, 0, 1, 6]
    student, teacher = patches(10, 5).requires_grad_(), patches(10, 4, seed=1)
    offsets = torch.tensor([0, 3, 3, 4, 10], dtype=dtype)
    alone = [
        structure_distill(s[None], t[None])
        for s, t in zip(student.split(lengths), teacher.split(lengths), strict=True)
    ]
    each = structure_distill(student, teacher, cu_seqlens=offsets, reduction="none")
    torch.testing.assert_close(each, torch.stack(alone))
    assert each[1] == 0.0
    total = structure_distill(student, teacher, cu_seqlens=offsets, reduction="sum")
    torch.testing.assert_close(total, sum(alone))
    # The image without patches is not counted.
    mean = structure_distill(student, teacher, cu_seqlens=offsets)
    torch.testing.assert_close(mean, sum(alone) / 3)
    (grad,) = torch.autograd.grad(mean, student)
    (expected,) = torch.autograd.grad(sum(alone) / 3, student)
    torch.testing.assert_close(grad, expected)


def test_packed_equals_dense():
    student, teacher = patches(3, 5, 4), patches(3, 5, 2, seed=1)
    offsets = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    for reduction in ("mean", "sum", "none"):
        dense = structure_distill(student, teacher, reduction=reduction)
        packed = structure_distill(
            student.flatten(0, 1), teacher.flatten(0, 1), cu_seqlens=offsets, reduction=reduction
        )
        torch.testing.assert_close(packed, dense)
        assert dense.shape == ((3,) if reduction == "none" else ())


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 0, 3)])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_nothing_gives_zero(shape, level):
    student = torch.zeros(shape, requires_grad=True)
    loss = structure_distill(student, torch.zeros(shape), level=level)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.shape == shape


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_packed_patch_gives_zero(offsets):
    student = torch.zeros(0, 3, requires_grad=True)
    offsets = torch.tensor(offsets, dtype=torch.int32)
    loss = structure_distill(student, torch.zeros(0, 5), cu_seqlens=offsets)
    loss.backward()
    assert loss.item() == 0.0 and student.grad.shape == (0, 3)


def test_zero_rows():
    # The zero patch is similar to nothing, not to itself either: R is -1 at its diagonal entry and
    # -1 / sqrt 2 beside it: (1 + 1/2 + 1/2) / 4. A zero patch of the teacher does the same.
    student = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    loss = structure_distill(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert torch.equal(student.grad[0, 1], torch.zeros(2))
    assert structure_distill(teacher, student.detach()).item() == pytest.approx(0.5)
    everything = torch.zeros(1, 3, 2, requires_grad=True)
    structure_distill(everything, teacher[:, :1].expand(1, 3, 2)).backward()
    assert torch.equal(everything.grad, torch.zeros(1, 3, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_magnitude_does_not_matter(scale):
    student, teacher = patches(2, 5, 4).float(), patches(2, 5, 4, seed=1).float()
    loss = structure_distill(student * scale, teacher * scale)
    torch.testing.assert_close(loss, structure_distill(student, teacher))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("d", [1, 2, 3, 5, 8])
def test_gradcheck(n, d):
    student, teacher = patches(2, n, d).requires_grad_(), patches(2, n, 3, seed=1)
    offsets = torch.tensor([0, n, 2 * n], dtype=torch.int32)
    for options in ({}, {"similarity": "dot"}, {"negatives": "clip"}, {"level": "batch"}):
        assert torch.autograd.gradcheck(
            lambda s, options=options: structure_distill(s, teacher, **options), student
        )
    assert torch.autograd.gradcheck(
        lambda s: structure_distill(
            s.flatten(0, 1), teacher.flatten(0, 1), cu_seqlens=offsets, reduction="none"
        ),
        student,
    )


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(["keep", "clip", "clip_teacher"]))
def test_scale_of_patches_is_free(sizes, seed, negatives):
    b, n, d, dt = sizes
    student, teacher = patches(b, n, d, seed=seed), patches(b, n, dt, seed=seed + 1)
    factors = patches(b, n, 1, seed=seed + 2).abs() + 0.1
    loss = structure_distill(student, teacher, negatives=negatives)
    scaled = structure_distill(student * factors, teacher * 3.0, negatives=negatives)
    torch.testing.assert_close(scaled, loss, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(["cosine", "dot"]))
def test_order_of_patches_is_free(sizes, seed, similarity):
    b, n, d, dt = sizes
    student, teacher = patches(b, n, d, seed=seed), patches(b, n, dt, seed=seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = structure_distill(student, teacher, similarity=similarity)
    permuted = structure_distill(student[:, order], teacher[:, order], similarity=similarity)
    torch.testing.assert_close(permuted, loss, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(["cosine", "dot"]))
def test_a_rotated_teacher_costs_nothing(sizes, seed, similarity):
    b, n, d, _ = sizes
    teacher = patches(b, n, d, seed=seed)
    rotation = torch.linalg.qr(patches(d, d, seed=seed + 1)).Q
    loss = structure_distill(teacher @ rotation, teacher, similarity=similarity)
    assert 0.0 <= loss.item() < 1e-18


def test_no_gradient_to_the_teacher():
    student, teacher = patches(1, 3, 2).requires_grad_(), patches(1, 3, 2, seed=1).requires_grad_()
    structure_distill(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_types_may_differ():
    student, teacher = patches(2, 6, 4).bfloat16(), patches(2, 6, 3, seed=1).half()
    loss = structure_distill(student, teacher)
    assert loss.dtype == torch.float32
    exact = structure_distill(student.double(), teacher.double())
    assert exact.dtype == torch.float64
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_strided_and_expanded_inputs():
    student, teacher = patches(4, 6, 2).transpose(0, 2), patches(1, 6, 3).expand(2, 6, 3)
    loss = structure_distill(student, teacher)
    torch.testing.assert_close(loss, structure_distill(student.contiguous(), teacher.contiguous()))


def test_resample_by_hand():
    # Twice as coarse with antialiasing: the triangle filter spans 4 patches of the fine grid with
    # weights 1, 3, 3, 1 over 8, cut at the border: (3 * 0 + 3 * 1 + 2) / 7 and its mirror image.
    fine = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 4, 1)
    coarse = resample_grid(fine, (1, 4), (1, 2))
    torch.testing.assert_close(coarse.flatten(), torch.tensor([5 / 7, 16 / 7]))
    # Twice as fine: a quarter and three quarters of the neighbours, rows before columns.
    square = torch.tensor([[0.0, 0.0], [4.0, 4.0]]).reshape(1, 4, 1)
    rows = resample_grid(square, (2, 2), (4, 2)).reshape(4, 2)
    torch.testing.assert_close(rows[:, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_resample_keeps_what_it_should():
    features = patches(2, 6, 3).bfloat16()
    assert resample_grid(features, (2, 3), (2, 3)) is features
    assert resample_grid(features, (2, 3), (5, 4)).dtype == torch.bfloat16
    assert resample_grid(features[:0], (2, 3), (5, 4)).shape == (0, 20, 3)
    constant = torch.full((1, 6, 2), 1.5)
    torch.testing.assert_close(resample_grid(constant, (3, 2), (2, 5)), torch.full((1, 10, 2), 1.5))
    student, teacher = patches(2, 4, 3), patches(2, 6, 3)
    resampled = resample_grid(teacher, (2, 3), (2, 2))
    assert structure_distill(student, resampled).isfinite()


def test_bad_input():
    student, teacher = torch.zeros(2, 4, 3), torch.zeros(2, 4, 5)
    with pytest.raises(ValueError, match=r"\(2, 9, 5\) and \(2, 4, 3\).*resample_grid"):
        structure_distill(student, torch.zeros(2, 9, 5))
    with pytest.raises(ValueError, match="similarity must be one of 'cosine', 'dot': got 'l2'"):
        structure_distill(student, teacher, similarity="l2")
    with pytest.raises(ValueError, match="negatives must be one of"):
        structure_distill(student, teacher, negatives="drop")
    with pytest.raises(ValueError, match="level must be one of"):
        structure_distill(student, teacher, level="patch")
    with pytest.raises(ValueError, match="reduction must be one of"):
        structure_distill(student, teacher, reduction="max")
    with pytest.raises(TypeError, match="student must have a floating-point dtype"):
        structure_distill(student.int(), teacher)
    with pytest.raises(
        ValueError, match=r"packed \(sum n, d\) with cu_seqlens: got shape \(4, 3\)"
    ):
        structure_distill(student[0], teacher[0])
    with pytest.raises(ValueError, match="student must have a width of at least 1"):
        structure_distill(student[..., :0], teacher)
    with pytest.raises(ValueError, match="teacher must have the device of student"):
        structure_distill(student, teacher.to("meta"))
    with pytest.raises(ValueError, match="student with cu_seqlens must have 2 dimension"):
        structure_distill(student, teacher, cu_seqlens=torch.tensor([0, 4, 8]))


@pytest.mark.parametrize("offsets", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5]])
def test_bad_offsets(offsets):
    rows = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 4, the number of rows"):
        structure_distill(rows, rows, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64: got torch.float32"):
        structure_distill(rows, rows, cu_seqlens=torch.tensor(offsets).float())
    with pytest.raises(ValueError, match="cu_seqlens must hold b \\+ 1 offsets"):
        structure_distill(rows, rows, cu_seqlens=torch.zeros(0, dtype=torch.int32))


def test_bad_grids():
    features = torch.zeros(1, 7, 3)
    with pytest.raises(ValueError, match=r"h \* w = 6 patches for grid \(2, 3\): got 7; leave out"):
        resample_grid(features, (2, 3), (2, 2))
    with pytest.raises(ValueError, match="target_grid must be"):
        resample_grid(features, (1, 7), (0, 2))
