"""Packed attention against a dense masked one in float64, and which back end is taken."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from fastalign.models import _packed_attention, _packed_limits
from fastalign.models._packed import (
    BACKENDS,
    Segments,
    attention_backend,
    obstacle,
    packed_attention,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUIET = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

# Kept tokens of five samples: gaps, none at all, one token, all, and a single late one.
KEEP = torch.tensor(
    [
        [1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    ],
    dtype=torch.bool,
)
# Segments without gaps, of which one begins late: here a window is one in tokens.
WHOLE = torch.arange(11) >= torch.tensor([[0], [11], [4], [10]])
SHAPES = {"plain": (2, 2, 8, 8), "grouped": (6, 2, 5, 5), "one-key-head": (3, 1, 7, 11)}


def inputs(segments, heads=2, key_heads=2, dim=8, width=8, dtype=torch.float64):
    total = sum(segments.lengths)
    shapes = ((heads, dim), (key_heads, dim), (key_heads, width))
    return [torch.randn(1, h, total, d, dtype=torch.float64).to(dtype) for h, d in shapes]


def visible(segments, window=None):
    """Who sees whom, (T, T), by comparing all pairs."""
    rows, p = segments.rows, segments.positions
    ahead = p[:, None] - p[None]
    seen = (rows[:, None] == rows[None]) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def dense(query, key, value, seen, scale=None, softcap=None):
    """Attention over a full mask, in float64; query (1, h, T, dh)."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), *(x.double().repeat_interleave(group, 1) for x in (key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def by_offsets(cu_seqlens, left=-1):
    """The causal block-diagonal mask of offsets, as the libraries define it: by token index.

    `left` tokens before its own are seen by each, all of them where it is negative.
    """
    total = int(cu_seqlens[-1])
    index = torch.arange(total)
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    ahead = index[:, None] - index[None]
    seen = (segment[:, None] == segment[None]) & (ahead >= 0)
    return seen if left < 0 else seen & (ahead <= left)


# -- segments ------------------------------------------------------------------------------------


def test_segments_of_a_mask():
    segments = Segments.from_mask(KEEP)
    assert segments.lengths == (6, 1, 11, 2)  # the second row keeps nothing
    assert segments.cu_seqlens.tolist() == [0, 6, 7, 18, 20]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.positions.tolist() == [0, 1, 6, 7, 9, 10, 3, *range(11), 2, 10]
    assert segments.rows.tolist() == [0] * 6 + [2] + [3] * 11 + [4] * 2
    assert segments.span == 11  # of the first and the fourth row: positions 0 to 10
    x = torch.randn(*KEEP.shape, 3)
    assert torch.equal(x[segments.rows, segments.positions], x[KEEP])
    assert Segments.from_mask(KEEP[[2, 4]]).span == 9  # 2 and 10


def test_where_a_window_is_one_in_tokens():
    whole, gaps = Segments.from_mask(WHOLE), Segments.from_mask(KEEP[2:])
    assert whole.lengths == (11, 7, 1) and whole.span == 11 and whole.gapped_span == 0
    assert whole.counts_tokens(1)
    # Rows 2 to 4: spans 1, 11 without gaps, and 9 with one. From 9 on only the second is cut.
    assert gaps.span == 11 and gaps.gapped_span == 9
    assert gaps.counts_tokens(9) and not gaps.counts_tokens(8)
    for segments, window in ((whole, 1), (whole, 4), (gaps, 9)):
        seen = by_offsets(segments.cu_seqlens, window - 1)
        assert torch.equal(seen, visible(segments, window))
    assert not torch.equal(by_offsets(gaps.cu_seqlens, 7), visible(gaps, 8))
    parts = (gaps.cu_seqlens, gaps.lengths, gaps.positions, gaps.rows)
    made = Segments(*parts, gaps.span)  # nothing is known of its gaps
    assert made.counts_tokens(11) and not made.counts_tokens(10)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)])
def test_segments_of_an_empty_mask(shape):
    segments = Segments.from_mask(torch.zeros(shape, dtype=torch.bool))
    assert segments.lengths == () and segments.span == 0
    assert segments.cu_seqlens.tolist() == [0] and segments.positions.shape == (0,)
    out = packed_attention(*inputs(segments, 4, 2, 8, 6), segments)
    assert out.shape == (1, 4, 0, 6)


def test_segments_are_checked():
    good = Segments.from_mask(KEEP)
    with pytest.raises(ValueError, match=r"keep must be a mask of torch.bool: got torch.int64"):
        Segments.from_mask(KEEP.long())
    with pytest.raises(ValueError, match=r"keep must have 2 dimension"):
        Segments.from_mask(KEEP[0])
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(5,\) of torch.int32"):
        Segments(good.cu_seqlens.long(), good.lengths, good.positions, good.rows, good.span)
    with pytest.raises(ValueError, match=r"positions must be \(20,\) of torch.int64"):
        Segments(good.cu_seqlens, good.lengths, good.positions[1:], good.rows, good.span)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 5, 10, 100])
def test_what_each_token_sees(window):
    segments = Segments.from_mask(KEEP)
    seen = visible(segments, window)
    first = segments.first_keys(window)
    assert first.tolist() == [row.nonzero()[0].item() for row in seen]
    blocks = torch.block_diag(*(mask.long() for mask in segments.masks(window))).bool()
    assert torch.equal(blocks, seen)
    assert segments.masks(window) is segments.masks(window)  # made once


# -- back ends that run here -----------------------------------------------------------------------


@QUIET
@torch.no_grad()
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 11])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex"])
def test_matches_the_dense_mask(backend, shape, window, softcap):
    segments = Segments.from_mask(KEEP)
    q, k, v = inputs(segments, *SHAPES[shape])
    options = {"scale": 0.6, "softcap": softcap}
    out = packed_attention(q, k, v, segments, window=window, backend=backend, **options)
    expected = dense(q, k, v, visible(segments, window), **options)
    # flex computes the cap in float32.
    error = 1e-6 if backend == "flex" and softcap else 1e-12
    torch.testing.assert_close(out, expected, rtol=error, atol=error)


@QUIET
@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(backend, dtype):
    segments = Segments.from_mask(KEEP)
    q, k, v = inputs(segments, 4, 2, dtype=dtype)
    for options in ({}, {"window": 4}, {"softcap": 0.7}):
        out = packed_attention(q, k, v, segments, backend=backend, **options)
        window, softcap = options.get("window"), options.get("softcap")
        expected = dense(q, k, v, visible(segments, window), softcap=softcap)
        assert out.dtype == dtype
        error = 8 * torch.finfo(dtype).eps  # outputs are averages of values of about 1
        torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)


def test_by_hand():
    # Two samples of 2 tokens. With keys 0 the weights are uniform: each query gives the mean of the
    # values it sees, 1 -> 1, (1 + 3) / 2 -> 2, then 10 -> 10 and (10 + 30) / 2 -> 20.
    segments = Segments.from_mask(torch.tensor([[True, True], [True, True]]))
    q, k = torch.randn(1, 1, 4, 3), torch.zeros(1, 1, 4, 3)
    v = torch.tensor([1.0, 3.0, 10.0, 30.0]).reshape(1, 1, 4, 1)
    assert packed_attention(q, k, v, segments).flatten().tolist() == [1.0, 2.0, 10.0, 20.0]
    assert packed_attention(q, k, v, segments, window=1).flatten().tolist() == [1, 3, 10, 30]
    one = Segments.from_mask(torch.ones(1, 4, dtype=torch.bool))
    out = packed_attention(q, k, v, one, window=2).flatten()
    torch.testing.assert_close(out, torch.tensor([1.0, 2.0, 6.5, 20.0]))  # pairs (3, 10), (10, 30)


def test_window_counts_positions_and_not_tokens():
    # Positions 0 and 3: one token apart, three positions apart.
    segments = Segments.from_mask(torch.tensor([[True, False, False, True]]))
    v = torch.tensor([2.0, 4.0]).reshape(1, 1, 2, 1)
    q = k = torch.zeros(1, 1, 2, 1)
    for window, expected in ((3, 4.0), (4, 3.0)):
        out = packed_attention(q, k, v, segments, window=window)
        assert out.flatten().tolist() == [2.0, expected]


def test_segments_without_tokens():
    # As a caller may build them: lengths 0, 2, 0, 3, 0.
    segments = Segments(
        torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32),
        (0, 2, 0, 3, 0),
        torch.tensor([0, 1, 0, 1, 2]),
        torch.tensor([1, 1, 3, 3, 3]),
        span=3,
    )
    q, k, v = inputs(segments)
    for window in (None, 2):
        out = packed_attention(q, k, v, segments, window=window)
        torch.testing.assert_close(out, dense(q, k, v, visible(segments, window)))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.5}])
def test_gradient(options):
    segments = Segments.from_mask(KEEP[:3, :8])
    tensors = [x.requires_grad_() for x in inputs(segments, 2, 1, 3, 2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: packed_attention(q, k, v, segments, **options), tensors
    )


def test_nothing_crosses_a_border():
    segments = Segments.from_mask(KEEP)
    q, k, v = inputs(segments, 4, 2)
    out = packed_attention(q, k, v, segments)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 7:18] = torch.randn_like(x[:, :, 7:18])  # the third segment
    other = packed_attention(*changed, segments)
    same = (out == other).all(1).all(-1)[0]
    assert same[:7].all() and same[18:].all() and not same[7:18].any()


def test_capped_attention_ignores_autocast():
    segments = Segments.from_mask(KEEP)
    q, k, v = inputs(segments, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = packed_attention(q, k, v, segments, softcap=0.7)
    assert torch.equal(inside, packed_attention(q, k, v, segments, softcap=0.7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("keep", "options"),
    [(KEEP, {}), (KEEP, {"window": 4}), (WHOLE, {"window": 4}), (KEEP, {"softcap": 0.7})],
    ids=["plain", "window over gaps", "window", "softcap"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_cuda(backend, dtype, shape, keep, options):
    segments = Segments.from_mask(keep.cuda())
    window, softcap = options.get("window"), options.get("softcap")
    request = {"windowed": window is not None, "softcap": softcap is not None}
    request["gaps"] = keep is KEEP
    torch.use_deterministic_algorithms(backend != "xformers", warn_only=True)
    why = None if backend == "auto" else obstacle(backend, CUDA, dtype, **request)
    if why:
        pytest.skip(f"{backend} {why}")
    made = inputs(segments, *SHAPES[shape], dtype=dtype)
    q, k, v = leaves = [x.cuda().requires_grad_() for x in made]
    out = packed_attention(q, k, v, segments, backend=backend, **options)
    expected = dense(q, k, v, visible(segments, window), softcap=softcap)
    assert out.dtype == dtype and out.device == q.device
    # Outputs are averages of values of about 1; compiled products of float32 may run in TF32.
    error = 4e-3 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, cotangent)
    true = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, gradient, exact in zip("qkv", found, true, strict=True):
        off = (gradient.double() - exact).norm() / exact.norm()
        assert off < error, f"gradient of {name} is off by {off:.1e}"


# -- which back end, and why not -------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(_packed_limits, "_import_error", lambda backend: None)
    torch.use_deterministic_algorithms(False)


def test_auto_on_the_cpu():
    for dtype in (torch.float32, torch.bfloat16):
        query = torch.zeros(1, 1, 1, 8, dtype=dtype)
        assert attention_backend(query) == "sdpa"
        assert attention_backend(query, window=4, softcap=1.0) == "sdpa"


@pytest.mark.parametrize("flash", [True, False], ids=["flash-attn", "no flash-attn"])
def test_auto_on_cuda(monkeypatch, hopper, flash):
    monkeypatch.setattr(_packed_limits, "_found", lambda name: name != "flash_attn" or flash)

    gaps, whole = Segments.from_mask(KEEP), Segments.from_mask(WHOLE)

    def query(dtype, dim=128):  # what is read of one, without the device
        return SimpleNamespace(device=CUDA, dtype=dtype, shape=(1, 8, 5, dim))

    for dtype in (torch.float16, torch.bfloat16):
        assert attention_backend(query(dtype)) == "varlen"
        assert attention_backend(query(dtype), window=11, segments=gaps) == "varlen"
        assert attention_backend(query(dtype), window=10, segments=gaps) == "sdpa"
        assert attention_backend(query(dtype), window=4, segments=whole) == "varlen"
        assert attention_backend(query(dtype), window=4) == "sdpa"
        assert attention_backend(query(dtype), softcap=50.0) == ("flash-attn" if flash else "sdpa")
        assert attention_backend(query(dtype, 512)) == "sdpa"
    assert attention_backend(query(torch.float32)) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert attention_backend(query(torch.float16)) == "sdpa"


GAPS = {"windowed": True, "gaps": True}


@pytest.mark.parametrize(
    ("backend", "dtype", "options", "why"),
    [
        ("varlen", torch.float32, {}, "does not take torch.float32"),
        ("varlen", torch.bfloat16, GAPS, "in tokens, not in positions"),
        ("varlen", torch.bfloat16, {"softcap": True}, "has no softcap"),
        ("varlen", torch.bfloat16, {"head_dim": 288}, "at most 256 channels, not 288"),
        ("flash-attn", torch.float32, {}, "does not take torch.float32"),
        ("flash-attn", torch.bfloat16, GAPS, "in tokens, not in positions"),
        ("flash-attn-4", torch.bfloat16, GAPS, "in tokens, not in positions"),
        ("flash-attn-4", torch.bfloat16, {"head_dim": 288}, "at most 256 channels, not 288"),
        ("xformers", torch.float64, {}, "does not take torch.float64"),
        ("xformers", torch.float32, {"softcap": True}, "has no softcap"),
        ("xformers", torch.bfloat16, GAPS, "in tokens, not in positions"),
        ("xformers", torch.float32, {"windowed": True}, "window only for float16 and bfloat16"),
        ("flex", torch.float64, {}, "does not take torch.float64"),
    ],
)
def test_obstacles_on_cuda(monkeypatch, hopper, backend, dtype, options, why):
    monkeypatch.setattr(_packed_limits, "_found", lambda name: True)
    assert why in obstacle(backend, CUDA, dtype, **options)
    for name in BACKENDS[1:]:
        assert obstacle(name, CUDA, torch.bfloat16) is None
        assert obstacle(name, CUDA, torch.bfloat16, windowed=True) is None  # without gaps


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "head_dim", "why"),
    [
        ("flash-attn-4", (8, 0), torch.bfloat16, 128, "needs a device of compute capability 9 or"),
        ("flash-attn-4", (9, 0), torch.bfloat16, 256, None),
        ("flash-attn-4", (10, 0), torch.bfloat16, 128, None),
        ("flash-attn-4", (10, 0), torch.bfloat16, 256, "at most 128 channels, not 256"),
        ("flash-attn-4", (12, 0), torch.bfloat16, 128, "needs a device of compute capability 9 or"),
        ("flash-attn", (7, 5), torch.float16, 128, "compute capability 8.0 or newer"),
        ("xformers", (7, 5), torch.float16, 512, None),
        ("xformers", (7, 5), torch.bfloat16, 128, "takes bfloat16 on devices of compute cap"),
        ("xformers", (9, 0), torch.float32, 512, None),
        ("xformers", (10, 0), torch.bfloat16, 256, None),
        ("xformers", (10, 0), torch.float32, 128, "takes only float16 and bfloat16 with heads"),
        ("xformers", (10, 0), torch.bfloat16, 512, "newer than compute capability 9.0"),
    ],
)
def test_obstacles_of_devices(monkeypatch, hopper, backend, capability, dtype, head_dim, why):
    monkeypatch.setattr(_packed_limits, "_found", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    found = obstacle(backend, CUDA, dtype, head_dim=head_dim)
    assert found is None if why is None else why in found


def test_xformers_has_no_deterministic_gradient(monkeypatch, hopper):
    monkeypatch.setattr(_packed_limits, "_found", lambda name: True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert "no deterministic gradient" in obstacle("xformers", CUDA, torch.bfloat16)
    assert obstacle("xformers", CUDA, torch.float32) is None  # its CUTLASS kernels have one
    with torch.no_grad():
        assert obstacle("xformers", CUDA, torch.bfloat16) is None


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Write a module of a library that is not imported yet, and is forgotten afterwards."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]

    def write(name, text):
        path = tmp_path.joinpath(*name.split("."), "__init__.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        forget()
        importlib.invalidate_caches()

    before = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "flash_attn"}
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("_found", "_import_error"):  # what they remember is of what is installed
        monkeypatch.setattr(_packed_limits, name, getattr(_packed_limits, name).__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield write
    forget()
    sys.modules.update(before)


def test_flash_attn_4_alone_is_no_flash_attn(package):
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    package("flash_attn.cute", "def flash_attn_varlen_func(): ...")
    assert importlib.util.find_spec("flash_attn") is not None  # the folder that holds it
    assert obstacle("flash-attn", CUDA, torch.bfloat16).startswith("not installed: pip install")
    assert obstacle("flash-attn-4", CUDA, torch.bfloat16) is None


def test_what_cannot_be_imported_is_passed_over(package):
    package("flash_attn", "import built_for_another_torch")
    why = obstacle("flash-attn", CUDA, torch.bfloat16)
    error = "ModuleNotFoundError: No module named 'built_for_another_torch'"
    assert why == f"cannot be imported ({error})"
    query = SimpleNamespace(device=CUDA, dtype=torch.bfloat16, shape=(1, 8, 5, 128))
    assert attention_backend(query, softcap=50.0) == "sdpa"
    package("flash_attn", "")  # a version without it
    assert "cannot be imported (AttributeError" in obstacle("flash-attn", CUDA, torch.bfloat16)
    package("flash_attn", "def flash_attn_varlen_func(): ...")
    assert attention_backend(query, softcap=50.0) == "flash-attn"


def test_old_torch_and_old_device_have_no_varlen(monkeypatch, hopper):
    parameters = {"query", "is_causal"}  # torch 2.10
    monkeypatch.setattr(_packed_attention.libraries, "varlen_parameters", lambda: parameters)
    assert "a newer torch is needed" in obstacle("varlen", CUDA, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "compute capability 8.0" in obstacle("varlen", CUDA, torch.float16)


@pytest.mark.parametrize("backend", ["varlen", "flash-attn", "flash-attn-4", "xformers"])
def test_a_named_back_end_runs_or_raises(monkeypatch, backend):
    segments = Segments.from_mask(KEEP)
    tensors = inputs(segments, dtype=torch.bfloat16)
    monkeypatch.setattr(_packed_limits, "_found", lambda name: True)
    message = f"backend '{backend}' cannot run .* CUDA devices only, not on cpu; .* takes 'sdpa'"
    with pytest.raises(ValueError, match=message):
        packed_attention(*tensors, segments, backend=backend)
    monkeypatch.setattr(_packed_limits, "_found", lambda name: False)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run .* not installed"):
        packed_attention(*tensors, segments, backend=backend)
    if backend != "varlen":
        why = obstacle(backend, CPU, torch.bfloat16)
        flag = "--no-build-isolation " if backend == "flash-attn" else ""
        assert why == f'not installed: pip install {flag}"fastalign[{backend}]"'


def test_bad_input():
    segments = Segments.from_mask(KEEP)
    q, k, v = inputs(segments, 4, 2)
    with pytest.raises(ValueError, match="backend must be one of 'auto', .*: got 'eager'"):
        packed_attention(q, k, v, segments, backend="eager")
    with pytest.raises(ValueError, match=r"one row of the 20 tokens .* got \(1, 4, 19, 8\)"):
        packed_attention(q[:, :, 1:], k, v, segments)
    with pytest.raises(ValueError, match=r"key and value must be \(1, hkv, 20, 8\)"):
        packed_attention(q, k[..., 1:], v, segments)
    with pytest.raises(ValueError, match="multiple of the heads of key: got 3 and 2"):
        packed_attention(q[:, 1:], k, v, segments)
    with pytest.raises(ValueError, match="value must have the dtype of query"):
        packed_attention(q, k, v.float(), segments)
    with pytest.raises(ValueError, match="query must have 4 dimension"):
        packed_attention(q[0], k, v, segments)
    with pytest.raises(ValueError, match="window must be above 0: got 0"):
        packed_attention(q, k, v, segments, window=0)
    with pytest.raises(ValueError, match="softcap must be above 0"):
        packed_attention(q, k, v, segments, softcap=-1.0)
    with pytest.raises(ValueError, match="segments must have the device of query"):
        packed_attention(*(x.to("meta") for x in (q, k, v)), segments)
