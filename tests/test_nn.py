"""Modules: closed forms against autograd, identity at the start, running state. Ranks apart."""

import io

import pytest
import torch
from torch import Tensor, nn

from fastalign.losses import shift_align
from fastalign.nn import ModalityCalibration, ModalityClassifier, ModalityShift, ShiftDirection


def logit_gradient(classifier: ModalityClassifier, h: Tensor, label: Tensor) -> Tensor:
    h = h.detach().requires_grad_()
    logits = classifier(h).gather(-1, label[..., None])
    return torch.autograd.grad(logits.sum(), h)[0]


@pytest.mark.parametrize("hidden_dims", [(), (5,), (7, 3), (4, 6, 5)])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (4,), (2, 3)])
def test_channel_weights_are_the_gradient(hidden_dims, leading):
    classifier = ModalityClassifier(6, hidden_dims).double()
    h = 3 * torch.randn(*leading, 6, dtype=torch.float64)
    for label in (0, 1):
        labels = torch.full(leading, label)
        weights = classifier.channel_weights(h, label)
        torch.testing.assert_close(weights, logit_gradient(classifier, h, labels))
    labels = torch.randint(0, 2, leading)
    mixed = classifier.channel_weights(h, labels)
    torch.testing.assert_close(mixed, logit_gradient(classifier, h, labels))
    assert mixed.shape == h.shape and not mixed.requires_grad


def test_channel_weights_by_hand():
    # One hidden unit z = x1 - x2, vision logit 2 gelu(z). At z = 0 gelu' = Phi(0) = 1/2, so the
    # gradient is 2 * 1/2 * (1, -1); at z = 1 it is Phi(1) + phi(1) = 0.8413447 + 0.2419707.
    classifier = ModalityClassifier(2, (1,)).double()
    with torch.no_grad():
        for parameter, value in zip(
            classifier.parameters(), ([[1.0, -1.0]], [0.0], [[0.5], [2.0]], [3.0, 4.0]), strict=True
        ):
            parameter.copy_(torch.tensor(value))
    h = torch.tensor([[4.0, 4.0], [2.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[1.0, -1.0], [2.1666308, -2.1666308]], dtype=torch.float64)
    torch.testing.assert_close(classifier.channel_weights(h, 1), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(classifier.channel_weights(h, 0), expected / 4, rtol=1e-7, atol=0)


def test_channel_weights_leave_no_trace():
    classifier = ModalityClassifier(4, (3,))
    h = torch.randn(2, 4, requires_grad=True)
    before = h.detach().clone()
    weights = classifier.channel_weights(h, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(classifier.channel_weights(h, 1), weights)
    assert weights.grad_fn is None and torch.equal(h.detach(), before)
    half = classifier.channel_weights(before.bfloat16(), 1)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), weights, rtol=0.05, atol=0.01)
    linear = ModalityClassifier(4, ())
    linear.channel_weights(before, 1).fill_(0.0)
    assert linear.layers[0].weight.abs().sum() > 0


def test_classifier_learns():
    h = torch.cat([torch.randn(64, 8) - 1, torch.randn(64, 8) + 1])
    labels = torch.arange(2).repeat_interleave(64)
    classifier = ModalityClassifier(8, (16,))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(classifier(h), labels).backward()
        optimizer.step()
    assert (classifier(h).argmax(-1) == labels).float().mean() > 0.95


def test_classifier_bad_input():
    classifier = ModalityClassifier(4)
    h = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="h must have a last dimension of 4"):
        classifier(torch.zeros(2, 5))
    with pytest.raises(TypeError, match="h must have a floating-point dtype"):
        classifier(h.long())
    with pytest.raises(ValueError, match="label must be one of 0, 1: got 2"):
        classifier.channel_weights(h, 2)
    with pytest.raises(ValueError, match=r"label must have the shape \(...\) = \(2,\): got \(3,\)"):
        classifier.channel_weights(h, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="label must be int32 or int64: got torch.bool"):
        classifier.channel_weights(h, torch.zeros(2, dtype=torch.bool))


def trained_shift(dim: int, hidden: int, kernel_size: int = 3) -> ModalityShift:
    """A shift whose last convolution is no longer zero, in float64."""
    shift = ModalityShift(dim, hidden, kernel_size).double()
    nn.init.normal_(shift.conv2.weight)
    nn.init.normal_(shift.conv2.bias)
    return shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_untrained_shift_is_the_identity(dtype, grid, extra):
    x = (100 * torch.randn(2, extra + grid[0] * grid[1], 4)).to(dtype)
    shift = ModalityShift(4, 6)
    assert torch.equal(shift(x, grid), x)
    assert torch.equal(shift(x[0, extra:], [grid]), x[0, extra:])
    nn.init.ones_(shift.conv2.weight)
    assert not torch.equal(shift(x, grid), x)
    shift.reset_parameters()
    assert torch.equal(shift(x, grid), x)


def test_shift_by_hand():
    # Both convolutions sum their 3x3 neighbourhood. On a grid of 1 x 2 with x = (1, 2) the first
    # gives (3, 3), the second (6, 6) and the residual adds x; with a bias of -4 the first gives
    # (-1, -1), which ReLU stops.
    shift = ModalityShift(1, 1)
    with torch.no_grad():
        for conv in (shift.conv1, shift.conv2):
            conv.weight.fill_(1.0)
            conv.bias.zero_()
        x = torch.tensor([[[9.0], [1.0], [2.0]]])
        # The first token is no patch: it neither changes nor leaks into the others.
        assert shift(x, (1, 2)).flatten().tolist() == [9.0, 7.0, 8.0]
        # As a column of 2 x 1 the neighbours are the same; as two images there are none.
        assert shift(x[:, 1:], (2, 1)).flatten().tolist() == [7.0, 8.0]
        assert shift(x[0, 1:], [(1, 1), (1, 1)]).flatten().tolist() == [2.0, 4.0]
        shift.conv1.bias.fill_(-4.0)
        assert shift(x[:, 1:], (1, 2)).flatten().tolist() == [1.0, 2.0]


def test_shift_packs_images_of_different_grids():
    shift = trained_shift(3, 4)
    grids = [(2, 3), (4, 1), (2, 3), (1, 1)]
    images = [torch.randn(h * w, 3, dtype=torch.float64) for h, w in grids]
    alone = [shift(x[None], grid)[0] for x, grid in zip(images, grids, strict=True)]
    torch.testing.assert_close(shift(torch.cat(images), grids), torch.cat(alone))
    assert shift(torch.zeros(0, 3), []).shape == (0, 3)
    assert shift(torch.zeros(0, 6, 3), (2, 3)).shape == (0, 6, 3)


def test_shift_of_a_padded_picture_is_that_of_the_picture():
    """Padding is as if it were not there, to both convolutions, whatever stands in it."""
    shift = trained_shift(3, 4)
    picture = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    padded = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    padded[:, :2, :3] = picture
    mask = torch.zeros(1, 4, 5, dtype=torch.bool)
    mask[:, :2, :3] = True
    x = torch.cat([torch.ones(1, 1, 3, dtype=torch.float64), padded.flatten(1, 2)], 1)
    out = shift(x, (4, 5), mask.flatten(1))
    expected = padded.clone()
    expected[:, :2, :3] = shift(picture.flatten(1, 2), (2, 3)).view_as(picture)
    torch.testing.assert_close(out[:, 1:].view_as(padded), expected)
    assert torch.equal(out[:, 0], x[:, 0])
    assert torch.equal(out[:, 1:].view_as(padded)[~mask], padded[~mask])
    everywhere = torch.ones(1, 20, dtype=torch.bool)
    torch.testing.assert_close(shift(x, (4, 5), everywhere), shift(x, (4, 5)))


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_shift_gradcheck(kernel_size):
    shift = trained_shift(2, 3, kernel_size)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(shift.named_parameters())

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(shift, named, (x, (2, 3)))

    assert torch.autograd.gradcheck(forward, (x, *parameters.values()))
    packed = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift(x, [(2, 3), (2, 2)]), packed)


def test_shift_starts_to_move():
    x, direction = torch.randn(4, 6, 8), torch.randn(8)
    shift = ModalityShift(8, 16)
    optimizer = torch.optim.AdamW(shift.parameters(), lr=1e-3)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        moved = shift(x, (2, 3))
        loss = shift_align(x.flatten(0, 1), moved.flatten(0, 1), direction)
        loss.backward()
        gradients = [p.grad for p in shift.parameters()]
        assert all(g.isfinite().all() for g in gradients)
        optimizer.step()
        history.append(loss.item())
    assert history[0] == 1.0 and history[-1] < 0.1


def test_shift_bad_input():
    shift = ModalityShift(3, 4)
    x = torch.zeros(2, 6, 3)
    with pytest.raises(ValueError, match=r"at least h \* w = 9 tokens an image for grid \(3, 3\)"):
        shift(x, (3, 3))
    with pytest.raises(ValueError, match="x must have a last dimension of 3"):
        shift(x[..., :2], (2, 3))
    for grid in (None, (2, 0), (6,), [(2, 3), (2, 3)]):
        with pytest.raises(ValueError, match=r"grid must be \(height, width\), each at least 1"):
            shift(x, grid)
    with pytest.raises(ValueError, match=r"grid must be a list of \(height, width\)"):
        shift(x[0], (2, 3))
    with pytest.raises(ValueError, match="patches of the 2 grids, 7 rows: got 6"):
        shift(x[0], [(2, 3), (1, 1)])
    with pytest.raises(ValueError, match=r"mask must have the shape \(b, h \* w\)"):
        shift(x, (2, 3), torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be None for packed x"):
        shift(x[0], [(2, 3)], torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="kernel_size must be odd, to keep the grid: got 2"):
        ModalityShift(3, 4, kernel_size=2)


def test_calibration_is_the_identity_at_first():
    x, mask = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5
    calibration = ModalityCalibration(4)
    assert torch.equal(calibration(x, mask), x)
    with torch.no_grad():
        calibration.scale.copy_(torch.tensor([2.0, 1.0, 1.0, 0.0]))
        calibration.shift.copy_(torch.tensor([0.0, 3.0, 0.0, 1.0]))
    y = calibration(x, mask)
    assert torch.equal(y[~mask], x[~mask])
    # 2 x, x + 3, x, and 1 whatever x is.
    expected = torch.stack([2 * x[..., 0], x[..., 1] + 3, x[..., 2], torch.ones(2, 5)], -1)
    torch.testing.assert_close(y[mask], expected[mask])


def test_calibration_init_std():
    calibration = ModalityCalibration(20_000, init_std=0.02)
    assert calibration.scale.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert calibration.shift.mean().item() == pytest.approx(0.0, abs=1e-3)
    for parameter in calibration.parameters():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="init_std must be at least 0: got -1"):
        ModalityCalibration(3, init_std=-1)


def test_direction_is_the_mean_of_all_pairs():
    direction = ShiftDirection(3)
    assert torch.equal(direction.value, torch.zeros(3))
    # Means (1, 0, 2) of two pairs and (4, 3, -1) of one: (2 * 1 + 4) / 3 = 2, 1, 1.
    direction.update(torch.tensor([[0.0, 0.0, 2.0], [2.0, 0.0, 2.0]]))
    assert direction.value.tolist() == [1.0, 0.0, 2.0]
    direction.update(torch.zeros(0, 3))
    direction.update(torch.tensor([[4.0, 3.0, -1.0]], dtype=torch.bfloat16))
    assert direction.value.tolist() == [2.0, 1.0, 1.0]
    assert direction.count.item() == 3 and direction.value.dtype == torch.float32
    direction.value.fill_(9.0)
    assert direction.value.tolist() == [2.0, 1.0, 1.0]


def test_direction_does_not_depend_on_the_batches():
    pairs = torch.randn(1000, 4) + 5
    parts, whole = ShiftDirection(4), ShiftDirection(4)
    for size in (1, 7, 92, 900):
        parts.update(pairs[:size])
        pairs_left = pairs[size:]
        whole.update(torch.cat([pairs[:size]]))
        pairs = pairs_left
    assert parts.count == 1000
    torch.testing.assert_close(parts.mean, whole.mean)


def test_direction_leaves_out_broken_pairs():
    direction = ShiftDirection(2)
    nan, inf = float("nan"), float("inf")
    direction.update(torch.tensor([[1.0, 2.0], [nan, 0.0], [3.0, inf], [3.0, 4.0]]))
    assert direction.value.tolist() == [2.0, 3.0] and direction.count.item() == 2


def test_direction_keeps_no_graph_and_no_input():
    instance = torch.ones(2, 2, requires_grad=True)
    direction = ShiftDirection(2)
    direction.update(instance)
    assert not direction.mean.requires_grad and not direction.value.requires_grad
    assert torch.equal(instance.detach(), torch.ones(2, 2))


def test_direction_survives_half_precision_and_checkpoints():
    # In bfloat16 a mean of 1 over 1000 pairs cannot move by the 0.001 that one more pair adds.
    direction = ShiftDirection(1).to(torch.bfloat16)
    assert direction.mean.dtype == torch.float64
    direction.update(torch.ones(1000, 1))
    model = nn.ModuleDict({"direction": direction}).half()
    model["direction"].update(torch.full((1, 1), 2.001))
    assert direction.value.item() == pytest.approx(1.001, rel=1e-6)
    file = io.BytesIO()
    torch.save(direction.state_dict(), file)
    file.seek(0)
    restored = ShiftDirection(1)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored.mean, direction.mean) and restored.count == 1001


def test_direction_bad_input():
    direction = ShiftDirection(2)
    with pytest.raises(ValueError, match="instance must have 2 dimension"):
        direction.update(torch.zeros(2))
    with pytest.raises(ValueError, match="instance must have a last dimension of 2"):
        direction.update(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="instance must have a floating-point dtype"):
        direction.update(torch.zeros(3, 2, dtype=torch.int64))
