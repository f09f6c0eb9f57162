"""GramLoss against DINOv3's formula written out, its two quirks, and what it promises beyond."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor

from fastalign.losses import structure_distill
from fastalign.nn import GramLoss

NEGATIVES = {
    "keep": {"remove_neg": False},
    "both": {},
    "teacher": {"remove_neg": False, "remove_only_teacher_neg": True},
}


def pair(b: int = 3, n: int = 5) -> tuple[Tensor, Tensor]:
    student = torch.randn(b, n, 4, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(b, n, 6, dtype=torch.float64)


def gram_anchoring(
    student: Tensor,
    teacher: Tensor,
    apply_norm: bool = True,
    img_level: bool = True,
    remove_neg: bool = True,
    remove_only_teacher_neg: bool = False,
) -> Tensor:
    """DINOv3's loss entry by entry: the mean over pairs of patches, of each image or of all."""

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        return x.dot(y) / (x.dot(x) * y.dot(y)).sqrt() if apply_norm else x.dot(y)

    b, n, _ = student.shape
    rows = [(i, student[i, p], teacher[i, p]) for i in range(b) for p in range(n)]
    squares = []
    for (i, x, gx), (j, y, gy) in itertools.product(rows, rows):
        if img_level and i != j:
            continue
        s, t = similarity(x, y), similarity(gx, gy)
        if remove_neg:
            s, t = (torch.zeros_like(z) if z < 0 else z for z in (s, t))
        elif remove_only_teacher_neg:
            # In the order of its code, so that the second line never finds an entry.
            t = torch.zeros_like(t) if t < 0 else t
            s = torch.zeros_like(s) if s < 0 and t < 0 else s
        squares.append((s - t) ** 2)
    return torch.stack(squares).mean()


@pytest.mark.parametrize("compat", ["documented", "dinov3"])
@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("img_level", [True, False])
@pytest.mark.parametrize("apply_norm", [True, False])
def test_value_and_gradient_are_those_of_the_formula(apply_norm, img_level, negatives, compat):
    student, teacher = pair()
    options = {"apply_norm": apply_norm, **NEGATIVES[negatives]}
    loss = GramLoss(**options, compat=compat)(student, teacher, img_level=img_level)
    expected = gram_anchoring(student, teacher, img_level=img_level, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,), (exact,) = (torch.autograd.grad(value, student) for value in (loss, expected))
    torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-14)


def test_by_hand():
    # Off the diagonal the student has -1 and the teacher -0.6, both twice among 4 entries:
    # (0.4)^2 / 2; 0; and with the teacher's at 0 but the student's kept, 1 / 2. A mask of the
    # entries negative in both would give 0 in its place.
    student = torch.tensor([[[2.0, 0.0], [-1.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[1.0, 0.0], [-0.6, 0.8]]], dtype=torch.float64)
    for negatives, expected in (("keep", 0.08), ("both", 0.0), ("teacher", 0.5)):
        loss = GramLoss(**NEGATIVES[negatives])(student, teacher)
        assert loss.item() == pytest.approx(expected, abs=1e-15)
    # Dot products: the student has 4, 1 and twice -2, the teacher 1, 1 and twice -0.6.
    loss = GramLoss(apply_norm=False, remove_neg=False)(student, teacher)
    assert loss.item() == pytest.approx((3**2 + 0 + 2 * 1.4**2) / 4)


def test_options_stand_in_the_order_of_the_original():
    loss = GramLoss(False, False, False, True)
    expected = {"apply_norm": False, "img_level": False, "remove_neg": False}
    expected["remove_only_teacher_neg"] = True
    assert {name: getattr(loss, name) for name in expected} == expected
    assert GramLoss().remove_neg and GramLoss().apply_norm and GramLoss().img_level
    student, teacher = pair()
    assert torch.equal(loss(student, teacher, True), loss(student, teacher, img_level=True))


@pytest.mark.parametrize("img_level", [True, False])
def test_the_constructors_img_level(img_level):
    student, teacher = pair()
    image, batch = (GramLoss()(student, teacher, img_level=level) for level in (True, False))
    assert image != batch
    documented, dinov3 = (
        GramLoss(img_level=img_level, compat=compat) for compat in ("documented", "dinov3")
    )
    assert documented(student, teacher) == (image if img_level else batch)
    # Its code drops the option: an image at a time, whatever the constructor was told.
    assert dinov3(student, teacher) == image
    for loss in (documented, dinov3):
        assert loss(student, teacher, img_level=True) == image
        assert loss(student, teacher, img_level=False) == batch


def test_rows_of_the_batch_may_come_flat():
    student, teacher = pair()
    loss = GramLoss(img_level=False)
    expected = loss(student, teacher)
    flat = student.flatten(0, 1), teacher.flatten(0, 1)
    assert loss(*flat) == expected
    # Each is flattened by itself, as in the original.
    assert loss(student, flat[1]) == expected and loss(flat[0], teacher) == expected


def test_is_structure_distill():
    student, teacher = pair()
    assert GramLoss(remove_neg=False)(student, teacher) == structure_distill(student, teacher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32(dtype):
    student, teacher = (x.detach().to(dtype) for x in pair())
    expected = GramLoss()(student.double(), teacher.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = GramLoss()(student, teacher.float())
    assert loss.dtype == torch.float32 and expected.dtype == torch.float64
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_inputs_stay_and_targets_get_no_gradient():
    student, teacher = pair()
    teacher.requires_grad_()
    before = [x.detach().clone() for x in (student, teacher)]
    for negatives in NEGATIVES.values():
        GramLoss(**negatives)(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert all(map(torch.equal, before, (student.detach(), teacher.detach())))


@pytest.mark.parametrize("img_level", [True, False])
def test_borders(img_level):
    loss = GramLoss(img_level=img_level)
    for b, n in ((0, 5), (2, 0)):
        student, teacher = pair(b, n)
        value = loss(student, teacher)
        value.backward()
        assert value.item() == 0.0 and student.grad.shape == student.shape
    # A zero patch is similar to nothing, itself included: (1 - 0)^2 at its entry of the diagonal.
    student = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    value = loss(student, torch.eye(2)[None])
    value.backward()
    assert value.item() == 0.25 and torch.equal(student.grad, torch.zeros(1, 2, 2))


def test_is_a_module_without_state():
    loss = GramLoss(False, remove_neg=False, compat="dinov3")
    assert not loss.state_dict() and not list(loss.parameters())
    assert "apply_norm=False, img_level=True, remove_neg=False" in repr(loss)
    data = pickle.dumps(loss)
    assert b"fastalign.nn" in data and b"_gram" not in data
    student, teacher = pair()
    for twin in (pickle.loads(data), copy.deepcopy(loss)):
        assert twin(student, teacher) == loss(student, teacher)


@pytest.mark.parametrize("img_level", [True, False])
def test_compiles_whole(img_level):
    torch._dynamo.reset()
    student, teacher = pair()
    loss = GramLoss(img_level=img_level)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(grad, torch.autograd.grad(loss(student, teacher), student)[0])


def test_bad_options():
    with pytest.raises(ValueError, match="not both be true.*pass remove_neg=False with remove_on"):
        GramLoss(remove_only_teacher_neg=True)
    with pytest.raises(ValueError, match="compat must be one of 'documented', 'dinov3': got 'v3'"):
        GramLoss(compat="v3")


def test_bad_input():
    student, teacher = (x.detach() for x in pair())
    loss = GramLoss()
    with pytest.raises(
        ValueError, match=r"target_feats must be .* img_level=False: got .*\(5, 6\)"
    ):
        loss(student, teacher[0])
    with pytest.raises(ValueError, match=r"output_feats must be \(b, n, d\)"):
        loss(student[0], teacher[0])
    with pytest.raises(ValueError, match=r"output_feats must be .*: got shape \(4,\)"):
        loss(student[0, 0], teacher, img_level=False)
    with pytest.raises(ValueError, match=r"got \(3, 4, 6\) and \(3, 5, 4\);.*resample_grid"):
        loss(student, teacher[:, :4])
    with pytest.raises(TypeError, match="target_feats must have a floating-point dtype"):
        loss(student, teacher.long())
    with pytest.raises(ValueError, match="target_feats must have the device of output_feats"):
        loss(student, teacher.to("meta"))
