import math
import pickle
import warnings

import pytest
import torch
from _mir_ranks import hidden_states
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastalign import metrics
from fastalign.metrics import (
    ModalityIntegrationRate,
    frechet_distance,
    modality_integration_rate,
)

METHODS = ["newton_schulz", "eigh", "official_fast"]
OUTLIERS = ["remove", "median", "keep"]


def orthogonal(d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


def gaussian(d: int, *batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(*batch, d, 2 * d, dtype=torch.float64)
    return torch.randn(*batch, d, dtype=torch.float64), x @ x.mT / d


def by_definition(vision: list[Tensor], text: list[Tensor], outliers: str = "remove") -> Tensor:
    """The paper's equations on all rows at once, the root by the eigenvalues of the product."""
    distances = []
    for v, t in zip(vision, text, strict=True):
        v, t = v.double(), t.double()
        alpha = 1 / t.norm(dim=1).mean()
        kept = []
        for x in (alpha * v, alpha * t):
            norms = x.norm(dim=1)
            outlier = (norms - norms.median()).abs() > 3 * norms.std()
            if outliers == "remove":
                x = x[~outlier]
            elif outliers == "median":
                x = torch.where(outlier[:, None], x.median(dim=0).values, x)
            kept.append(x)
        cov_v, cov_t = (torch.cov(x.T) for x in kept)
        root = torch.linalg.eigvals(cov_v @ cov_t).real.clamp_min(0).sqrt().sum()
        apart = (kept[0].mean(0) - kept[1].mean(0)).square().sum()
        distances.append(apart + cov_v.trace() + cov_t.trace() - 2 * root)
    return torch.stack(distances)


# The Frechet distance


def test_frechet_distance_by_hand():
    # |(1, 2)|^2 + (sqrt 1 - sqrt 9)^2 + (sqrt 4 - sqrt 16)^2 = 5 + 4 + 4
    mean_x, mean_y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, -2.0])
    cov_x, cov_y = torch.tensor([1.0, 4.0]).diag(), torch.tensor([9.0, 16.0]).diag()
    distance = frechet_distance(mean_x, cov_x, mean_y, cov_y)
    assert distance.item() == pytest.approx(13.0) and distance.dtype == torch.float32


@pytest.mark.parametrize("d", [1, 2, 9, 40])
def test_frechet_distance_of_equal_distributions_is_zero(d):
    mean, cov = gaussian(d)
    assert 0 <= frechet_distance(mean, cov, mean, cov) <= 1e-12 * cov.trace()
    half = cov.to(torch.bfloat16), mean.to(torch.bfloat16)
    assert frechet_distance(half[1], half[0], half[1], half[0]) <= 1e-6 * cov.trace()


@given(st.integers(1, 8), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_frechet_distance_properties(d, seed, scale):
    torch.manual_seed(seed)
    (mx, cx), (my, cy) = gaussian(d), gaussian(d)
    cx = scale * cx
    distance = frechet_distance(mx, cx, my, cy)
    size = cx.trace() + cy.trace() + (mx - my).square().sum()
    assert distance >= 0
    torch.testing.assert_close(
        distance, frechet_distance(my, cy, mx, cx), rtol=0, atol=1e-12 * size
    )
    q = orthogonal(d)
    rotated = frechet_distance(q @ mx, q @ cx @ q.T, q @ my, q @ cy @ q.T)
    torch.testing.assert_close(rotated, distance, rtol=0, atol=1e-9 * size)
    # Covariances that commute: sum (sqrt a - sqrt b)^2 over shared eigenvectors.
    a, b = torch.rand(d, dtype=torch.float64), torch.rand(d, dtype=torch.float64)
    shared = frechet_distance(mx, (q * a) @ q.T, mx, (q * b) @ q.T)
    torch.testing.assert_close(shared, (a.sqrt() - b.sqrt()).square().sum(), rtol=0, atol=1e-7)


def test_frechet_distance_batched():
    (mx, cx), (my, cy) = gaussian(4, 2, 3), gaussian(4, 2, 3)
    distances = frechet_distance(mx, cx, my, cy)
    assert distances.shape == (2, 3)
    one = frechet_distance(mx[1, 2], cx[1, 2], my[1, 2], cy[1, 2])
    torch.testing.assert_close(distances[1, 2], one)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_frechet_distance_gradcheck(batch):
    inputs = [x.requires_grad_() for x in (*gaussian(3, *batch), *gaussian(3, *batch))]
    assert torch.autograd.gradcheck(frechet_distance, inputs)


def test_frechet_distance_bad_input():
    mean, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"cov_x must be \(\.\.\., d, d\).*\(2, 2\) and \(3,\)"):
        frechet_distance(mean, torch.eye(2), mean, torch.eye(2))
    with pytest.raises(ValueError, match=r"mean_y must have the shape.*\(2,\) and \(3,\)"):
        frechet_distance(mean, cov, torch.zeros(2), cov)
    with pytest.raises(ValueError, match=r"cov_y must have the shape.*\(2, 2\) and \(3, 3\)"):
        frechet_distance(mean, cov, mean, torch.eye(2))
    with pytest.raises(ValueError, match="cov_x must have the dtype.*float64 and torch.float32"):
        frechet_distance(mean, cov.double(), mean, cov.double())
    with pytest.raises(TypeError, match="mean_x must have a floating-point dtype"):
        frechet_distance(torch.zeros(3, dtype=torch.int64), cov, mean, cov)


# MIR


def test_mir_by_hand():
    # Text (+-2, 0), (0, +-2): norms 2, so alpha = 1/2; mean 0, covariance diag(2, 2) / 3.
    # Vision, scaled: (3, 0), (5, 0), (4, 1), (4, -1): mean (4, 0), covariance diag(2, 2) / 3.
    text = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    vision = text + torch.tensor([8.0, 0.0])
    metric = ModalityIntegrationRate(2, 2)
    metric.update([vision, 2 * vision], [text, 2 * text])
    torch.testing.assert_close(metric.per_layer(), torch.tensor([16.0, 16.0], dtype=torch.float64))
    assert metric.compute().item() == pytest.approx(math.log10(32.0))


def outlier_case() -> tuple[Tensor, Tensor]:
    """One dimension, d = 1; the last of 21 vision rows is beyond three deviations."""
    vision = torch.cat([torch.tensor([1.0, 3.0]).repeat(10), torch.tensor([102.0])])
    return vision[:, None], torch.tensor([[1.0], [-1.0]])


@pytest.mark.parametrize(
    "outliers, expected",
    [
        # Text: alpha 1, mean 0, variance 2. In one dimension FID = (difference of means)^2
        # + (difference of deviations)^2.
        # remove: ten 1 and ten 3: mean 2, variance 20 / 19.
        ("remove", 4 + (math.sqrt(20 / 19) - math.sqrt(2)) ** 2),
        # median: the median of all 21 rows is 3, so ten 1 and eleven 3: mean 43 / 21,
        # sum of squares 109, variance (109 - 43^2 / 21) / 20 = 440 / 420.
        ("median", (43 / 21) ** 2 + (math.sqrt(440 / 420) - math.sqrt(2)) ** 2),
        # keep: mean 142 / 21, sum of squares 10504.
        ("keep", (142 / 21) ** 2 + (math.sqrt((10504 - 142**2 / 21) / 20) - math.sqrt(2)) ** 2),
    ],
)
@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_outlier_modes_by_hand(method, outliers, expected):
    vision, text = outlier_case()
    metric = ModalityIntegrationRate(1, 1, method=method, outliers=outliers)
    metric.update([vision], [text])
    assert metric.per_layer().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_agrees_with_the_definition(method, outliers):
    vision, text = hidden_states(3, (400, 300), 24)
    metric = ModalityIntegrationRate(3, 24, method=method, outliers=outliers)
    metric.update(vision, text)
    expected = by_definition(vision, text, outliers)
    torch.testing.assert_close(metric.per_layer(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(metric.compute(), expected.sum().log10(), rtol=1e-7, atol=0)


def test_official_fast_is_its_definition():
    vision, text = hidden_states(1, (200, 150), 8)
    metric = ModalityIntegrationRate(1, 8, method="official_fast", outliers="keep")
    metric.update(vision, text)
    alpha = 1 / text[0].double().norm(dim=1).mean()
    v, t = alpha * vision[0].double(), alpha * text[0].double()
    cov_v, cov_t = torch.cov(v.T), torch.cov(t.T)
    apart = (v.mean(0) - t.mean(0)).square().sum()
    expected = apart + cov_v.trace() + cov_t.trace() - 2 * (cov_v @ cov_t).trace()
    torch.testing.assert_close(metric.per_layer()[0], expected)
    exact = modality_integration_rate(vision, text, method="eigh", outliers="keep")
    assert abs(expected.log10() - exact) > 0.01


@pytest.mark.parametrize("name", ["power", "massive"])
def test_methods_agree_on_steep_spectra(name):
    d = 96
    std = torch.arange(1, d + 1, dtype=torch.float64) ** (-math.log(1e3) / math.log(d))
    vision, text = (torch.randn(500, d, dtype=torch.float64) * std @ orthogonal(d) for _ in "vt")
    if name == "massive":
        vision[:, 5], text[:, 5] = 300 * vision[:, 5], 300 * text[:, 5]
    values = [
        modality_integration_rate([vision], [text + 0.01], method=method) for method in METHODS[:2]
    ]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_invariances(method):
    vision, text = ([x.double() for x in m] for m in hidden_states(2, (200, 150), 12))
    options = {"method": method}
    expected = modality_integration_rate(vision, text, **options)
    q = orthogonal(12)
    same = {
        "rotation": ([x @ q for x in vision], [x @ q for x in text]),
        "scale": ([1e3 * x for x in vision], [1e3 * x for x in text]),
        "order": ([x.flip(0) for x in vision], [x.flip(0) for x in text]),
    }
    for name, (v, t) in same.items():
        mir = modality_integration_rate(v, t, **options)
        assert abs(mir - expected) <= 1e-6, name
    doubled = modality_integration_rate([2 * x for x in vision], text, **options)
    assert abs(doubled - expected) > 1e-2


def test_equal_modalities_have_no_distance():
    x = torch.randn(100, 6)
    for method in METHODS[:2]:
        metric = ModalityIntegrationRate(1, 6, method=method)
        metric.update([x], [x])
        assert 0 <= metric.per_layer().item() <= 1e-9


# Streaming


@pytest.mark.parametrize("outliers", OUTLIERS)
def test_chunks_and_order_do_not_matter(outliers):
    # More rows than are held before the first are accepted, so that the sums do the work.
    vision, text = hidden_states(2, (3500, 2600), 10)
    expected = by_definition(vision, text, outliers)
    for sizes in ((5000,), (700,), (97, 1500, 1)):
        metric = ModalityIntegrationRate(2, 10, outliers=outliers)
        at, step = 0, 0
        while at < 3500:
            rows = slice(at, at + sizes[step % len(sizes)])
            metric.update([x[rows] for x in vision], [x[rows] for x in text])
            at, step = rows.stop, step + 1
        torch.testing.assert_close(metric.per_layer(), expected, rtol=1e-6, atol=0)
        if sizes == (700,):
            assert metric.accepted.sum() > 2000
            held = sum(len(x) for x in metric.held_vision_0)
            assert held < 1500
    order = torch.randperm(2600)
    text = [x[order] for x in text]
    shuffled = modality_integration_rate(vision, text, outliers=outliers)
    assert abs(shuffled - expected.sum().log10()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    vision, text = ([x.to(dtype) for x in m] for m in hidden_states(2, (300, 300), 8))
    mir = modality_integration_rate(vision, text)
    assert mir.dtype == torch.float64
    expected = by_definition(vision, text).sum().log10()
    torch.testing.assert_close(mir, expected, rtol=1e-6, atol=0)


def test_offset_far_above_the_spread():
    # |mean|^2 is 1e6 times the trace of the covariance.
    vision, text = (torch.randn(2500, 8, dtype=torch.float64) + 1e3 for _ in "vt")
    metric = ModalityIntegrationRate(1, 8)
    for v, t in zip(vision.split(500), text.split(500), strict=True):
        metric.update([v], [t])
    expected = by_definition([vision], [text])
    torch.testing.assert_close(metric.per_layer(), expected, rtol=1e-5, atol=0)


def test_updates_may_lack_a_modality_or_differ_by_layer():
    vision, text = hidden_states(2, (60, 50), 4)
    vision[1] = vision[1][:40]  # tokens pruned on the way
    metric = ModalityIntegrationRate(2, 4)
    metric.update(vision, [x[:0] for x in text])
    metric.update([x[:0] for x in vision], text)
    torch.testing.assert_close(metric.per_layer(), by_definition(vision, text), rtol=1e-6, atol=0)


def test_compute_may_come_between_updates_and_reset_forgets():
    vision, text = hidden_states(1, (2200, 2200), 6)
    metric = ModalityIntegrationRate(1, 6)
    metric.update([vision[0][:1500]], [text[0][:1500]])
    first = metric.compute()
    metric.update([vision[0][1500:]], [text[0][1500:]])
    assert metric.compute() != first
    torch.testing.assert_close(metric.per_layer(), by_definition(vision, text), rtol=1e-6, atol=0)
    metric.reset()
    metric.update([vision[0][:1500]], [text[0][:1500]])
    assert metric.compute() == first
    assert pickle.loads(pickle.dumps(metric)).compute() == first


def test_forward_gives_the_batch_and_accumulates():
    vision, text = hidden_states(1, (1300, 1300), 5)
    metric = ModalityIntegrationRate(1, 5)
    for start in (0, 650):
        v, t = [x[start : start + 650] for x in vision], [x[start : start + 650] for x in text]
        torch.testing.assert_close(metric(v, t), modality_integration_rate(v, t))
    torch.testing.assert_close(metric.per_layer(), by_definition(vision, text), rtol=1e-6, atol=0)


def test_rows_are_copied_and_never_written():
    vision, text = hidden_states(1, (50, 50), 4)
    metric = ModalityIntegrationRate(1, 4)
    copies = vision[0].clone(), text[0].clone()
    state = torch.get_rng_state()
    metric.update(vision, text)
    assert torch.equal(vision[0], copies[0]) and torch.equal(text[0], copies[1])
    vision[0].zero_()
    expected = by_definition([copies[0]], [copies[1]])
    torch.testing.assert_close(metric.per_layer(), expected, rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_median_row_of_a_sample():
    vision, text = torch.randn(20_000, 3) + 1, torch.randn(20_000, 3)
    vision[::400] *= 20
    state = torch.get_rng_state()
    values = []
    for size in (600, 5000):
        metric = ModalityIntegrationRate(1, 3, outliers="median")
        for v, t in zip(vision.split(size), text.split(size), strict=True):
            metric.update([v], [t])
        values.append(metric.compute())
    exact = by_definition([vision], [text], "median").sum().log10()
    assert abs(values[0] - exact) <= 1e-4
    # The sample is drawn by the rows themselves: grouping and order do not change it.
    assert abs(values[0] - values[1]) <= 1e-9
    assert sum(len(x) for x in metric.sample_vision_0) <= 8192
    assert torch.equal(torch.get_rng_state(), state)
    sample = torch.cat(metric.sample_vision_0)
    spread = vision.std(0) / len(sample) ** 0.5
    assert ((sample.mean(0) - vision.mean(0)).abs() <= 4 * spread).all()


def test_drifting_norms_are_reported():
    # Norms near 1 first, then mostly near 20: the first rows are outliers in the end.
    direction = torch.nn.functional.normalize(torch.randn(40_000, 3), dim=1)
    vision = direction * torch.cat([1 + 0.1 * torch.rand(1100), 20 + torch.rand(38_900)])[:, None]
    metric = ModalityIntegrationRate(1, 3)
    metric.update([vision[:1100]], [direction[:1100]])
    metric.update([vision[1100:]], [direction[1100:2200]])
    with pytest.warns(UserWarning, match=r"of 40000 vision rows of layer 0.*shuffle the samples"):
        metric.compute()


# Fewer rows than dimensions


@pytest.mark.parametrize("method", ["newton_schulz", "eigh"])
def test_fewer_rows_than_dimensions(method):
    d, n = 40, 12
    vision, text = (
        torch.randn(n, d, dtype=torch.float64),
        torch.randn(n + 3, d, dtype=torch.float64),
    )
    metric = ModalityIntegrationRate(1, d, method=method)
    metric.update([vision], [text])
    with pytest.warns(UserWarning, match="12 vision rows in layer 0 for 40 dimensions"):
        distance = metric.per_layer()
    # With the centred rows as factors: Tr((S_v S_t)^(1/2)) = |A B^T|_* / sqrt((n - 1) (m - 1)).
    alpha = 1 / text.norm(dim=1).mean()
    a, b = alpha * (vision - vision.mean(0)), alpha * (text - text.mean(0))
    root = torch.linalg.svdvals(a @ b.T).sum() / math.sqrt((n - 1) * (n + 2))
    apart = alpha**2 * (vision.mean(0) - text.mean(0)).square().sum()
    spread = a.square().sum() / (n - 1) + b.square().sum() / (n + 2)
    torch.testing.assert_close(distance[0], apart + spread - 2 * root, rtol=2e-5, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update([vision], [text])
        metric.compute()


def test_constant_dimensions_and_rows():
    vision, text = torch.randn(50, 5), torch.randn(60, 5)
    vision[:, 2], text[:, 2] = 0.0, 3.0
    for method in METHODS[:2]:
        metric = ModalityIntegrationRate(1, 5, method=method, outliers="keep")
        metric.update([vision], [text])
        expected = by_definition([vision], [text], "keep")
        torch.testing.assert_close(metric.per_layer(), expected, rtol=1e-6, atol=0)
    same = torch.ones(30, 2)
    assert modality_integration_rate([3 * same], [same]).item() == pytest.approx(math.log10(4))


# Bad input


def test_bad_settings():
    with pytest.raises(ValueError, match="method must be one of.*'eigh'.*got 'scipy'"):
        ModalityIntegrationRate(1, 2, method="scipy")
    with pytest.raises(ValueError, match="outliers must be one of.*'keep'.*got None"):
        ModalityIntegrationRate(1, 2, outliers=None)
    with pytest.raises(ValueError, match="num_layers must be above 0: got 0"):
        ModalityIntegrationRate(0, 2)
    with pytest.raises(ValueError, match="compute_on_cpu must be False"):
        ModalityIntegrationRate(1, 2, compute_on_cpu=True)
    with pytest.raises(ValueError, match="vision must hold one tensor.*got no layer"):
        modality_integration_rate([], [])


def test_bad_updates_add_nothing():
    metric = ModalityIntegrationRate(2, 4)
    x = torch.randn(5, 4)
    with pytest.raises(ValueError, match="text must hold one tensor for each of 2 layers: got 1"):
        metric.update([x, x], [x])
    with pytest.raises(ValueError, match=r"text\[1\].*\(tokens, 4\): got \(5, 3\)"):
        metric.update([x, x], [x, x[:, :3]])
    with pytest.raises(ValueError, match=r"vision\[0\].*\(tokens, 4\): got \(1, 5, 4\)"):
        metric.update([x[None], x], [x, x])
    with pytest.raises(TypeError, match=r"vision\[1\] must have a floating-point dtype"):
        metric.update([x, x.long()], [x, x])
    assert metric.norms_vision_0 == [] and metric.norms_text_0 == []


def test_too_few_rows_raise():
    metric = ModalityIntegrationRate(2, 4)
    x = torch.randn(5, 4)
    metric.update([x, x], [x, x[:1]])
    with pytest.raises(ValueError, match="text must have at least 2 rows in layer 1.*got 1; call"):
        metric.compute()
    metric.update([x, x], [x, x])
    assert metric.compute().isfinite() or metric.compute() == -torch.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("outliers", OUTLIERS)
def test_nan_is_not_hidden(outliers, value):
    vision, text = hidden_states(3, (1200, 1200), 4)
    vision[1][7, 2] = value
    metric = ModalityIntegrationRate(3, 4, outliers=outliers)
    metric.update(vision, text)
    metric.update(*hidden_states(3, (1200, 1200), 4))
    with pytest.warns(UserWarning, match="1 vision row.* of layer 1 hold NaN or inf"):
        assert metric.compute().isnan()
    assert metric.per_layer().isnan().tolist() == [False, True, False]


def test_text_of_zeros_is_named():
    with pytest.warns(UserWarning, match="every text row of layer 0 is zero"):
        assert modality_integration_rate([torch.randn(9, 2)], [torch.zeros(9, 2)]).isnan()


# Other ways to gather


def test_a_gather_function_of_the_caller_is_used():
    vision, text = hidden_states(1, (1300, 900), 4)
    metric = ModalityIntegrationRate(1, 4, sync_on_compute=False)
    metric.update(vision, text)
    twice = ModalityIntegrationRate(1, 4)
    for _ in range(2):
        twice.update(vision, text)
    metric.sync(dist_sync_fn=lambda x, group: [x, x], distributed_available=lambda: True)
    torch.testing.assert_close(metric.per_layer(), twice.per_layer(), rtol=1e-9, atol=0)
    assert len(torch.cat(metric.norms_vision_0)) == 1300


def test_public_names():
    assert set(metrics.__all__) == {
        "ModalityIntegrationRate",
        "frechet_distance",
        "modality_integration_rate",
    }
