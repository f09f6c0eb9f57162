"""The same step however it is divided: micro-batches and ranks change nothing but rounding.

In float64, where rounding is far below what a wrong share would do. Steps have 32 samples.
"""

import functools
import subprocess
import sys

import _division_ranks as division
import _trainer_ranks as trainers
import pytest
import torch

from fastalign import objectives
from fastalign.objectives import DeepAlignConfig, mutual_shares
from fastalign.objectives._intervention import mutual_term, pair_masks, pooled

SPLITS = [(8, 4), (1, 32)]
MIXED = [[0, 2], [1, 3, 4], [5, 6], [7]]  # the second without an image


@pytest.fixture(scope="module")
def undivided(tmp_path_factory):
    """(name) -> log and adapter of the run whose steps are one batch."""
    folder = tmp_path_factory.mktemp("undivided")
    return functools.cache(lambda name: division.train(folder / name, name, 32, 1))


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """(ranks) -> what two and four ranks found; one launch for both."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, division.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in division.RANKED}


def assert_same_run(run, whole):
    (history, adapter), (expected, weights) = run, whole
    assert len(history) == len(expected) == 3
    named = [k for k in expected[0] if not k.endswith("_per_s") and k != "peak_mib"]
    for line, wanted in zip(history, expected, strict=True):
        assert wanted["grad_norm"] > 0.1  # so that clipping acts
        for name in named:
            assert line[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-6), name
    for name, tensor in weights.items():
        torch.testing.assert_close(adapter[name], tensor, atol=1e-6, rtol=0.0)
    assert max(float(tensor.abs().max()) for k, tensor in weights.items() if "conv2" in k) > 1e-3


@pytest.mark.parametrize("name", division.OBJECTIVES)
def test_accumulation_does_not_change_the_training(tmp_path, undivided, name):
    for size, steps in SPLITS:
        run = division.train(tmp_path / str(size), name, size, steps)
        assert_same_run(run, undivided(name))


@pytest.mark.parametrize("ranks", division.RANKED)
@pytest.mark.parametrize("name", division.OBJECTIVES)
def test_ranks_do_not_change_the_training(ranked, undivided, name, ranks):
    assert_same_run(ranked[ranks][name], undivided(name))


@pytest.mark.parametrize("ranks", division.RANKED)
def test_ranks_do_not_change_mir(ranked, ranks):
    torch.testing.assert_close(ranked[ranks]["mir"], division.mir(0, 1), atol=1e-9, rtol=0.0)


class Sorted(list):
    """Samples that tell their lengths."""

    def lengths(self):
        return [len(division.SAMPLES[i % len(division.SAMPLES)]) for i in self]


def test_sorting_by_length_does_not_change_the_negatives(tmp_path, undivided):
    """A step's samples in another order are the same step."""
    data = Sorted(range(70))
    run = division.train(tmp_path, "deepalign", 8, 4, data, group_by_length=True)
    assert_same_run(run, undivided("deepalign"))


# -- the mutual term -------------------------------------------------------------------------------


def undivided_mutual(vlm, state, batches, seeds):
    """The term of all pairs with one graph, dropout drawn as in each micro-batch."""
    parts = []
    for batch, seed in zip(batches, seeds, strict=True):
        pair, vision, text = pair_masks(vlm, batch)
        torch.manual_seed(seed)
        out = vlm.forward(batch, state.layers, labels_only=True)
        shifted = pooled([out.layers[k] for k in state.layers], vision, state.config.pool)
        base = objectives._intervention.base_vectors(vlm, batch, state, (vision, text))
        parts.append((*base, shifted, pair))
    return mutual_term(*(torch.cat(part) for part in zip(*parts, strict=True)), state.config)


@pytest.mark.parametrize(
    ("estimator", "pool", "dropout"),
    [("infonce", "last", 0.2), ("infonce", "mean", 0.0), ("gaussian", "last", 0.0)]
    + [("gaussian", "mean", 0.2)],
)
def test_gradients_of_the_shares_add_up_to_that_of_the_term(estimator, pool, dropout):
    """To 1e-12; the sum over micro-batches of terms of their own is something else."""
    config = DeepAlignConfig(estimator=estimator, pool=pool, alpha=0.0, beta=0.0, mu=0.0)
    vlm, state, adapter = division.adapted(config, dropout)
    parameters = list(adapter.parameters())
    batches = [division.collate(part) for part in MIXED]
    for batch in batches:
        batch["labels"] = torch.full_like(batch["labels"], -100)  # the mutual term alone
    totals = division.totals_of(vlm, batches)
    shares = mutual_shares(vlm, batches, state=state)
    terms = []
    for batch, mutual in zip(batches, shares, strict=True):
        terms.append(objectives.deepalign(vlm, batch, state=state, totals=totals, mutual=mutual))
        terms[-1]["loss"].backward()
    seeds = [share.seed for share in shares]
    whole = undivided_mutual(vlm, state, batches, seeds)
    expected = torch.autograd.grad(whole, parameters, materialize_grads=True)
    whole = whole.detach()
    assert abs(float(sum(t["mutual"] for t in terms) - whole)) < 1e-12
    scale = max(float(gradient.abs().max()) for gradient in expected)
    assert scale > 1e-3
    for parameter, gradient in zip(parameters, expected, strict=True):
        found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, gradient, atol=1e-12 * scale, rtol=1e-12)
    if dropout:
        assert undivided_mutual(vlm, state, batches, seeds[::-1]) != whole
    alone = [objectives.deepalign(vlm, b, state=state, totals=totals)["mutual"] for b in batches]
    assert abs(float(sum(alone) - whole)) > 1e-3


def test_two_sharded_ranks_share_their_pairs(ranked):
    """Under FSDP2, where a rank's micro-batch without an image runs all modules too."""
    vlm, state, adapter = division.adapted(DeepAlignConfig(without=("distillation",)))
    batch = division.collate([i for part in division.SHARDED for micro in part for i in micro])
    terms = objectives.deepalign(vlm, batch, state=state)
    terms["loss"].backward()
    value, gradients = ranked[2]["sharded"]
    torch.testing.assert_close(value, terms["mutual"], atol=1e-10, rtol=0.0)
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-9, rtol=1e-9)


def test_the_trainer_takes_the_pairs_of_its_micro_batches(tmp_path):
    """`AlignmentTrainer`: gradients and logged terms of 4 x 1 samples, the mutual term included."""
    found = []
    for size, steps in ((4, 1), (1, 4)):
        vlm, state, _ = division.adapted(DeepAlignConfig(without=("distillation",)))
        made = trainers.trainer(
            tmp_path / str(size),
            "deepalign",
            made=vlm.model,
            state=state,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        made.data_collator = division.collate
        seen = trainers.Gradients()
        made.add_callback(seen)
        made.train()
        found.append((seen.steps, [x for x in made.state.log_history if "loss" in x]))
    (whole, lines), (divided, others) = found
    for step, other in zip(whole, divided, strict=True):
        for name, gradient in step.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-9, rtol=1e-6)
    for line, other in zip(lines, others, strict=True):
        assert line["mutual"] != 0.0
        for name in ("loss", "ce", "mutual", "global", "instance"):
            assert other[name] == pytest.approx(line[name], rel=1e-6), name


def test_where_there_is_nothing_to_share():
    vlm, state, _ = division.adapted(DeepAlignConfig())
    batches = [division.collate([0]), division.collate([2])]
    assert mutual_shares(vlm, batches, state=None) == [None, None]
    assert mutual_shares(vlm, batches[:1], state=state) == [None]
    _, without, _ = division.adapted(DeepAlignConfig(without=("mutual",)))
    assert mutual_shares(vlm, batches, state=without) == [None, None]
    (share, _) = mutual_shares(vlm, batches, state=state)
    with pytest.raises(ValueError, match="totals must be those of the step with mutual"):
        objectives.deepalign(vlm, batches[0], state=state, mutual=share)
    texts = [division.collate([1]), division.collate([4])]
    for share in mutual_shares(vlm, texts, state=state):  # a step without any pair
        assert share.value == 0 and not share.gradient.any()
