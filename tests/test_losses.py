"""What all losses promise together: sums of gradients, inputs untouched, no wait for the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign import losses

B, N, D, V = 2, 6, 8, 11
Batch = dict[str, Tensor]


def batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Hidden states (b, n, d) and what the losses compare them with; label 0 is ignored."""
    shapes = {
        "teacher": (B, N, 5),
        "weight": (V, D),
        "original": (B * N, D),
        "direction": (D,),
        "text": (B * N, D),
        "delta": (B * N,),
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors["delta"] = tensors["delta"] * 4
    tensors["labels"] = torch.randint(1, V, (B * N,))
    tensors["labels"][::4] = -100
    return tensors


def structure_distill(hidden: Tensor, batch: Batch) -> Tensor:
    return losses.structure_distill(hidden, batch["teacher"])


def cross_entropy(hidden: Tensor, batch: Batch) -> Tensor:
    weights = losses.contrast_weights(batch["delta"])
    return losses.linear_cross_entropy(
        hidden.flatten(0, 1), batch["weight"], batch["labels"], token_weights=weights, softcap=9.0
    )


def shift_align(hidden: Tensor, batch: Batch) -> Tensor:
    return losses.shift_align(batch["original"], hidden.flatten(0, 1), batch["direction"])


def infonce(hidden: Tensor, batch: Batch) -> Tensor:
    return losses.mutual_information(hidden.flatten(0, 1), batch["text"])


def gaussian(hidden: Tensor, batch: Batch) -> Tensor:
    options = {"estimator": "gaussian", "shrinkage": 0.1}
    return losses.mutual_information(hidden.flatten(0, 1), batch["text"], **options)


LOSSES = [structure_distill, cross_entropy, shift_align, infonce, gaussian]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
Loss = Callable[[Tensor, Batch], Tensor]


def hidden_states(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, N, D).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_on_shared_hidden_states_add_up(dtype):
    shared, data = hidden_states(dtype), batch(dtype)
    apart = sum(torch.autograd.grad(loss(shared, data), shared)[0] for loss in LOSSES)
    sum(loss(shared, data) for loss in LOSSES).backward()
    assert (shared.grad - apart).abs().max() <= 1e-6 * apart.abs().max()


@every_loss
def test_nothing_is_written_into(loss: Loss):
    hidden, data = hidden_states(), batch()
    data["weight"].requires_grad_()
    before = {name: tensor.detach().clone() for name, tensor in data.items()}
    kept = hidden.detach().clone()
    versions = {name: tensor._version for name, tensor in data.items()}
    loss(hidden, data).backward()
    assert torch.equal(hidden.detach(), kept) and hidden._version == 0
    for name, tensor in data.items():
        assert torch.equal(tensor.detach(), before[name]), name
        assert tensor._version == versions[name], name


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(loss: Loss, dtype: torch.dtype):
    hidden, data = hidden_states(dtype), batch(dtype)
    value = loss(hidden, data)
    value.backward()
    assert value.dtype == torch.float32 and value.shape == ()
    assert hidden.grad.dtype == dtype and hidden.grad.isfinite().all()
    wide = {k: t.double() if t.is_floating_point() else t for k, t in data.items()}
    exact = loss(hidden.detach().double(), wide)
    assert exact.dtype == torch.float64
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


@every_loss
def test_autocast_does_not_reach_in(loss: Loss):
    hidden, data = hidden_states(torch.float32), batch(torch.float32)
    expected = loss(hidden, data)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(hidden, data)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@every_loss
def test_nan_in_nan_out(loss: Loss):
    hidden, data = hidden_states(torch.float32), batch(torch.float32)
    broken = hidden.detach().clone()
    broken[0, 1, 2] = float("nan")
    assert loss(hidden, data).isfinite()
    assert loss(broken, data).isnan()
    for name in ("teacher", "text", "direction"):
        data[name].flatten()[:5] = float("nan")
    assert loss(hidden, data).isnan() or loss is cross_entropy


@every_loss
def test_never_waits_for_the_device(loss: Loss):
    """Meta tensors raise where a value is asked for, as a synchronisation would be."""
    hidden = torch.empty(B, N, D, device="meta", requires_grad=True)
    value = loss(hidden, {name: tensor.to("meta") for name, tensor in batch().items()})
    value.backward()
    assert value.is_meta and hidden.grad.shape == hidden.shape


def test_packed_weights_never_wait_for_the_device():
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    weights = losses.contrast_weights(torch.empty(9, device="meta"), offsets)
    assert weights.shape == (9,) and weights.is_meta


@every_loss
def test_compiles_whole(loss: Loss):
    hidden, data = hidden_states(), batch()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value = compiled(hidden, data)
    expected = loss(hidden, data)
    torch.testing.assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, hidden)[0])


@every_loss
def test_repeats_bit_for_bit(loss: Loss):
    hidden, data = hidden_states(torch.float32), batch(torch.float32)
    runs = [torch.autograd.grad(loss(hidden, data), hidden)[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
