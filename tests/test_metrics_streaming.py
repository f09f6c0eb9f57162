"""MIR as a stream: order, chunks, memory, ranks, and the numbers of the released code."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from _mir_ranks import CASES, DIM, LAYERS, OUTLIERS, hidden_states, measure, shares
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastalign.metrics import (
    ModalityIntegrationRate,
    _stream,
    frechet_distance,
    modality_integration_rate,
)
from fastalign.reference import frechet as reference

WIDE = 1056  # above the width up to which sums are in float64


def states_of(metric: ModalityIntegrationRate) -> dict[str, int]:
    """Bytes of the states, by kind."""
    found: dict[str, int] = {}
    for name in metric._defaults:
        size = sum(part.numel() * part.element_size() for part in getattr(metric, name))
        found[name.split("_")[0]] = found.get(name.split("_")[0], 0) + size
    return found


def without_outliers(x: Tensor) -> Tensor:
    norms = x.norm(dim=1)
    return x[(norms - norms.median()).abs() <= 3 * norms.std()]


def exact(vision: Tensor, text: Tensor) -> Tensor:
    """The distance of one layer in float64, all rows at once."""
    vision, text = vision.double(), text.double()
    alpha = 1 / text.norm(dim=1).mean()
    v, t = (without_outliers(alpha * x) for x in (vision, text))
    return frechet_distance(v.mean(0), torch.cov(v.T), t.mean(0), torch.cov(t.T))


# Order and chunks


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(30, 1500), min_size=1, max_size=4),
    outliers=st.sampled_from(OUTLIERS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    d=st.integers(1, 12),
    narrow=st.booleans(),
)
@example(seed=0, sizes=[1], outliers="remove", dtype=torch.float32, d=3, narrow=True)
@settings(max_examples=25)
def test_order_and_chunks_do_not_matter(seed, sizes, outliers, dtype, d, narrow):
    torch.manual_seed(seed)
    rows = torch.randint(2, 3000, (2,)).tolist()
    if sizes == [1]:
        rows = [1400, 1300]
    # Spreads within a factor of four, so that the sums and not the covariance decide the error.
    std = 1 + 3 * torch.rand(2, d)
    vision, text = (
        (torch.randn(n, d) * s + 0.5 * i).to(dtype)
        for i, (n, s) in enumerate(zip(rows, std, strict=True))
    )
    for x in (vision, text):
        x[:: max(len(x) // 3, 100)] *= 8
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the covariance is singular")
        patch.setattr(_stream, "FLOAT64_DIM", 0 if narrow else 1024)
        expected = modality_integration_rate([vision], [text], outliers=outliers)
        vision, text = vision[torch.randperm(len(vision))], text[torch.randperm(len(text))]
        metric = ModalityIntegrationRate(1, d, outliers=outliers)
        at = step = 0
        while at < max(rows):
            part = slice(at, at + sizes[step % len(sizes)])
            metric.update([vision[part]], [text[part]])
            at, step = part.stop, step + 1
        # So few dimensions do not average out the rounding of float32 as wide layers do. Few rows
        # may coincide: MIR then is the logarithm of rounding.
        assert abs(metric.compute() - expected) <= (1e-5 if narrow else 1e-6) or expected < -6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 120.0])
def test_wide_layers_have_float32_sums(dtype, offset):
    # Spectra that fall by 1e3; at the offset, |mean|^2 is near 1e4 times the variance.
    std = torch.arange(1, WIDE + 1) ** -1.0
    mix = torch.linalg.qr(torch.randn(WIDE, WIDE))[0]
    vision, text = (
        ((torch.randn(n, WIDE) * std) @ mix * scale + offset / WIDE**0.5).to(dtype)
        for n, scale in ((5200, 1.0), (4100, 1.3))
    )
    vision[::50] *= 6
    expected = exact(vision, text).log10()
    metric = ModalityIntegrationRate(1, WIDE)
    for v, t in zip(vision.split(520), text.split(410), strict=True):
        metric.update([v], [t])
    assert metric.scatter_0[0].dtype == torch.float32
    assert metric.scatter_0[0].shape == (1, WIDE + 1, WIDE)
    assert abs(metric.compute() - expected) <= 1e-6


@pytest.mark.parametrize("offset", [0.0, 1.0, 3.0])
def test_raw_rows_are_summed_about_zero(offset, monkeypatch):
    # What half precision on a GPU does while |mean|^2 is below ten times the variance: float32
    # products of rows as they are, and no origin.
    monkeypatch.setattr(_stream, "FLOAT64_DIM", 0)
    monkeypatch.setattr(_stream, "_origin", lambda rows: torch.zeros(rows.shape[1]))
    vision, text = (
        (torch.randn(n, 48) * scale + offset).bfloat16() for n, scale in ((9000, 1.0), (8000, 1.2))
    )
    metric = ModalityIntegrationRate(1, 48)
    metric.update([vision], [text])
    assert not metric.moments_0[0][..., :48].any()
    assert abs(metric.compute() - exact(vision, text).log10()) <= 1e-6
    grams: list[Tensor] = []
    total = reference.shifted_sums(text[:700], None, grams.append, torch.float32, _stream.gram_of)
    wide = text[:700].double()
    torch.testing.assert_close(total, wide.sum(0), rtol=1e-12, atol=1e-12)
    assert (grams[0].double() - wide.T @ wide).norm() <= 1e-6 * (wide.T @ wide).norm()


def test_sums_about_a_point_move_to_another():
    # Rows (0, 1), (2, 3) about (1, 1): (-1, 0), (1, 2), Gram ((2, 2), (2, 4)), sum (0, 2).
    # About their mean (1, 2): (-1, -1), (1, 1), Gram ((2, 2), (2, 2)).
    rows, origin = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.ones(2)
    grams: list[Tensor] = []
    total = reference.shifted_sums(rows, origin, grams.append)
    assert total.tolist() == [0, 2] and grams[0].tolist() == [[2, 2], [2, 4]]
    count = torch.tensor(2.0, dtype=torch.float64)
    moved = reference.moved_gram(grams[0], count, total / count, total.new_zeros(2))
    assert moved.tolist() == [[2, 2], [2, 2]]


def test_two_triangles_share_a_matrix():
    packed = torch.zeros(3, 2)
    reference.add_triangle(packed, True, torch.tensor([[1.0, 2.0], [2.0, 3.0]]))
    reference.add_triangle(packed, False, torch.tensor([[4.0, 5.0], [5.0, 6.0]]))
    assert packed.tolist() == [[4, 5], [1, 6], [2, 3]]
    assert reference.unpack_triangle(packed, True).tolist() == [[1, 2], [2, 3]]
    assert reference.unpack_triangle(packed, False).tolist() == [[4, 5], [5, 6]]


def test_layers_one_by_one_equal_lists():
    vision, text = hidden_states(3, (1500, 1200), 7)
    whole, streamed = (ModalityIntegrationRate(3, 7) for _ in range(2))
    whole.update(vision, text)
    streamed.update([x[:0] for x in vision], [x[:0] for x in text])
    for layer in (2, 0, 1):
        streamed.update_layer(layer, vision[layer], text[layer])
    assert torch.equal(whole.per_layer(), streamed.per_layer())
    before = streamed.compute()
    streamed.update_layer(1, vision[0], text[0])
    assert streamed.compute() != before
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2: got 3"):
        streamed.update_layer(3, vision[0], text[0])
    with pytest.raises(ValueError, match=r"text must have the shape \(tokens, 7\): got \(2, 6\)"):
        streamed.update_layer(0, vision[0], torch.zeros(2, 6))
    with pytest.raises(TypeError, match="vision must have a floating-point dtype"):
        streamed.update_layer(0, vision[0].long(), text[0])


def test_sums_may_begin_under_inference_mode_and_autocast():
    vision, text = hidden_states(1, (2400, 2400), 5)
    metric = ModalityIntegrationRate(1, 5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        metric.update([vision[0][:1200].clone()], [text[0][:1200].clone()])
    metric.update([vision[0][1200:]], [text[0][1200:]])
    expected = modality_integration_rate(vision, text)
    assert abs(metric.compute() - expected) <= 1e-9


# Memory


def test_memory_of_32_layers_of_4096():
    for outliers in OUTLIERS:
        metric = ModalityIntegrationRate(32, 4096, outliers=outliers)
        assert sum(states_of(metric).values()) == 0  # a layer takes memory with its first rows
        assert metric.memory_bound(torch.bfloat16) <= 4.5e9
    # The sums alone: two float32 triangles of 4096 x 4097 / 2 a layer.
    assert 32 * 4097 * 4096 * 4 <= 2.2e9


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_stay_within_the_bound(outliers, dtype, monkeypatch):
    monkeypatch.setattr(_stream, "FLOAT64_DIM", 0)
    metric = ModalityIntegrationRate(2, 16, outliers=outliers)
    largest = 0
    for _ in range(60):
        metric.update(*([torch.randn(200 + 30 * i, 16).to(dtype)] * 2 for i in range(2)))
        sizes = states_of(metric)
        largest = max(largest, sum(sizes.values()) - sizes["norms"] - sizes["dropped"])
        largest -= sizes["key"]
    assert metric.memory_bound(dtype) / 3 < largest <= metric.memory_bound(dtype)
    assert metric.scatter_0[0].numel() == 17 * 16


def test_few_rows_are_kept_and_have_no_sums():
    metric = ModalityIntegrationRate(1, 1500)
    for _ in range(3):
        metric.update([torch.randn(500, 1500)], [torch.randn(100, 1500)])
    assert metric.scatter_0 == [] and sum(len(x) for x in metric.held_vision_0) == 1500
    metric.update([torch.randn(1, 1500)], [torch.randn(100, 1500)])
    assert len(metric.scatter_0) == 1 and sum(len(x) for x in metric.held_vision_0) < 200


def two_clouds(n: int) -> Tensor:
    """Norms about 1, and 6 % of rows about 10: more than four deviations from the median."""
    norms = torch.where(torch.rand(n) < 0.06, 10 + 0.3 * torch.randn(n), 1 + 0.1 * torch.randn(n))
    return torch.nn.functional.normalize(torch.randn(n, 4), dim=1) * norms[:, None]


@pytest.mark.parametrize("outliers", ["remove", "median"])
def test_held_rows_are_bounded(outliers):
    vision, text = two_clouds(40_000), two_clouds(40_000)
    metric = ModalityIntegrationRate(1, 4, outliers=outliers)
    most = 0
    for v, t in zip(vision.split(800), text.split(800), strict=True):
        metric.update([v], [t])
        most = max(most, sum(len(x) for x in metric.held_vision_0))
    assert most < 1024 + 1024
    assert sum(len(x) for x in metric.dropped_vision_0) > 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mir = metric.compute()
    if outliers == "remove":
        assert abs(mir - exact(vision, text).log10()) <= 1e-6


def test_dropped_rows_that_were_inliers_are_reported():
    # First 6 % lie far out, and some of them are dropped; then all do, and they are inliers.
    vision = torch.cat([two_clouds(25_000), two_clouds(60_000)])
    vision[25_000:] *= 10 / vision[25_000:].norm(dim=1, keepdim=True)
    metric = ModalityIntegrationRate(1, 4)
    for v in vision.split(1000):
        metric.update([v], [v[:20]])
    assert sum(len(x) for x in metric.dropped_vision_0) > 300
    with pytest.warns(UserWarning, match=r"of 85000 vision rows.*dropped.*shuffle the samples"):
        metric.compute()


# Fewer rows than dimensions


@pytest.mark.parametrize("method", ["newton_schulz", "eigh", "official_fast"])
@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("rows", [(12, 15), (2000, 15), (12, 2000), (40, 41), (3, 2)])
def test_fewer_rows_than_dimensions_are_exact(method, outliers, rows):
    d = 40
    vision, text = (torch.randn(n, d, dtype=torch.float64) + 0.1 * n**0.5 for n in rows)
    for x in (vision, text):
        if len(x) > 11:
            x[3] *= 20
    metric = ModalityIntegrationRate(1, d, method=method, outliers=outliers)
    metric.update([vision], [text])
    with pytest.warns(UserWarning, match="the covariance is singular"):
        distance = metric.per_layer()[0]
    alpha = 1 / text.norm(dim=1).mean()
    kept = []
    for x in (alpha * vision, alpha * text):
        norms = x.norm(dim=1)
        far = (norms - norms.median()).abs() > 3 * norms.std()
        if outliers == "median":
            x = torch.where(far[:, None], x.median(0).values, x)
        kept.append(x[~far] if outliers == "remove" else x)
    # Centred rows are factors: Tr((S_v S_t)^(1/2)) = |A B^T|_*, Tr(S_v S_t) = |A B^T|_F^2.
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in kept)
    product = a @ b.T
    root = (
        product.square().sum() if method == "official_fast" else torch.linalg.svdvals(product).sum()
    )
    apart = (kept[0].mean(0) - kept[1].mean(0)).square().sum()
    expected = apart + a.square().sum() + b.square().sum() - 2 * root
    torch.testing.assert_close(distance, expected, rtol=1e-9, atol=1e-12)


# Ranks


def run_ranks(world: int, folder: Path) -> list[dict]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    script = str(Path(__file__).with_name("_mir_ranks.py"))
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(world)], env=environment
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one_process(world, tmp_path):
    results = run_ranks(world, tmp_path)
    for case, (_, dim) in CASES.items():
        dealt = shares(world, case)
        for outliers in OUTLIERS:
            single = ModalityIntegrationRate(LAYERS, dim, outliers=outliers)
            for share in dealt:
                single.update(*share)
            expected = measure(single)
            for result in results:
                found = result[case, outliers][0]
                assert abs(found.sum().log10() - expected.sum().log10()) <= 1e-6
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
                assert torch.equal(found, results[0][case, outliers][0])
            # After the join each rank has its own rows again.
            own = ModalityIntegrationRate(LAYERS, dim, outliers=outliers)
            own.update(*dealt[0])
            assert torch.equal(results[0][case, outliers][1], own.accepted)
            assert torch.equal(results[0][case, outliers][2], torch.cat(own.norms_text_0))
    own = ModalityIntegrationRate(LAYERS, DIM)
    own.update(*shares(world, "many")[0])
    whole = ModalityIntegrationRate(LAYERS, DIM)
    for share in shares(world, "many"):
        whole.update(*share)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["alone"], own.per_layer(), rtol=1e-12, atol=0)
        assert "text must have at least 2 rows in layer 0" in result["error"]
        assert torch.equal(result["after"], results[0]["after"]) and result["after"].isfinite()
        distances, held = result["stages"]
        torch.testing.assert_close(distances, whole.per_layer(), rtol=1e-12, atol=0)
        assert held == list(range(rank, LAYERS, world))
        torch.testing.assert_close(result["float32"], whole.per_layer(), rtol=2e-6, atol=0)


# Metrics of parts


def test_metrics_of_parts_join():
    vision, text = hidden_states(2, (8000, 7200), 6)
    parts = [ModalityIntegrationRate(2, 6) for _ in range(4)]
    for i, part in enumerate(parts):
        part.update([x[i::4] for x in vision], [x[i::4] for x in text])
    expected = modality_integration_rate(vision, text)
    before = [part.compute() for part in parts]
    whole = parts[0].joined_with(*parts[1:])
    assert abs(whole.compute() - expected) <= 1e-9
    assert whole.scatter_0[-1] is parts[0].scatter_0[0]
    assert [part.compute() for part in parts] == before
    with pytest.raises(RuntimeError, match="takes no rows"):
        whole.update(vision, text)
    with pytest.raises(ValueError, match="metrics must agree in"):
        parts[0].joined_with(ModalityIntegrationRate(2, 7))
    # torchmetrics' own way copies, and goes on.
    merged = parts[0].clone()
    merged.merge_state(parts[1])
    merged.update([x[2::4] for x in vision], [x[2::4] for x in text])
    merged.update([x[3::4] for x in vision], [x[3::4] for x in text])
    assert abs(merged.compute() - expected) <= 1e-9
    assert [part.compute() for part in parts] == before


# The released code, in words of our own


def released(vision: Tensor, text: Tensor) -> tuple[float, float, float]:
    """Distance of a layer by the released fast mode, in float32 and float64, and by the accurate.

    Rows times 1 over the mean text norm; rows whose norm is three deviations from the median one
    are overwritten with the median row; covariances over n - 1. Fast: five steps
    Y = (Y + Z^-1 A) / 2, Z = (Z + Y^-1 A) / 2 from Y = A, Z = I. Accurate: scipy's root of the
    float32 product.
    """
    import scipy.linalg

    def clean(x: Tensor) -> Tensor:
        norms = x.norm(dim=1)
        far = (norms - norms.median()).abs() > 3 * norms.std()
        return torch.where(far[:, None], x.median(dim=0).values, x)

    results = []
    for dtype in (torch.float32, torch.float64):
        alpha = 1 / text.to(dtype).norm(dim=1).mean()
        v, t = (clean(alpha * x.to(dtype)) for x in (vision, text))
        cov_v, cov_t = (torch.from_numpy(np.cov(x.numpy().T)).to(dtype) for x in (v, t))
        a = cov_v @ cov_t
        y, z = a, torch.eye(len(a), dtype=dtype)
        for _ in range(5):
            y = (y + torch.linalg.inv(z) @ a) / 2
            z = (z + torch.linalg.inv(y) @ a) / 2
        rest = (v.mean(0) - t.mean(0)).square().sum() + cov_v.trace() + cov_t.trace()
        results.append(float(rest - 2 * y.trace()))
        if dtype == torch.float32:
            root = scipy.linalg.sqrtm(a.numpy())
            accurate = float(rest) - 2 * float(np.trace(root).real)
    return results[0], results[1], accurate


@pytest.mark.parametrize("d, rows", [(8, (600, 500)), (24, (900, 700)), (48, (1500, 1200))])
def test_the_released_numbers_are_reproduced(d, rows):
    pytest.importorskip("scipy")
    # A spectrum on which float32 keeps to the iteration's fixed point, with outliers.
    mix = torch.eye(d) + 0.3 * torch.randn(d, d) / d**0.5
    vision, text = (
        torch.randn(n, d) @ (mix + 0.3 * torch.randn(d, d) / d**0.5) + shift
        for n, shift in zip(rows, (0.4, -0.2), strict=True)
    )
    vision[::97] *= 9
    text[::83] *= 9
    fast32, fast64, accurate = released(vision, text)
    assert abs(fast64 - accurate) > 0.5 * accurate  # they are not the same number

    def ours(method: str) -> float:
        mir = modality_integration_rate([vision], [text], method=method, outliers="median")
        return 10 ** float(mir)

    assert ours("official_fast") == pytest.approx(fast64, rel=1e-8)
    assert ours("official_fast") == pytest.approx(fast32, rel=1e-5)
    assert ours("eigh") == pytest.approx(accurate, rel=2e-5)
    assert ours("newton_schulz") == pytest.approx(accurate, rel=2e-5)
