"""The libraries behind packed attention, which need a GPU to compute.

Here they are stood in for by functions that compute, densely, what their documentation says, from
the arguments they are given. Where a library is installed, the stand-in has to have its signature,
and what the library itself does in Python is run with its compiled part stood in for.
"""

import importlib
import importlib.machinery
import inspect
import sys
from types import ModuleType

import pytest
import torch
from test_packed_attention import (
    KEEP,
    SHAPES,
    WHOLE,
    by_offsets,
    dense,
    inputs,
    visible,
)
from torch.nn.attention import varlen as torch_varlen

from fastalign.models import _packed_attention, _packed_limits
from fastalign.models import _packed_backends as libraries
from fastalign.models._packed import Segments, packed_attention

MASKS = {"gaps": KEEP, "no gaps": WHOLE}
# A window that hides something only where positions have no gaps; 11 hides nothing at all.
WINDOWS = [("gaps", None), ("gaps", 11), ("no gaps", 4), ("no gaps", 1)]


@pytest.fixture(autouse=True)
def no_obstacle(monkeypatch):
    """Let a named back end run where its device is missing."""
    monkeypatch.setattr(_packed_attention, "obstacle", lambda *args, **options: None)


def module(monkeypatch, name, **contents):
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(contents)
    monkeypatch.setitem(sys.modules, name, made)


def check_offsets(q, offsets, longest):
    total = int(offsets[-1])
    assert q.dim() == 3 and q.shape[0] == total  # (T, h, d)
    assert q.shape[-1] % 8 == 0
    assert offsets.dtype == torch.int32 and offsets[0] == 0
    assert longest == max(offsets.diff())


def attend_rows(q, k, v, offsets, scale, softcap=None, left=-1):
    """Dense attention in the layout (T, h, d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return dense(q, k, v, by_offsets(offsets, left), scale, softcap)[0].transpose(0, 1)


def expected(segments, q, k, v, window, scale=None, softcap=None):
    return dense(q, k, v, visible(segments, window), scale, softcap)


# -- torch's own -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", [True, False], ids=["grouping", "no grouping"])
@pytest.mark.parametrize(("mask", "window"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_varlen(monkeypatch, shape, mask, window, grouping):
    segments = Segments.from_mask(MASKS[mask])
    signature = inspect.signature(torch_varlen.varlen_attn)

    def stand_in(*args, **options):
        call = signature.bind(*args, **options).arguments
        check_offsets(call["query"], call["cu_seq_q"], call["max_q"])
        check_offsets(call["query"], call["cu_seq_k"], call["max_k"])
        left, right = call["window_size"]
        assert right == 0  # causal
        heads, key_heads = call["query"].shape[1], call["key"].shape[1]
        assert call.get("enable_gqa", False) is grouping
        assert grouping or heads == key_heads
        q, k, v = call["query"], call["key"], call["value"]
        return attend_rows(q, k, v, call["cu_seq_q"], call["scale"], left=left)

    monkeypatch.setattr(torch_varlen, "varlen_attn", stand_in)
    parameters = set(signature.parameters) - (set() if grouping else {"enable_gqa"})
    monkeypatch.setattr(libraries, "varlen_parameters", lambda: parameters)
    q, k, v = inputs(segments, *SHAPES[shape])
    out = packed_attention(q, k, v, segments, scale=0.6, window=window, backend="varlen")
    torch.testing.assert_close(out, expected(segments, q, k, v, window, 0.6))


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_takes_these_arguments(window):
    # On the meta device torch's own operator checks them and gives the shape.
    made = Segments.from_mask(WHOLE)
    meta = [x.to("meta") for x in (made.cu_seqlens, made.positions, made.rows)]
    segments = Segments(meta[0], made.lengths, *meta[1:], made.span, 0)
    q, k, v = (x.to("meta", torch.bfloat16) for x in inputs(made, 6, 2, 5, 5))
    out = packed_attention(q, k, v, segments, window=window, backend="varlen")
    assert out.shape == (1, 6, len(made.rows), 5) and out.dtype == torch.bfloat16


# -- flash-attn ------------------------------------------------------------------------------------


def flash_attn_varlen_func(  # flash-attn 2.8
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    check_offsets(q, cu_seqlens_q, max_seqlen_q)
    check_offsets(q, cu_seqlens_k, max_seqlen_k)
    left, right = window_size
    assert causal is True and right in (-1, 0) and dropout_p == 0.0
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    return attend_rows(q, k, v, cu_seqlens_q, softmax_scale, softcap or None, left)


def flash_attn_4_varlen_func(  # flash-attn-4 4.0.0b36, which has more options
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
    deterministic=False,
    return_lse=False,
):
    check_offsets(q, cu_seqlens_q, max_seqlen_q)
    check_offsets(q, cu_seqlens_k, max_seqlen_k)
    left, right = window_size
    assert causal is True and right == 0 and qv is None and not return_lse
    assert left is None or left >= 0
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    left = -1 if left is None else left
    out = attend_rows(q, k, v, cu_seqlens_q, softmax_scale, softcap or None, left)
    return out, None


def stand_in_flash_attn(monkeypatch, backend):
    module(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func, __path__=[])
    if backend == "flash-attn-4":
        function = {"flash_attn_varlen_func": flash_attn_4_varlen_func}
        module(monkeypatch, "flash_attn.cute", **function)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(("mask", "window"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["flash-attn", "flash-attn-4"])
def test_flash_attn(monkeypatch, backend, shape, mask, window, softcap):
    segments = Segments.from_mask(MASKS[mask])
    stand_in_flash_attn(monkeypatch, backend)
    q, k, v = inputs(segments, *SHAPES[shape])
    out = packed_attention(q, k, v, segments, window=window, softcap=softcap, backend=backend)
    torch.testing.assert_close(out, expected(segments, q, k, v, window, softcap=softcap))


@pytest.mark.parametrize("backend", ["flash-attn", "flash-attn-4"])
def test_flash_attn_is_deterministic_where_torch_is(monkeypatch, backend):
    stand_in_flash_attn(monkeypatch, backend)  # which compares what it is told with torch's setting
    segments = Segments.from_mask(KEEP)
    for setting in (False, True):
        torch.use_deterministic_algorithms(setting, warn_only=True)
        out = packed_attention(*inputs(segments), segments, backend=backend)
        assert out.shape == (1, 2, 20, 8)


def test_kernels_get_what_they_can_load(monkeypatch):
    """Channels side by side, each row of them at a multiple of 16 bytes."""
    segments, seen = Segments.from_mask(KEEP), []

    def stand_in(q, k, v, **options):
        seen.extend((q, k, v))
        return flash_attn_varlen_func(q, k, v, **options)

    module(monkeypatch, "flash_attn", flash_attn_varlen_func=stand_in)
    odd = torch.randn(1 + 2 * 20 * 9, dtype=torch.float64)
    queries = {
        "as it is": torch.randn(1, 20, 2, 8, dtype=torch.float64).transpose(1, 2),
        "of a fused projection": torch.randn(1, 20, 2, 24, dtype=torch.float64)[..., 8:16].mT.mT
        .transpose(1, 2),
        "begins at an odd place": odd[1 : 1 + 2 * 20 * 8].view(1, 2, 20, 8),
        "has odd rows": odd[: 2 * 20 * 9].view(1, 2, 20, 9)[..., :8],
        "has channels apart": torch.randn(1, 2, 8, 20, dtype=torch.float64).mT,
    }  # fmt: skip
    for name, query in queries.items():
        _, k, v = inputs(segments)
        out = packed_attention(query, k, v, segments, backend="flash-attn")
        torch.testing.assert_close(out, expected(segments, query, k, v, None), msg=name)
        kept = name in ("as it is", "of a fused projection")
        assert (seen[-3].data_ptr() == query.data_ptr()) is kept, name
    for x in seen:
        assert x.stride(-1) == 1
        assert x.storage_offset() % 8 == 0 and all(n % 8 == 0 for n in x.stride()[:-1])


# -- xformers --------------------------------------------------------------------------------------


class BlockDiagonalCausalMask:
    def __init__(self, lengths, window=0):
        self.lengths, self.window = lengths, window

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert all(q_seqlen)
        return cls(q_seqlen)

    def make_local_attention(self, window_size):
        return BlockDiagonalCausalMask(self.lengths, window_size)


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):
    assert isinstance(attn_bias, BlockDiagonalCausalMask) and p == 0.0
    assert query.shape[0] == 1 and query.shape == key.shape == value.shape
    offsets = torch.tensor([0, *attn_bias.lengths]).cumsum(0)
    # A query sees keys at an index greater than its own less the window.
    return attend_rows(query[0], key[0], value[0], offsets, scale, left=attn_bias.window - 1)[None]


def stand_in_xformers(monkeypatch):
    module(monkeypatch, "xformers")
    module(monkeypatch, "xformers.ops", memory_efficient_attention=memory_efficient_attention)
    module(monkeypatch, "xformers.ops.fmha")
    bias = {"BlockDiagonalCausalMask": BlockDiagonalCausalMask}
    module(monkeypatch, "xformers.ops.fmha.attn_bias", **bias)


@pytest.mark.parametrize(("mask", "window"), WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_xformers(monkeypatch, shape, mask, window):
    segments = Segments.from_mask(MASKS[mask])
    stand_in_xformers(monkeypatch)
    q, k, v = inputs(segments, *SHAPES[shape])
    out = packed_attention(q, k, v, segments, scale=0.6, window=window, backend="xformers")
    torch.testing.assert_close(out, expected(segments, q, k, v, window, 0.6))


def test_xformers_gets_no_empty_segment_and_one_mask(monkeypatch):
    stand_in_xformers(monkeypatch)
    segments = Segments(
        torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32),
        (0, 2, 0, 3, 0),
        torch.tensor([0, 1, 0, 1, 2]),
        torch.tensor([1, 1, 3, 3, 3]),
        *(3, 0),
    )
    made = []
    real = BlockDiagonalCausalMask.from_seqlens
    monkeypatch.setattr(
        BlockDiagonalCausalMask, "from_seqlens", lambda *a, **o: made.append(1) or real(*a, **o)
    )
    q, k, v = inputs(segments)
    for _ in range(2):  # layers
        out = packed_attention(q, k, v, segments, backend="xformers")
        torch.testing.assert_close(out, expected(segments, q, k, v, None))
    assert made == [1]


# -- the libraries themselves, where they are installed ------------------------------------------


@pytest.fixture
def real(monkeypatch):
    """Import a module of the library of a back end, or skip."""
    before, compiled = set(sys.modules), "flash_attn_2_cuda"

    def load(backend, name):
        if not _packed_limits._found(_packed_limits.LIBRARIES[backend].module):
            pytest.skip(f"{backend} is not installed")
        if backend == "flash-attn" and importlib.util.find_spec(compiled) is None:
            module(monkeypatch, compiled)  # only its callers are looked at
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            pytest.skip(f"{name} cannot be imported: {error}")

    yield load
    if getattr(sys.modules.get(compiled), "__file__", None) is None:
        for name in set(sys.modules) - before:  # imported with a stand-in: nobody else may use it
            if name.split(".")[0] == "flash_attn":
                del sys.modules[name]


def same_signature(stand_in, function):
    """Whether all that a stand-in takes is taken by the real one at the same place."""
    theirs = inspect.signature(function).parameters
    ours = inspect.signature(stand_in).parameters
    positional = [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    assert list(theirs)[: len(positional)] == positional
    for name, parameter in ours.items():
        assert theirs[name].default == parameter.default, name
    left = [p for name, p in theirs.items() if name not in ours]
    assert all(p.default is not p.empty for p in left)


def test_the_signature_of_flash_attn(real):
    same_signature(flash_attn_varlen_func, real("flash-attn", "flash_attn").flash_attn_varlen_func)


def test_the_signature_of_flash_attn_4(real):
    theirs = real("flash-attn-4", "flash_attn.cute").flash_attn_varlen_func
    same_signature(flash_attn_4_varlen_func, theirs)


def test_the_signature_of_xformers(real):
    theirs = real("xformers", "xformers.ops").memory_efficient_attention
    same_signature(memory_efficient_attention, theirs)
    theirs = real("xformers", "xformers.ops.fmha.attn_bias").BlockDiagonalCausalMask
    for name in ("from_seqlens", "make_local_attention"):
        same_signature(getattr(BlockDiagonalCausalMask, name), getattr(theirs, name))


class Compiled:
    """flash-attn's compiled module: dense, and with the checks of its C++ but those of devices."""

    @staticmethod
    def attend(q, k, v, offsets, scale, softcap, left):
        for x in (q, k, v):
            assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[1] % k.shape[1] == 0
        assert offsets.dtype == torch.int32 and offsets.is_contiguous()
        return attend_rows(q, k, v, offsets, scale, softcap or None, left)

    def varlen_fwd(self, q, k, v, out, cu_q, cu_k, *rest):
        _, _, _, _, max_q, _, p, scale, _, causal, left, right, softcap, _, _ = rest
        assert p == 0.0 and causal and right in (-1, 0) and max_q == max(cu_q.diff())
        attended = self.attend(q, k, v, cu_q, scale, softcap, left)
        lse = torch.zeros(q.shape[1], q.shape[0])
        return attended.contiguous(), lse, torch.empty(0), torch.zeros(2, dtype=torch.int64)

    def varlen_bwd(self, dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, *rest):
        _, _, _, _, scale, _, causal, left, _, softcap, _, _, _ = rest
        assert causal and dout.stride(-1) == 1
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            attended = self.attend(*leaves, cu_q, scale, softcap, left)
        for into, gradient in zip(
            (dq, dk, dv), torch.autograd.grad(attended, leaves, dout), strict=True
        ):
            into.copy_(gradient)
        return dq, dk, dv, lse


@pytest.mark.parametrize(
    ("mask", "options"),
    [("gaps", {}), ("gaps", {"softcap": 0.7}), ("no gaps", {"window": 4})],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attn_differentiates(monkeypatch, real, shape, mask, options):
    """Its Python layer, autograd function included, over a dense stand-in of its kernels."""
    interface = real("flash-attn", "flash_attn.flash_attn_interface")
    monkeypatch.setattr(interface, "flash_attn_gpu", Compiled())
    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        operator = getattr(interface, name)  # registered for CUDA alone
        body = getattr(operator, "_init_fn", operator)
        monkeypatch.setattr(interface, f"_wrapped{name}", body)
    segments = Segments.from_mask(MASKS[mask])
    q, k, v = (x.requires_grad_() for x in inputs(segments, *SHAPES[shape]))
    out = packed_attention(q, k, v, segments, backend="flash-attn", **options)
    true = expected(segments, q, k, v, options.get("window"), softcap=options.get("softcap"))
    torch.testing.assert_close(out, true)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(true, (q, k, v), cotangent))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_xformers_takes_these_arguments(monkeypatch, real, shape, window):
    """Its checks of shapes, strides and masks; its operators refuse nothing but the CPU."""
    ops, fmha = (real("xformers", f"xformers.{name}") for name in ("ops", "ops.fmha"))
    segments = Segments.from_mask(WHOLE)
    torch.use_deterministic_algorithms(False)  # else its flash kernels have no gradient
    calls = []

    def stand_in(query, key, value, attn_bias=None, scale=None):
        made = fmha.Inputs(query, key, value, attn_bias=attn_bias, scale=scale)
        made.validate_inputs()
        calls.extend((fmha.flash, fmha.cutlass))
        for part in (fmha.flash, fmha.cutlass):
            for operator in (part.FwOp, part.BwOp):
                reasons = operator.not_supported_reasons(made)
                here = ("device=cpu", "operator wasn't built", "requires device with capability")
                assert all(reason.startswith(here) for reason in reasons), reasons
        heads, total = query.shape[2], query.shape[1]
        bias = attn_bias.materialize((1, heads, total, total), dtype=torch.float64)
        q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
        return ((q @ k.mT * scale + bias).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", stand_in)
    q, k, v = inputs(segments, *SHAPES[shape], dtype=torch.float16)
    out = packed_attention(q, k, v, segments, scale=0.6, window=window, backend="xformers")
    torch.testing.assert_close(out, expected(segments, q, k, v, window, 0.6))
    assert len(calls) == 2
