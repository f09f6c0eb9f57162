"""Guards of a run: what is not finite is named, wherever it is first."""

import math

import _train_run as run
import _trainer_ranks as trainers
import pytest
import torch
from _faults import BAD, PAIRS, Fault, poison, train

import fastalign as fa
from fastalign import checkpoint, losses
from fastalign.integrations.transformers import AlignmentTrainer
from fastalign.models import VLM


@pytest.mark.filterwarnings("ignore:the modality classifier")
@pytest.mark.parametrize("objective", ["sft", "cal", "deepalign"])
def test_the_first_tensor_that_is_not_finite_is_named(tmp_path, objective):
    """Pixels: with their sample and its place in the data; the checkpoints are those before."""
    fault = Fault(poison("pixel_values", -1, math.inf))
    found = r"at step 3: the first was pixel_values of micro-batch 2, sample \d \(index (\d+)\), on"
    with pytest.raises(FloatingPointError, match=found):
        train(tmp_path, fault, objective)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not checkpoint.verify(tmp_path / "checkpoint-2")


def test_pixels_whose_effect_is_masked_are_found(tmp_path):
    fault = Fault(poison("pixel_values"))
    clean = lambda module, args, kwargs: (tuple(a.nan_to_num() for a in args), kwargs)
    fault.model.model.vision_tower.register_forward_pre_hook(clean, with_kwargs=True)
    with pytest.raises(FloatingPointError, match="^inputs not finite.*first was pixel_values of"):
        train(tmp_path, fault)


@pytest.mark.parametrize("place", ["decoder", "tower", "weight"])
def test_hidden_states_are_named_by_layer(tmp_path, place):
    fault = Fault()
    layer = fault.model.model.language_model.layers[1]
    if place == "decoder":
        layer.mlp.register_forward_hook(fault.times(math.nan))
        found = r"the first was hidden states of decoder layer 2 \(mlp\) of micro-batch 1, on rank"
    elif place == "tower":
        layer = fault.model.model.vision_tower.encoder.layers[0]
        layer.register_forward_hook(fault.times(math.inf))
        found = "the first was hidden states of layer 1 of the vision tower of micro-batch"
    else:
        fault.spoil = lambda batch: layer.self_attn.v_proj.weight.data.fill_(math.nan)
        found = r"decoder layer 2 \(self_attn.v_proj\), whose weight is not finite of micro-batch"
    with pytest.raises(FloatingPointError, match=found):
        train(tmp_path, fault, "cal")


@pytest.mark.filterwarnings("ignore:the modality classifier")
@pytest.mark.parametrize("place", ["teacher", "mutual", "delta"])
def test_features_and_terms_are_named(tmp_path, monkeypatch, place):
    objective = "cal" if place == "delta" else "deepalign"
    fault = Fault()

    def spoiled(function):
        return lambda *args, **kwargs: function(*args, **kwargs) * (math.nan if fault.on else 1.0)

    if place == "mutual":
        monkeypatch.setattr(losses, "mutual_information", spoiled(losses.mutual_information))
        found = r"the first was term mutual of micro-batch \d, on rank 0"
    elif place == "delta":
        monkeypatch.setattr(VLM, "label_logits", spoiled(VLM.label_logits))
        found = r"the first was delta of micro-batch \d, on rank 0"
    else:
        fault.spoil = poison("teacher", 1)
        found = r"first was teacher features of view 2 of micro-batch 2, sample \d \(index"
    with pytest.raises(FloatingPointError, match=found):
        train(tmp_path, fault, objective)


@pytest.mark.filterwarnings("ignore:the modality classifier")
def test_a_teacher_that_is_called_is_looked_at(tmp_path):
    fault = Fault()

    def teacher(batch):
        features = torch.randn(len(batch["pixel_values"]), 16, 5)
        features[-1, 3] += math.nan if fault.on else 0.0
        return features

    def collate(indices):
        return {k: v for k, v in fault(indices).items() if k != "teacher"}

    config = run.config(tmp_path, "deepalign", deepalign=PAIRS)
    with pytest.raises(
        FloatingPointError, match=r"teacher features of view \d of micro-batch \d, on"
    ):
        fa.train(config, model=fault.model, dataset=range(20), collate=collate, teacher=teacher)


NAME = "model.language_model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("factor", "times", "found"),
    [
        (math.nan, 9, f"^gradient norm not .*first was gradient of {NAME} of micro-batch 1, on"),
        (math.nan, 1, f"{NAME}, summed over the ranks, finite when the step was run again"),
        (1e30, 9, "the sum of the squares of finite gradients, too large for its dtype"),
    ],
)
def test_gradients_are_named_by_parameter(tmp_path, factor, times, found):
    fault = Fault()
    left = times

    def spoil(gradient):
        nonlocal left
        left -= fault.on
        return gradient * factor if fault.on and left >= 0 else None

    fault.model.get_parameter(NAME).register_hook(spoil)
    with pytest.raises(FloatingPointError, match=found):
        train(tmp_path, fault, trainable="all")


@pytest.mark.parametrize("place", ["pixels", "hidden", "gradient"])
def test_the_trainer_stops_before_its_optimizer(tmp_path, place):
    """Also CAL's, whose loss of NaN weights would be 0; the Trainer's own log hides NaN."""
    fault = Fault(poison("pixel_values") if place == "pixels" else None)
    bad = lambda: trainer.state.global_step == BAD - 1  # its batches are fetched ahead of the step
    fault.model.train()
    layer = fault.model.model.language_model.layers[1]
    found = r"pixel_values of micro-batch 2, sample \d, on rank 0"
    if place == "hidden":
        layer.mlp.register_forward_hook(lambda module, args, out: out * math.nan if bad() else out)
        found = r"hidden states of decoder layer 2 \(mlp\) of micro-batch 1, on rank 0"
    elif place == "gradient":
        weight = layer.mlp.down_proj.weight
        weight.register_hook(lambda gradient: gradient * (math.nan if bad() else 1.0))
        found = f"gradient of {NAME} of micro-batch 1, on rank 0"
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 1.0}
    trainer = AlignmentTrainer(
        model=fault.model,
        args=trainers.arguments(tmp_path, **changes),
        train_dataset=list(range(20)),
        data_collator=fault,
        objective="cal",
    )
    with pytest.raises(FloatingPointError, match="not finite at step 3: the first was " + found):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    assert all(p.isfinite().all() for p in fault.model.parameters())
