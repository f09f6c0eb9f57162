"""Linear cross-entropy as it is computed: kernels and chunks against the reference in float64."""

import pytest
import torch
from fastalign_kernels import linear_cross_entropy as kernels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastalign.losses import linear_cross_entropy
from fastalign.ops import _lce_portable as portable
from fastalign.ops.linear_cross_entropy import compute
from fastalign.reference import linear_cross_entropy as reference
from fastalign.testing import Case, assert_as_accurate, cases
from fastalign.testing.cases import DTYPES

MODULES = {True: portable, False: kernels}
both_paths = pytest.mark.parametrize("path", [False, True], ids=["kernels", "portable"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def problem(t: int, v: int, d: int, dtype=torch.float32, *, bias: bool = False) -> Inputs:
    """Every fourth label is ignored."""
    case = Case("linear_cross_entropy", (t, v, d), dtype, "bias" if bias else "")
    return case.inputs()


def value_and_grads(fn, inputs: Inputs, dtype=None, **options) -> list[Tensor]:
    """Loss, per_token and the gradients of hidden, weight and, where there is one, bias."""
    hidden, weight, labels, weights, bias = inputs
    leaves = [
        x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
        for x in (hidden, weight, bias)
        if x is not None
    ]
    weights = weights if weights is None or dtype is None else weights.to(dtype)
    result = fn(*leaves[:2], labels, weights, leaves[2] if bias is not None else None, **options)
    cotangent = torch.linspace(0.5, 1.5, result.loss.numel()).to(result.loss).view_as(result.loss)
    grads = torch.autograd.grad(result.loss, leaves, cotangent)
    return [result.loss.detach(), result.per_token, *grads]


def check(path: bool, inputs: Inputs, device: str, **options) -> None:
    """As accurate as the reference at the same type."""
    placed = tuple(x if x is None else x.to(device) for x in inputs)
    found = value_and_grads(lambda *args, **o: compute(path, *args, **o), placed, **options)
    eager = value_and_grads(reference, inputs, details=True, **options)
    exact = value_and_grads(reference, inputs, torch.float64, details=True, **options)
    for x, plain, true in zip(found, eager, exact, strict=True):
        # dz, a factor of the gradients, is in the inputs' type as well: off by half a unit.
        rounding = torch.finfo(x.dtype).eps / 2 if not path and x.dtype != torch.float32 else 0.0
        assert_as_accurate(
            x.cpu(), plain, true, noise=4 * torch.finfo(torch.float32).eps + rounding
        )
    result = compute(path, *placed, **options)
    known = reference(*inputs, details=True, **options)
    assert torch.equal(result.correct.cpu(), known.correct)


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("case", cases("linear_cross_entropy"), ids=str)
def test_cases(case, reduction, path, device):
    check(path, case.inputs(), device, reduction=reduction)


@both_paths
@every_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softcap": 1e4, "reduction": "sum"},
        {"logit_scale": -0.3, "softcap": 5.0, "reduction": "none"},
        {"logit_scale": 4.0, "ignore_index": 7},
    ],
    ids=str,
)
def test_options(options, dtype, path, device):
    inputs = problem(9, 140, 33, dtype, bias=True)
    if "ignore_index" in options:
        inputs = (*inputs[:2], inputs[2].clamp_min(7), *inputs[3:])
    check(path, inputs, device, **options)


@both_paths
@pytest.mark.parametrize("number", [torch.int32, torch.int64], ids=str)
def test_types_may_differ(number, path, device):
    for h, w, b in (
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.bfloat16, torch.float32),
    ):
        hidden, weight, labels, weights, bias = problem(9, 140, 33, bias=True)
        inputs = (hidden.to(h), weight.to(w), labels.to(number), weights.bfloat16(), bias.to(b))
        check(path, inputs, device)
        check(path, inputs, device, reduction="none")


# -- how the work is cut ---------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows a chunk, and few of the head at a time."""
    for module, rows in ((portable, "ROWS"), (kernels, "_ROWS")):
        monkeypatch.setattr(module, rows, 3)
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
        monkeypatch.setattr(module, "BLOCK_BYTES", 500)
    monkeypatch.setattr(portable, "PASS_BYTES", 1000)


@both_paths
@every_dtype
# All rows at once, of which dz is kept; or chunks of d / 2 = 4 or of 3, and dW is added up.
@pytest.mark.parametrize(("t", "d"), [(14, 14), (14, 8), (15, 8), (14, 3), (2, 1)])
def test_chunks(t, d, dtype, path, small_chunks, device):
    inputs = problem(t, 140, d, dtype, bias=True)
    check(path, inputs, device, softcap=4.0)
    check(path, inputs, device, reduction="none")


def test_rows_of_a_chunk():
    # 256 MiB hold 2 ** 26 logits: 2093 rows of 32064, of which 2048 are a multiple of 128.
    assert kernels.chunk_rows(32064, 4096, True) == 2048
    # 441 rows of 152064, in tiles 384; beside dW it is 3584 / 2 = 1792 rows.
    assert kernels.chunk_rows(152064, 3584, False) == 384
    assert kernels.chunk_rows(152064, 3584, True) == 1792
    assert kernels.chunk_rows(10**9, 1, True) == 128
    # 128 MiB hold 2 ** 25: 1046 and 220 rows; d / 2 is 2048 and 256.
    assert portable.chunk_rows(32064, 4096, False) == 1046
    assert portable.chunk_rows(32064, 4096, True) == 2048
    assert portable.chunk_rows(152064, 512, False) == 220
    assert portable.chunk_rows(152064, 512, True) == 256
    assert portable.chunk_rows(10**9, 1, True) == 128


class Watch(TorchDispatchMode):
    """Products, and elements of the largest new tensor."""

    def __init__(self, *inputs: Tensor | None) -> None:
        super().__init__()
        self.products = self.largest = 0
        self.given = {x.untyped_storage().data_ptr() for x in inputs if x is not None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        self.products += func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.given:
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, size)
        return out


NEEDS = [
    ((False, False, False), False, 1),
    ((True, False, False), False, 2),
    ((True, True, True), False, 3),
    ((True, True, True), True, 2),  # and the third one backward
]


@pytest.mark.parametrize(("needs", "whole", "products"), NEEDS)
def test_products_and_memory_on_the_cpu(needs, whole, products, monkeypatch):
    """No product that is not needed, and no tensor larger than a chunk's logits or dW."""
    t, v, d = 40, 600, 16
    monkeypatch.setattr(portable, "chunk_rows", lambda *_: t if whole else 10)
    inputs = problem(t, v, d)
    with Watch(*inputs) as watch:
        portable.linear_cross_entropy_fwd._init_fn(*inputs, -100, 1.0, None, *needs, whole)
    assert watch.products == products * (1 if whole else 3)  # 30 of the 40 labels count
    assert watch.largest == (t * v if whole else v * d if needs[1] else 10 * v)


@pytest.mark.parametrize(("needs", "whole", "products"), NEEDS)
def test_products_of_the_kernels(needs, whole, products, monkeypatch, device):
    sizes = []

    def product(a, b, out, add=False):
        sizes.append(out.shape)
        return original(a, b, out, add)

    original = kernels._product
    monkeypatch.setattr(kernels, "_product", product)
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: 12)
    inputs = tuple(x if x is None else x.to(device) for x in problem(40, 600, 16))
    kernels.linear_cross_entropy_fwd(*inputs, -100, 1.0, None, *needs, whole)
    assert len(sizes) == products * (1 if whole else 4)
    assert sizes[0] == ((40 if whole else 10), 600)  # chunks of one size


@both_paths
def test_gradients_that_are_not_needed(path, device):
    inputs = tuple(x if x is None else x.to(device) for x in problem(9, 140, 33, bias=True))
    module = MODULES[path]
    full = module.linear_cross_entropy_fwd(*inputs, -100, 1.0, None, True, True, True, False)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        found = module.linear_cross_entropy_fwd(*inputs, -100, 1.0, None, *needs, False)
        for need, x, y in zip(needs, found[2:5], full[2:5], strict=True):
            assert torch.equal(x, y) if need else not x.numel()


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("t", [9, 40])  # dz is kept, and dW
def test_backward_twice(t, reduction, path, device):
    hidden, weight, labels, weights, _ = (
        x if x is None else x.to(device) for x in problem(t, 140, 33)
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = compute(path, *leaves, labels, weights, reduction=reduction).loss.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3.0 * loss, leaves, retain_graph=True)
    for x, y, z in zip(first, kept, second, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(z, 3.0 * x)


@both_paths
def test_tied_embeddings(path, device):
    """The head is also where the hidden states come from: its gradients add up."""
    _, weight, labels, weights, _ = problem(9, 140, 33)
    tokens = torch.arange(9) * 7

    def loss(fn, weight, labels, weights, tokens):
        return fn(torch.tanh(weight[tokens]), weight, labels, weights)

    grads = []
    for fn, dtype in ((lambda *args: compute(path, *args).loss, None), (reference, torch.float64)):
        leaf = weight.to(device if dtype is None else "cpu", dtype).requires_grad_()
        rest = (x.to(leaf.device) for x in (labels, weights, tokens))
        grads.append(torch.autograd.grad(loss(fn, leaf, *rest), leaf)[0].cpu())
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-5, atol=1e-7)


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_float64_stays_float64(reduction):
    hidden, weight, labels, weights, _ = problem(9, 140, 33)
    bias = torch.randn(140, dtype=torch.float64)
    options = {"softcap": 3.0, "logit_scale": 0.7, "reduction": reduction}
    found, exact = (
        value_and_grads(
            fn, (hidden.double(), weight.double(), labels, weights, bias), **options, **more
        )
        for fn, more in (
            (lambda *args, **o: compute(True, *args, **o), {}),
            (reference, {"details": True}),
        )
    )
    for x, y in zip(found, exact, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@both_paths
def test_float16_does_not_leave_its_range(path, device):
    """Factors of 1e-5 beside one of 1: dz as such would lie where float16 rounds to nothing."""
    hidden, weight, labels, weights, bias = problem(12, 2000, 64, torch.float16)
    weights[0] = 1e5
    for scale in (1.0, 2.0**-12):
        inputs = (hidden, weight, labels, weights * scale, bias)
        for reduction, power in (("mean", 2.0**15), ("none", 1.0), ("none", 2.0**-16)):

            def scaled(fn, power=power, reduction=reduction, **options):
                def loss(*args):
                    result = fn(*args, reduction=reduction, **options)
                    return result._replace(loss=result.loss.sum() * power)

                return loss

            placed = tuple(x if x is None else x.to(device) for x in inputs)
            fused = scaled(lambda *args, **o: compute(path, *args, **o))
            found = value_and_grads(fused, placed)
            exact = value_and_grads(scaled(reference, details=True), inputs, torch.float64)
            for x, true in zip(found[2:], exact[2:], strict=True):
                if true.abs().max() > 6e4:
                    continue  # the gradient itself has no float16
                bound = 6e-8 + 2e-3 * float(true.abs().max())
                torch.testing.assert_close(x.double().cpu(), true, rtol=4e-3, atol=bound)


@both_paths
def test_large_logits(path, device):
    """A confident head: per-token losses near 0, which a difference of large numbers would lose."""
    hidden = torch.tensor([[100.0], [100.0], [-100.0], [0.0]], device=device)
    weight = torch.tensor([[0.0], [1.0], [-0.9]], device=device)
    labels = torch.tensor([1, 0, 1, 2], device=device)
    result = compute(path, hidden, weight, labels, reduction="none")
    # Logits (0, 100, -90): ce = 0, 100; (0, -100, 90): 190; (0, 0, 0): log 3.
    expected = torch.tensor([0.0, 100.0, 190.0, 1.0986123])
    torch.testing.assert_close(result.per_token.cpu(), expected)
    # Of equal logits the first one is the largest.
    assert result.correct.tolist() == [True, False, False, False]
    assert compute(path, hidden[3:], weight, 0 * labels[3:]).correct.tolist() == [True]


def test_tanh(device):
    """The kernels' own tanh, through the cap: z = c tanh(x / c) against float64."""
    x = torch.cat([torch.linspace(-9, 9, 501), torch.logspace(-8, 0, 50)]).to(device)
    loss = kernels.linear_cross_entropy_fwd(
        torch.ones(1, 1, device=device), torch.cat([x, x[:1] * 0])[:, None],
        torch.tensor([len(x)], device=device), torch.ones(1, device=device), None, -100, 1.0, 1.0,
        True, True, True, False,
    )  # fmt: skip
    z = torch.tanh(torch.cat([x, x[:1] * 0]).double())
    p = torch.softmax(z, 0)
    p[-1] -= 1
    torch.testing.assert_close(loss[4].double(), p * (1 - z.square()), rtol=2e-6, atol=1e-9)


# -- what takes no part, and what may not be ------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, interpreting
@both_paths
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("t", [9, 40])
def test_ignored_rows_take_no_part(t, reduction, path, device):
    inputs = problem(t, 140, 33, bias=True)
    ignored = inputs[2] == -100
    assert 0 < ignored.sum() < t
    broken = tuple(x.clone() for x in inputs)
    broken[0][ignored] = torch.nan
    broken[3][ignored] = torch.inf
    fn = lambda *args, **options: compute(path, *args, **options)
    results = [
        value_and_grads(fn, tuple(x.to(device) for x in given), reduction=reduction)
        for given in (inputs, broken)
    ]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
    assert not results[0][2][ignored.to(device)].any()


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, interpreting
@both_paths
def test_nan_stays_in_its_row(path, device):
    hidden, weight, labels, weights, _ = (
        x if x is None else x.to(device) for x in problem(9, 140, 33)
    )
    hidden[1, 5] = torch.nan
    result = compute(path, hidden, weight, labels, weights, reduction="none")
    assert result.loss.isnan().tolist() == [i == 1 for i in range(9)]
    assert not result.correct[1]
    assert compute(path, hidden, weight, labels, weights).loss.isnan()
    leaf = hidden.requires_grad_()
    (grad,) = torch.autograd.grad(compute(path, leaf, weight, labels).loss, leaf)
    assert grad.isnan().any(1).tolist() == [i == 1 for i in range(9)]


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("label", [140, -1, 2**40])
def test_label_that_is_none_gives_nan(label, device):
    """The kernels, as on CUDA a look at the labels would wait for the device."""
    hidden, weight, labels, *_ = problem(9, 140, 33)
    labels[4] = label
    leaf = hidden.to(device).requires_grad_()
    result = compute(False, leaf, weight.to(device), labels.to(device), reduction="none")
    assert result.loss.isnan().tolist() == [i == 4 for i in range(9)]
    (grad,) = torch.autograd.grad(result.loss.sum(), leaf)
    assert grad.isnan().any(1).tolist() == [i == 4 for i in range(9)]


def test_strided_inputs(device):
    hidden, weight, labels, weights, _ = problem(9, 140, 33)
    wide = torch.stack([hidden, hidden], 2)[..., 0]
    table = weight.T.contiguous().T
    every_other = torch.stack([labels, labels], 1)[:, 0]
    for path in MODULES:
        check(path, (wide, table, every_other, weights[:1].expand(9), None), device)


def test_head_that_is_a_module():
    hidden, _, labels, *_ = problem(9, 140, 33)
    head = torch.nn.Linear(33, 140)
    with pytest.raises(TypeError, match=r"tensor of the head: got the module Linear; pass its"):
        linear_cross_entropy(hidden, head, labels)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operators_of_the_portable_path(reduction):
    """They are operators as the kernels are, with the right fakes."""
    inputs = problem(9, 140, 33, torch.bfloat16, bias=True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for whole in (False, True):
        arguments = (*inputs, -100, 0.5, 3.0, True, True, True, whole)
        operator = torch.ops.fastalign.linear_cross_entropy_portable_fwd.default
        used = checks if not whole else checks[:2]  # rows that do not count are scratch
        torch.library.opcheck(operator, arguments, test_utils=used)
        _, _, dhidden, dweight, _, scale = operator(*arguments)
    backward = (scale, dhidden, scale, torch.bfloat16)
    operator = torch.ops.fastalign.linear_cross_entropy_portable_bwd.default
    torch.library.opcheck(operator, backward, test_utils=checks)
    backward = (scale, dweight, inputs[0], inputs[2], scale, -100, torch.bfloat16)
    operator = torch.ops.fastalign.linear_cross_entropy_portable_bwd_weight.default
    torch.library.opcheck(operator, backward, test_utils=checks)


@both_paths
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vmap_of_grad_by_both_paths(reduction, path, device):
    hidden, weight, labels, weights, _ = (
        x if x is None else x.to(device) for x in problem(9, 140, 33)
    )
    batch = torch.stack([hidden, hidden.flip(0)])

    def loss(fn):
        return lambda h, w: fn(h, w, labels, weights, reduction=reduction, details=True).loss.sum()

    def fused(*args, details, **options):
        return compute(path, *args, **options)

    found, expected = (
        torch.func.vmap(torch.func.grad(loss(fn), (0, 1)), (0, None))(batch, weight)
        for fn in (fused, reference)
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
