"""What every op keeps as a citizen of PyTorch: compile, export, transforms, autocast, no waiting.

One table, and the inputs of `fastalign.testing.cases`. Accuracy and what is special to an op stand
in the op's own file.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _emulated import HadamardReweightEmulated, emulated
from _emulated import kernels as emulated_kernels
from _paths import compiled
from fastalign_kernels import calibrate as calibrate_kernels
from fastalign_kernels import contrast_weights as contrast_kernels
from fastalign_kernels import hadamard_reweight as hadamard_kernels
from fastalign_kernels import label_logits as label_kernels
from fastalign_kernels import linear_cross_entropy as entropy_kernels
from fastalign_kernels import native
from fastalign_kernels import structure_distill as structure_kernels
from fastalign_kernels import syrk as syrk_kernels
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fastalign as fa
from fastalign import reference
from fastalign.ops.calibrate import Calibrate, CalibrateNative
from fastalign.ops.contrast_weights import fused as fused_contrast_weights
from fastalign.ops.hadamard_reweight import HadamardReweight, HadamardReweightNative
from fastalign.ops.label_logits import LabelLogits, LabelLogitsNative
from fastalign.ops.linear_cross_entropy import compute as compute_entropy
from fastalign.ops.structure_distill import (
    StructureDistill,
    StructureDistillNative,
    StructureDistillPortable,
    compute,
)
from fastalign.ops.syrk import Syrk
from fastalign.testing import cases, cotangent_like
from fastalign.testing.accuracy import relative_error
from fastalign.testing.cases import DTYPES

Inputs = tuple[Any, ...]
Calls = list[tuple[OpOverload, Inputs]]


@dataclass(frozen=True)
class Op:
    """One op; every callable takes the inputs of its cases.

    Args:
        name: As in `fastalign.testing.cases`, and of its files.
        public: The function that users call.
        fused: The same through the autograd.Function, which on CPU `public` may pass by.
        plain: The reference.
        kernels: The module of its operators.
        raw: Calls of all of its operators, made from their module and the inputs.
        leaves: Positions of the inputs that get a gradient, where they are tensors; none of an op
            that gives constants.
        samples: For each case that is tested here, one a variant: its shape, the variant, and the
            positions of the inputs whose first dimension is that of the batch; none where a batch
            cannot be doubled, as with packed rows.
        unbatched: Positions of the inputs that vmap may not batch, such as offsets.
        dtypes: Of the inputs; where another is asked for, the first.
    """

    name: str
    public: Callable[..., Tensor]
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    kernels: Any
    raw: Callable[..., Calls]
    leaves: tuple[int, ...]
    samples: tuple[tuple[tuple[int, ...], str, tuple[int, ...]], ...]
    unbatched: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES

    @property
    def path(self) -> str:
        """Of the compiled kernels: "native", or "emulated" for those of CUDA on the CPU."""
        return {id(native): "native", id(emulated_kernels): "emulated"}.get(id(self.kernels), "")


def _raw_hadamard(kernels: Any, h: Tensor, w: Tensor) -> Calls:
    backward = [(kernels.hadamard_reweight_bwd, (h, h, w, n)) for n in (True, False)]
    return [(kernels.hadamard_reweight_fwd, (h, w)), *backward]


def _raw_label(
    kernels: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
) -> Calls:
    dy = torch.ones_like(labels, dtype=torch.float32)
    return [
        (kernels.label_logits_fwd, (hidden, weight, labels, bias)),
        (kernels.label_logits_bwd_hidden, (dy, weight, labels)),
        (kernels.label_logits_bwd_weight, (dy, hidden, labels, len(weight))),
    ]


def _raw_calibrate(kernels: Any, x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor) -> Calls:
    return [
        (kernels.calibrate_fwd, (x, mask, scale, shift)),
        (kernels.calibrate_bwd, (x, x, mask, scale)),
    ]


def _raw_contrast(kernels: Any, delta: Tensor, cu_seqlens: Tensor | None) -> Calls:
    return [(kernels.contrast_weights_fwd, (delta, cu_seqlens, 1.0, 5.0, 3))]


def _entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, bias: Tensor | None
) -> Tensor:
    return fa.losses.linear_cross_entropy(
        hidden, weight, labels, token_weights=weights, bias=bias, reduction=_reduction(bias)
    )


def _fused_entropy(*inputs: Any) -> Tensor:
    return compute_entropy(False, *inputs, reduction=_reduction(inputs[4])).loss


def _plain_entropy(*inputs: Any) -> Tensor:
    return reference.linear_cross_entropy(*inputs, reduction=_reduction(inputs[4]))


def _reduction(bias: Tensor | None) -> str:
    """Both Functions of the op have a sample: the one with a bias is not reduced."""
    return "mean" if bias is None else "none"


def _raw_entropy(
    kernels: Any,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    bias: Tensor | None,
) -> Calls:
    operator = kernels.linear_cross_entropy_fwd
    inputs = (hidden, weight, labels, weights, bias, -100, 0.5, 3.0)
    forward = [
        (operator, (*inputs, False, False, False, False)),
        (operator, (*inputs, True, True, True, False)),
        (operator, (*inputs, True, True, False, True)),
    ]
    _, _, dhidden, dz, _, scale = operator(*forward[-1][1])
    backward = (scale, dz, hidden, labels, scale, -100, weight.dtype)
    return [
        *forward[: 3 if hidden.dtype == torch.float32 else 2],
        (kernels.linear_cross_entropy_bwd, (scale, dhidden, scale, hidden.dtype)),
        (kernels.linear_cross_entropy_bwd_weight, backward),
    ]


def _structure(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return fa.losses.structure_distill(student, teacher, cu_seqlens=cu_seqlens)


def _fused_structure(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return compute(StructureDistill, student, teacher, cu_seqlens)


def _raw_structure(
    kernels: Any, student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None
) -> Calls:
    images = student.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    longest = student.shape[1] if cu_seqlens is None else 35
    h, g = (x.reshape(-1, x.shape[-1]) for x in (student, teacher))
    tail = (cu_seqlens, images, longest, True, "keep")
    operator = kernels.structure_distill_fwd
    forward = [(operator, (h, g, *tail, keep)) for keep in range(2 if kernels is native else 3)]
    losses, *kept = operator(*forward[1][1])
    backward = (losses, h, *kept, cu_seqlens, longest, True)
    return [*forward, (kernels.structure_distill_bwd, backward)]


def _symmetric(y: Tensor | None) -> Tensor | None:
    """What syrk asks of y, so that a NaN or a step in one entry is one in its mirror image."""
    return None if y is None else (y + y.mT) / 2


def _syrk(x: Tensor, y: Tensor | None) -> Tensor:
    return fa.ops.syrk(x, _symmetric(y), alpha=0.5, beta=0.0 if y is None else -2.0)


def _fused_syrk(x: Tensor, y: Tensor | None) -> Tensor:
    return Syrk.apply(x, _symmetric(y), 0.5, -2.0, x.dtype)


def _plain_syrk(x: Tensor, y: Tensor | None) -> Tensor:
    return reference.syrk(x, _symmetric(y), 0.5, -2.0)


def _raw_syrk(kernels: Any, x: Tensor, y: Tensor | None) -> Calls:
    dtypes = dict.fromkeys((x.dtype, torch.float32))
    return [(kernels.syrk_fwd, (x, y, 0.5, -2.0, dtype)) for dtype in dtypes]


# A new op is one more entry, and then passes everything below.
OPS = [
    Op(
        "hadamard_reweight",
        fa.ops.hadamard_reweight,
        HadamardReweight.apply,
        reference.hadamard_reweight,
        hadamard_kernels,
        _raw_hadamard,
        leaves=(0, 1),
        samples=(((2, 3, 7), "", (0, 1)), ((2, 3, 33), "shared", (0,))),
    ),
    Op(
        "label_logits",
        fa.ops.label_logits,
        LabelLogits.apply,
        reference.label_logits,
        label_kernels,
        _raw_label,
        leaves=(0, 1, 3),
        samples=(((6, 4, 7), "", (0, 2)), ((40, 2, 129), "bias", (0, 2))),
    ),
    Op(
        "calibrate",
        fa.ops.calibrate,
        Calibrate.apply,
        reference.calibrate,
        calibrate_kernels,
        _raw_calibrate,
        leaves=(0, 2, 3),
        samples=(((2, 3, 7), "", (0, 1)), ((2, 9, 33), "float32", (0, 1))),
    ),
    Op(
        "contrast_weights",
        fa.losses.contrast_weights,
        fused_contrast_weights,
        reference.contrast_weights,
        contrast_kernels,
        _raw_contrast,
        leaves=(),
        samples=(((127,), "", (0,)), ((129, 5), "packed", ())),
        unbatched=(1,),
    ),
    Op(
        "linear_cross_entropy",
        _entropy,
        _fused_entropy,
        _plain_entropy,
        entropy_kernels,
        _raw_entropy,
        leaves=(0, 1, 4),
        samples=(((9, 5, 127), "", (0, 2, 3)), ((9, 129, 33), "bias", (0, 2, 3))),
    ),
    Op(
        "structure_distill",
        _structure,
        _fused_structure,
        reference.structure_distill,
        structure_kernels,
        _raw_structure,
        leaves=(0,),
        samples=(((2, 7, 65, 127), "", (0, 1)), ((5, 35, 33, 17), "ragged", ())),
        unbatched=(2,),
    ),
    Op(
        "syrk",
        _syrk,
        _fused_syrk,
        _plain_syrk,
        syrk_kernels,
        _raw_syrk,
        leaves=(0, 1),
        samples=(((2, 7, 33), "", (0,)), ((2, 65, 65), "square", (0, 1))),
    ),
]


def _portable_structure(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return compute(StructureDistillPortable, student, teacher, cu_seqlens)


def _native_structure(student: Tensor, teacher: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return compute(StructureDistillNative, student, teacher, cu_seqlens)


def _compiled(name: str, fused: Callable[..., Tensor], **changes: Any) -> Op:
    """The op by the compiled kernels, which `public` takes above; and without them."""
    (op,) = (op for op in OPS if op.name == name)
    return replace(op, **{"public": op.plain, "fused": fused, "kernels": native, **changes})


COMPILED = [
    _compiled("hadamard_reweight", HadamardReweightNative.apply),
    _compiled("hadamard_reweight", HadamardReweightEmulated.apply, kernels=emulated_kernels),
    _compiled("label_logits", LabelLogitsNative.apply),
    _compiled("calibrate", CalibrateNative.apply),
    _compiled(
        "structure_distill",
        _native_structure,
        public=_portable_structure,
        samples=(((2, 7, 65, 127), "", (0, 1)), ((4, 35, 66, 17), "ragged", ())),
        dtypes=(torch.bfloat16,),
    ),
]


@dataclass(frozen=True)
class Sample:
    """One case of one op."""

    op: Op
    shape: tuple[int, ...]
    variant: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return "-".join(part for part in (self.op.name, self.variant, self.op.path) if part)

    def inputs(self, device: str, dtype: torch.dtype = torch.float32) -> Inputs:
        dtype = dtype if dtype in self.op.dtypes else self.op.dtypes[0]
        wanted = (self.shape, self.variant, dtype)
        (case,) = (c for c in cases(self.op.name) if (c.shape, c.variant, c.dtype) == wanted)
        return case.inputs(device)

    def raw(self, inputs: Inputs) -> Calls:
        return self.op.raw(self.op.kernels, *inputs)

    def twice(self, inputs: Inputs) -> Inputs:
        """The inputs of two such batches."""
        return tuple(torch.cat([x, x]) if i in self.rows else x for i, x in enumerate(inputs))

    def leaves(self, inputs: Inputs) -> tuple[int, ...]:
        return tuple(i for i in self.op.leaves if isinstance(inputs[i], Tensor))

    def value_and_grads(self, fn: Callable[..., Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
        """`fn` and the gradients of its leaves, in their order, for one fixed cotangent."""
        leaves = self.leaves(inputs)
        arguments = [
            x.detach().clone().requires_grad_() if i in leaves else x for i, x in enumerate(inputs)
        ]
        out = fn(*arguments)
        if leaves:
            out.backward(cotangent_like(out))  # checkpointing takes nothing else
        return out.detach(), *(arguments[i].grad for i in leaves)


SAMPLES = [Sample(op, *sample) for op in OPS for sample in op.samples]
ON_CPU = [Sample(op, *sample) for op in COMPILED for sample in op.samples]


MARKS = {"": (), "native": (compiled(),), "emulated": (emulated,)}


def marked(samples: list[Sample]) -> list[Any]:
    """Parameters; those of the compiled kernels are skipped where there are none."""
    return [pytest.param(s, id=str(s), marks=MARKS[s.op.path]) for s in samples]


every_sample = pytest.mark.parametrize("sample", marked([*SAMPLES, *ON_CPU]))
every_cuda_sample = pytest.mark.parametrize("sample", marked(SAMPLES))
every_differentiable = pytest.mark.parametrize(
    "sample", marked([sample for sample in (*SAMPLES, *ON_CPU) if sample.op.leaves])
)
every_constant = pytest.mark.parametrize(
    "sample", marked([sample for sample in SAMPLES if not sample.op.leaves])
)
both_paths = pytest.mark.parametrize("path", ["public", "fused"])


def bit_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(first, second, strict=True))


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal but for the rounding of float32 sums and of the type, relative to the largest."""
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        rounding = torch.finfo(x.dtype).eps if x.dtype in DTYPES[1:] else 0.0
        assert relative_error(x, y.double()) <= 4e-6 + rounding


def test_every_op_is_in_the_table():
    folder = Path(fa.ops.__file__).parent
    assert sorted(op.name for op in OPS) == sorted(p.stem for p in folder.glob("[!_]*.py"))
    for op in OPS:
        operators = {x for x in vars(op.kernels).values() if isinstance(x, OpOverload)}
        samples = [sample for sample in SAMPLES if sample.op is op]
        assert operators == {x for s in samples for x, _ in s.raw(s.inputs("cpu"))}


@compiled()
def test_every_compiled_operator_is_in_the_table():
    operators = {x for x in vars(native).values() if isinstance(x, OpOverload)}
    of_cuda_alone = {native.inverse_norms}
    samples = [sample for sample in ON_CPU if sample.op.path == "native"]
    assert operators - of_cuda_alone == {x for s in samples for x, _ in s.raw(s.inputs("cpu"))}


@pytest.mark.parametrize(
    "op", [pytest.param(o, id=f"{o.name}-{o.path}", marks=MARKS[o.path]) for o in COMPILED]
)
def test_compiled_operators_have_the_schemas_of_the_others(op):
    """Names, types and order of arguments and returns; a default stands in neither."""
    found = 0
    for operator in (x for x in vars(op.kernels).values() if isinstance(x, OpOverload)):
        if not operator._schema.name.startswith(f"fastalign::{op.name}_"):
            continue
        (other,) = (o for o in OPS if o.name == op.name)
        triton = getattr(other.kernels, operator._schema.name.removeprefix("fastalign::"))
        mine, its = str(operator._schema), str(triton._schema)
        assert mine.replace(f".{operator._overloadname}(", "(") == its
        found += 1
    assert found >= 2


@every_sample
def test_opcheck(sample, device):
    for operator, arguments in sample.raw(sample.inputs(device, torch.bfloat16)):
        # In bfloat16, because float32 hides a fake with the wrong dtype. The tiles that ragged
        # images may have but do not are scratch, which two runs leave different.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        if sample.variant != "ragged":
            checks += ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(operator, arguments, test_utils=checks)


# -- compile and export --------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@both_paths
@every_sample
def test_compiles_whole(sample, path, dynamic, device):
    torch._dynamo.reset()
    fn = getattr(sample.op, path)

    def scaled(first, *rest):
        return fn(2 * first, *rest) + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scaled, fullgraph=True, backend=counter, dynamic=dynamic)
    inputs, frames = sample.inputs(device), []
    for batch in (inputs, sample.twice(inputs)):
        expected = sample.value_and_grads(scaled, batch)
        assert_close(sample.value_and_grads(compiled, batch), expected)
        frames.append(counter.frame_count)
    # The first call may count twice: torch starts again where a float must be a constant.
    assert frames[1] - frames[0] == (1 if sample.rows and not dynamic else 0)


@every_sample
def test_exports(sample, device):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return sample.op.fused(*inputs)

    inputs = sample.inputs(device)
    n = torch.export.Dim("n", min=2)
    dims = tuple({0: n} if i in sample.rows else None for i in range(len(inputs)))
    program = torch.export.export(Module(), inputs, dynamic_shapes={"inputs": dims})
    assert f"fastalign.{sample.op.name}" in str(program.graph)
    for batch in (inputs, sample.twice(inputs)):
        assert torch.equal(program.module()(*batch), sample.op.fused(*batch))


# -- function transforms -------------------------------------------------------------------------


def objective(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar that is not the same in every element, nor linear."""

    def loss(*inputs: Any) -> Tensor:
        out = fn(*inputs).float()
        return (out.square() * (2 + cotangent_like(out))).sum()

    return loss


@every_differentiable
def test_func_grad(sample, device):
    inputs = sample.inputs(device)
    fused, plain = (
        torch.func.grad(objective(fn), sample.leaves(inputs))(*inputs)
        for fn in (sample.op.fused, sample.op.plain)
    )
    assert_close(fused, plain)


def batchings(op: Op, inputs: Inputs) -> list[tuple[int | None, ...]]:
    """in_dims: every tensor, in front and at the back; then each tensor alone."""
    places = range(len(inputs))
    batched = {i for i in places if isinstance(inputs[i], Tensor) and i not in op.unbatched}
    every = [tuple(dim if i in batched else None for i in places) for dim in (0, -1)]
    return every + [tuple(0 if i == j else None for i in places) for j in sorted(batched)]


@every_differentiable
def test_vmap_of_grad(sample, device):
    inputs = sample.inputs(device)
    for in_dims in batchings(sample.op, inputs):
        batch = tuple(
            x if dim is None else torch.stack([x, x.flip(0), x], dim)
            for x, dim in zip(inputs, in_dims, strict=True)
        )
        fused, plain = (
            torch.func.vmap(torch.func.grad(objective(fn), sample.leaves(inputs)), in_dims)
            for fn in (sample.op.fused, sample.op.plain)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no slow fall-back
            warnings.filterwarnings("ignore", module="triton")  # of the interpreter, about NumPy
            found = fused(*batch)
        assert_close(found, plain(*batch))


@every_constant
def test_constants_have_no_gradient(sample, device):
    inputs = sample.inputs(device)
    leaf = inputs[0].clone().requires_grad_()
    for fn in (sample.op.public, sample.op.fused):
        assert not fn(leaf, *inputs[1:]).requires_grad


@every_constant
def test_vmap_of_grad_sees_a_constant(sample, device):
    """The gradient of <x, f(x)> is f(x), of a batch and by itself."""

    def product(x, *rest):
        return (x * sample.op.fused(x, *rest)).sum()

    inputs = sample.inputs(device)
    assert_close((torch.func.grad(product)(*inputs),), (sample.op.plain(*inputs),))
    for in_dims in batchings(sample.op, inputs):
        batch = tuple(
            x if dim is None else torch.stack([x, x.flip(0), x], dim)
            for x, dim in zip(inputs, in_dims, strict=True)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no slow fall-back
            warnings.filterwarnings("ignore", module="triton")  # of the interpreter, about NumPy
            found = torch.func.vmap(torch.func.grad(product), in_dims)(*batch)
        assert_close((found,), (torch.func.vmap(sample.op.plain, in_dims)(*batch),))


@every_differentiable
def test_second_derivative_is_refused(sample, device):
    inputs = [x.clone() if isinstance(x, Tensor) else x for x in sample.inputs(device)]
    leaves = [inputs[i].requires_grad_() for i in sample.leaves(inputs)]
    grads = torch.autograd.grad(objective(sample.op.fused)(*inputs), leaves, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward(retain_graph=True)


@every_differentiable
def test_second_derivative_of_torch_func_is_refused(sample, device):
    inputs, leaves = sample.inputs(device), sample.leaves(sample.inputs(device))

    def slope(*inputs):
        grads = torch.func.grad(objective(sample.op.fused), leaves)(*inputs)
        return sum(grad.sum() for grad in grads)

    with pytest.raises(RuntimeError, match="once"):
        torch.func.grad(slope, leaves)(*inputs)


# -- where training calls it ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both_paths
@every_sample
def test_autocast_changes_nothing(sample, path, dtype, device):
    inputs = sample.inputs(device, dtype)
    fn = getattr(sample.op, path)
    expected = sample.value_and_grads(fn, inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = sample.value_and_grads(fn, inputs)
    assert bit_equal(found, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
@both_paths
@every_differentiable
def test_activation_checkpointing(sample, path, use_reentrant, device):
    inputs, runs = sample.inputs(device), []

    def block(*inputs):
        runs.append(1)
        return getattr(sample.op, path)(2 * inputs[0], *inputs[1:])

    def checkpointed(*inputs):
        return checkpoint(block, *inputs, use_reentrant=use_reentrant)

    expected = sample.value_and_grads(block, inputs)
    runs.clear()
    assert bit_equal(sample.value_and_grads(checkpointed, inputs), expected)
    assert len(runs) == 2  # forward, and again in backward


@both_paths
@every_sample
def test_runs_are_bit_equal_and_inputs_stay(sample, path, device):
    fn, inputs = getattr(sample.op, path), sample.inputs(device)
    arguments = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    leaves = [arguments[i].requires_grad_() for i in sample.leaves(inputs)]
    runs = []
    for _ in range(3):
        out = fn(*arguments)
        dout = cotangent_like(out)
        grads = torch.autograd.grad(out, leaves, dout) if leaves else ()
        runs.append((out.detach(), *grads))
        assert torch.equal(dout, cotangent_like(out))
    assert bit_equal(runs[0], runs[1]) and bit_equal(runs[0], runs[2])
    for x, kept in zip(arguments, inputs, strict=True):
        if isinstance(x, Tensor):
            # Bits, not versions alone: a kernel writes without telling autograd.
            assert x._version == 0 and torch.equal(x.detach(), kept)


@pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")  # numpy, interpreting
@every_differentiable
def test_nan_in_nan_out(sample, device):
    inputs = sample.inputs(device)
    assert all(x.isfinite().all() for x in sample.value_and_grads(sample.op.fused, inputs))
    for i in sample.leaves(inputs):
        for part in (slice(1), slice(None)):  # the first column, then all of it
            broken = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
            broken[i][..., part] = float("nan")
            out = sample.op.fused(*broken)
            assert torch.equal(out.isnan(), sample.op.plain(*broken).isnan())
        assert out.isnan().any()
    leaves = [inputs[i].requires_grad_() for i in sample.leaves(inputs)]
    out = sample.op.fused(*inputs)
    for grad in torch.autograd.grad(out, leaves, torch.full_like(out, float("nan"))):
        assert grad.isnan().any()


# -- no wait for the device ----------------------------------------------------------------------


def outputs(calls: Calls) -> list[Tensor]:
    results = [operator(*arguments) for operator, arguments in calls]
    return [x for r in results for x in ((r,) if isinstance(r, Tensor) else r)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@every_cuda_sample
def test_fake_cuda_tensors(sample, dtype):
    """The CUDA branch and each operator: device, shape and dtype, and no value is looked at."""
    real = sample.inputs("cpu", dtype)
    expected = [sample.op.plain(*real), *outputs(sample.raw(real))]
    with FakeTensorMode():
        inputs = tuple(
            torch.empty(x.shape, dtype=x.dtype, device="cuda") if isinstance(x, Tensor) else x
            for x in real
        )
        found = [sample.op.public(*inputs), *outputs(sample.raw(inputs))]
        with pytest.raises(DataDependentOutputException):
            found[0].sum().item()  # what the mode says to a wait
    for x, known in zip(found, expected, strict=True):
        assert (x.device.type, x.shape, x.dtype) == ("cuda", known.shape, known.dtype)


@every_sample
def test_gradient_of_meta_tensors(sample):
    """Both passes of the Function; meta tensors have no value that could be waited for."""
    inputs = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in sample.inputs("cpu"))
    out, *grads = sample.value_and_grads(sample.op.fused, inputs)
    assert out.is_meta
    for i, grad in zip(sample.leaves(inputs), grads, strict=True):
        assert grad.is_meta
        assert (grad.shape, grad.dtype) == (inputs[i].shape, inputs[i].dtype)


READS = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@every_sample
def test_launchers_read_no_value(sample, device, monkeypatch):
    calls = sample.raw(sample.inputs(device))
    expected = outputs(calls)

    def refuse(self: Tensor, *_: Any) -> None:
        raise AssertionError("a launcher reads a tensor on the host")

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, refuse)
        found = outputs(calls)
        with pytest.raises(AssertionError, match="reads a tensor"):
            float(found[0].sum())
    # Scratch space that no one reads may hold NaN, as torch.empty does here.
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
