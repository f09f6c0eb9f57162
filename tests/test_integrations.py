"""The objectives in transformers.Trainer and TRL: one optimizer step is one step of the method."""

import math
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastalign as fa
from fastalign.config import CALConfig

pytest.importorskip("transformers")
import _trainer_ranks as run
from _versions import CHECKPOINTING
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, Trainer

from fastalign.integrations._engine import call_inside
from fastalign.integrations.transformers import AlignmentMixin, AlignmentTrainer

RUN = Path(__file__).with_name("_trainer_ranks.py")

SPLITS = {"2x2": (2, 2), "1x4": (1, 4)}  # micro-batch size and number, of 4x1


def distance(actual, expected):
    """Of all gradients at once, relative; a missing one is 0."""
    names = actual.keys() | expected.keys()
    zero = torch.zeros(())
    squares = [(actual.get(k, zero) - expected.get(k, zero)).double().square().sum() for k in names]
    whole = sum(g.double().square().sum() for g in expected.values())
    return float((sum(squares) / whole).sqrt())


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def first_step(folder, objective, split=(4, 1), **changes):
    size, number = split
    made, steps = run.run(
        folder,
        objective,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=number,
        max_steps=1,
        **changes,
    )
    return steps[0], made.state.log_history[0]


# -- one step, however it is divided -------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("options", [{}, {"normalize": "sample"}, None])
def test_a_step_does_not_depend_on_its_micro_batches(tmp_path, options, split):
    """Loss, terms and gradients are those of the objective over all four samples at once."""
    objective = "sft" if options is None else "cal"
    grads, logged = first_step(tmp_path, objective, objective_options=options)
    other, line = first_step(tmp_path, objective, SPLITS[split], objective_options=options)
    assert distance(other, grads) < 3e-6
    model = run.model()
    terms = getattr(fa.objectives, objective)(
        fa.VLM(model), run.collate(range(4)), **(options or {})
    )
    assert distance(grads, gradients(model, terms["loss"])) < 3e-6
    for name, value in terms.items():
        assert line[name] == pytest.approx(value.item(), rel=3e-6)
        assert logged[name] == pytest.approx(value.item(), rel=3e-6)
    if objective == "cal":
        assert line["weight"] > 1.2  # far from plain cross-entropy


@pytest.mark.parametrize("normalize", ["tokens", "official"])
def test_normalizations_of_micro_batches(tmp_path, normalize):
    """Two micro-batches: each has its own weights' sum, as the objective says."""
    options = {"normalize": normalize}
    grads, line = first_step(tmp_path, "cal", (2, 2), objective_options=options)
    model = run.model()
    vlm, batches = fa.VLM(model), [run.collate([0, 1]), run.collate([2, 3])]
    tokens = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    values = [fa.objectives.cal(vlm, b, **options)["loss"] for b in batches]
    share = [0.5, 0.5] if normalize == "official" else [n / sum(tokens) for n in tokens]
    loss = sum(a * value for a, value in zip(share, values, strict=True))
    assert line["loss"] == pytest.approx(loss.item(), rel=3e-6)
    assert distance(grads, gradients(model, loss)) < 3e-6


@pytest.mark.parametrize("split", SPLITS)
def test_deepalign_does_not_depend_on_its_micro_batches(tmp_path, split):
    found = []
    for shape in ((4, 1), SPLITS[split]):
        made, state = run.adapted()
        found.append(first_step(tmp_path, "deepalign", shape, made=made, state=state))
    (grads, logged), (other, line) = found
    assert grads and all("fastalign_adapter" in name for name in grads)
    assert line["ce"] == pytest.approx(logged["ce"], rel=3e-6)
    assert line["visual"] == pytest.approx(logged["visual"], rel=3e-6)
    # The running direction of the global term has seen less in the first micro-batches.
    if split == "2x2":
        assert line["instance"] == pytest.approx(logged["instance"], rel=3e-6)


def test_clipping_sees_the_mean(tmp_path):
    """Gradients are divided by the summed weights before they are clipped, not after."""
    whole, logged = first_step(tmp_path, "cal", (1, 4))
    clipped, line = first_step(tmp_path, "cal", (1, 4), max_grad_norm=0.1)
    norm = math.sqrt(sum(g.double().square().sum() for g in whole.values()))
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert distance({k: g * (norm / 0.1) for k, g in clipped.items()}, whole) < 1e-4


def test_sft_is_the_plain_trainer(tmp_path):
    """Labels of the whole accumulation window divide both; the parameters go the same way."""
    ours, ours_steps = run.run(tmp_path / "a", "sft")
    plain, plain_steps = run.run(tmp_path / "b", cls=Trainer)
    assert run.losses(ours) == pytest.approx(run.losses(plain), rel=1e-6)
    assert distance(ours_steps[0], plain_steps[0]) < 3e-6
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_no_label_in_a_step_changes_nothing(tmp_path):
    def unlabelled(indices):
        batch = run.collate(indices)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    made = run.trainer(tmp_path)
    made.data_collator = unlabelled
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    made.train()
    assert run.losses(made) == [0.0, 0.0]
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())


def test_full_logits_are_never_formed(tmp_path):
    made = run.trainer(tmp_path)
    shapes = []
    hook = made.model.lm_head.register_forward_hook(lambda m, a, out: shapes.append(out.shape[1]))
    made.train()
    made.evaluate()
    hook.remove()
    assert set(shapes) <= {1}


def test_bfloat16_covers_the_contrast(tmp_path):
    """Autocast of accelerate stands around the model's own forward; the contrast is beside it."""
    _, line = first_step(tmp_path, "cal", bf16=True)
    vlm, batch = fa.VLM(run.model().train()), run.collate(range(4))
    with torch.autocast("cpu", torch.bfloat16):
        terms = fa.objectives.cal(vlm, batch)
    for name in ("loss", "ce", "delta", "weight"):
        assert line[name] == pytest.approx(terms[name].item(), rel=1e-6)
    _, exact = first_step(tmp_path, "cal")
    assert line["delta"] != exact["delta"]


def test_checkpointing_changes_no_gradient(tmp_path):
    plain, _ = first_step(tmp_path, "cal")
    checkpointed, _ = first_step(
        tmp_path,
        "cal",
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    )
    assert distance(checkpointed, plain) < 1e-6


# -- what is written and read --------------------------------------------------------------------


def test_terms_are_logged_as_means_over_the_window(tmp_path):
    each, _ = run.run(tmp_path, max_steps=3, logging_steps=1)
    pairs, _ = run.run(tmp_path, max_steps=3, logging_steps=2)
    lines = [line for line in each.state.log_history if "loss" in line]
    (line,) = [line for line in pairs.state.log_history if "loss" in line]
    for name in ("loss", "ce", "accuracy", "delta", "weight"):
        assert line[name] == pytest.approx((lines[0][name] + lines[1][name]) / 2, rel=1e-6)
    assert pairs.state.log_history[-1]["train_loss"] == pytest.approx(
        sum(line["loss"] for line in lines) / 3, rel=1e-6
    )
    # The third step, which no line has told, is not told by the next call's first one.
    pairs.args.logging_steps, pairs.args.max_steps = 1, 1
    pairs.train()
    first = [line for line in pairs.state.log_history if "loss" in line][0]
    vlm = fa.VLM(each.model)
    assert first["ce"] == pytest.approx(
        fa.objectives.sft(vlm, run.collate(range(4)))["ce"].item(), rel=1e-3
    )


def test_evaluation(tmp_path):
    """`evaluate` before any training; the value by batch, and terms by label token."""
    made = run.trainer(tmp_path, per_device_eval_batch_size=2)
    metrics = made.evaluate()
    vlm, batches = fa.VLM(run.model()), [run.collate([0, 1]), run.collate([2, 3])]
    terms = [fa.objectives.cal(vlm, batch) for batch in batches]
    assert metrics["eval_loss"] == pytest.approx(sum(t["loss"].item() for t in terms) / 2)
    whole = fa.objectives.cal(vlm, run.collate(range(4)))
    for name in ("ce", "accuracy", "delta", "weight"):
        assert metrics[f"eval_{name}"] == pytest.approx(whole[name].item(), rel=1e-5)
    loss, outputs = made.compute_loss(made.model, batches[0], return_outputs=True)
    assert loss.item() == pytest.approx(terms[0]["loss"].item()) and "ce" in outputs
    predicted = made.predict(list(range(2)))
    assert predicted.predictions is None and predicted.label_ids is None
    assert predicted.metrics["test_ce"] == pytest.approx(terms[0]["ce"].item())


def test_evaluation_while_training(tmp_path):
    made, _ = run.run(tmp_path, eval_strategy="steps", eval_steps=1)
    lines = made.state.log_history
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2]
    assert "forward" not in vars(made.model)


def test_saved_model_is_the_plain_model(tmp_path):
    made, _ = run.run(tmp_path)
    made.save_model()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    batch = {k: v for k, v in run.collate([0, 1]).items() if k != "teacher"}
    torch.testing.assert_close(loaded(**batch).logits, made.model.eval()(**batch).logits)


@pytest.mark.parametrize("objective", ["cal", "deepalign"])
def test_resumed_run_ends_as_an_undisturbed_one(tmp_path, objective):
    def fresh():
        made, state = run.adapted() if objective == "deepalign" else (run.model(), None)
        changes = {
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "optim": "adamw_torch",
        }
        changes |= {"learning_rate": 1e-3, "size": 16}
        return run.trainer(tmp_path, objective, made=made, state=state, **changes)

    whole = fresh()
    whole.train()
    resumed = fresh()
    if objective == "deepalign":  # it is the checkpoint's state that goes on
        resumed.alignment_state.direction.mean.add_(1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert run.losses(resumed) == run.losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    last, first = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    plain = LlavaForConditionalGeneration.from_pretrained(last).state_dict()
    assert all(torch.equal(v, whole.model.state_dict()[k]) for k, v in plain.items())
    if objective == "deepalign":
        other = run.model()
        fa.load_adapter(other, last / "fastalign/adapter")
        stored = load_file(last / "fastalign/deepalign_state.safetensors")
        assert torch.equal(stored["direction.mean"], whole.alignment_state.direction.mean)
        (first / "fastalign/deepalign_state.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"deepalign_state\.safetensors"):
            fresh().train(resume_from_checkpoint=str(first))


def test_a_checkpoint_without_a_tensor_is_refused(tmp_path):
    changes = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run.run(tmp_path, **changes)
    path = tmp_path / "checkpoint-1/model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(name for name in tensors if "norm.weight" in name))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks \[.*norm\.weight"):
        run.trainer(tmp_path, **changes).train(resume_from_checkpoint=str(path.parent))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    made, _ = run.run(
        tmp_path,
        **changes,
        max_steps=2,
        learning_rate=0.2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ce",
        greater_is_better=False,
    )
    values = [line["eval_ce"] for line in made.state.log_history if "eval_ce" in line]
    assert values.index(min(values)) == 0  # too large a step: the last is not the best
    assert made.evaluate()["eval_ce"] == pytest.approx(min(values), rel=1e-6)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "changes", "match"),
    [
        ("dpo", {}, "objective must be one of"),
        ("cal", {"objective_options": {"clip": 1}}, r"objective_options must be of .*\['clip'\]"),
        ("sft", {"objective_options": {"window": 3}}, "objective_options must be None"),
        ("deepalign", {}, "state must be a DeepAlignState"),
        ("cal", {"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ("sft", {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        ("sft", {"torch_compile": True}, "torch_compile must be False"),
    ],
)
def test_bad_options(tmp_path, objective, changes, match):
    with pytest.raises(ValueError, match=match):
        run.trainer(tmp_path, objective, **changes)


def test_bad_use(tmp_path):
    _, state = run.adapted()
    with pytest.raises(ValueError, match="state must be"):
        run.trainer(tmp_path, "cal", state=state)
    for name in ("compute_metrics", "compute_loss_func"):
        with pytest.raises(ValueError, match="full logits"):
            AlignmentTrainer(
                model=run.model(), args=run.arguments(tmp_path), **{name: lambda *a, **k: {}}
            )
    made = run.trainer(tmp_path)
    with pytest.raises(RuntimeError, match="get_batch_samples"):
        made.training_step(made.model, run.collate([0]))
    with pytest.raises(ValueError, match="optim must not step inside the backward"):
        run.trainer(tmp_path, optim="galore_adamw_layerwise", optim_target_modules=["mlp"])
    with pytest.raises(TypeError, match="image-text-to-text"):
        AlignmentTrainer(model=nn.Linear(2, 2), args=run.arguments(tmp_path))


@pytest.mark.parametrize(
    ("options", "stage", "match"),
    [({}, 2, 'must not be "mean" with DeepSpeed'), ({"normalize": "tokens"}, 3, "ZeRO stage")],
)
def test_deepspeed_is_refused_where_it_would_be_wrong(tmp_path, options, stage, match):
    class Sharded(AlignmentTrainer):
        """Says that it runs on DeepSpeed, which is not installed."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = SimpleNamespace(zero_stage=stage)
            self.is_deepspeed_enabled = True
            self.accelerator = SimpleNamespace(
                state=SimpleNamespace(deepspeed_plugin=plugin),
                unwrap_model=lambda model: model,
                gather_for_metrics=None,
            )

    with pytest.raises(ValueError, match=match):
        Sharded(
            model=run.model(),
            args=run.arguments(tmp_path),
            objective="cal",
            objective_options=options,
        )


def test_options_are_given_as_a_config_too(tmp_path):
    options = CALConfig(clamp=(1.0, 1.0))
    _, line = first_step(tmp_path, "cal", objective_options=options)
    assert line["weight"] == 1.0 and line["loss"] == pytest.approx(line["ce"])


def test_the_package_needs_no_transformers():
    code = "import sys; sys.modules |= {'transformers': None, 'trl': None, 'accelerate': None}\n"
    code += "import fastalign, fastalign.integrations"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the call that an engine sees ----------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args) + 1


def test_call_inside_goes_through_the_wrapper_once():
    inner = nn.Linear(2, 2)
    wrapper, calls = Wrapper(inner), []
    inner.register_forward_pre_hook(lambda m, args: calls.append("hook"))

    def function(x):
        calls.append("function")
        return inner(x) * 2  # its own forward again

    x = torch.ones(1, 2)
    result = call_inside(wrapper, inner, function, x)
    torch.testing.assert_close(result, nn.functional.linear(x, inner.weight, inner.bias) * 2 + 1)
    assert calls == ["hook", "function", "hook"] and "forward" not in vars(inner)


def test_call_inside_leaves_no_trace_of_a_failure():
    inner = nn.Linear(2, 2)
    inner.forward = own = lambda x: x + 5  # as mixed precision of accelerate does

    def function(x):
        raise KeyError("x")

    with pytest.raises(KeyError):
        call_inside(Wrapper(inner), inner, function, torch.ones(1))
    assert inner.forward is own
    assert call_inside(inner, inner, lambda x: inner(x), torch.ones(1)).item() == 6


# -- two ranks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two gloo ranks found, each, and what one process finds."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(RUN), str(folder), str(rank), "2", port],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    alone = run.all_runs(folder / "alone", 2)
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    found = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    return found, alone, folder


NAMES = ["cal", "cal, checkpointed", "sft", "deepalign"]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process(ranks, name):
    """The second rank has no image in the first step, the first none in its last micro-batch."""
    (first, second), alone, _ = ranks
    first, second, alone = first[name], second[name], alone[name]
    for other in (second, alone):
        (mine, then), (wanted, later) = first["gradients"], other["gradients"]
        assert distance(mine, wanted) < 3e-6
        assert distance(then, later) < 1e-5  # of parameters that differ by rounding
        assert distance(first["parameters"], other["parameters"]) < 1e-6
    assert [line.keys() for line in first["log"]] == [line.keys() for line in alone["log"]]
    for line, expected in zip(first["log"], alone["log"], strict=True):
        for key, value in expected.items():
            # At rest the displacement is rounding, which the cosine divides by a thousandth.
            small = 1e-4 if key.startswith("cos_") else 1e-6
            assert line[key] == pytest.approx(value, rel=1e-5, abs=small), key
    for key, value in alone["eval"].items():
        assert first["eval"][key] == pytest.approx(value, rel=1e-5)
        assert second["eval"][key] == pytest.approx(value, rel=1e-5)


def test_a_rank_saves_the_plain_model(ranks):
    found, _, folder = ranks
    loaded = LlavaForConditionalGeneration.from_pretrained(folder / "saved").state_dict()
    for name, value in found[0]["cal, checkpointed"]["parameters"].items():
        assert torch.equal(loaded[name], value)


# -- PEFT and TRL --------------------------------------------------------------------------------


def lora(targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(run.model(), peft.LoraConfig(target_modules=targets, r=2))


def test_lora(tmp_path):
    """The low-rank matrices get the gradients of the objective, and alone are saved."""
    made = lora(["q_proj", "v_proj"])
    grads, line = first_step(tmp_path, "cal", (1, 4), made=made)
    other = lora(["q_proj", "v_proj"])
    loss = fa.objectives.cal(fa.VLM(other.get_base_model()), run.collate(range(4)))["loss"]
    assert line["loss"] == pytest.approx(loss.item(), rel=3e-6)
    assert all("lora" in name for name in grads)
    assert distance(grads, gradients(other, loss)) < 3e-6
    saved = run.trainer(tmp_path, made=made)
    saved.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()


def test_lora_on_the_head_is_refused(tmp_path):
    with pytest.raises(TypeError, match="output embedding must be a plain nn.Linear"):
        run.trainer(tmp_path, made=lora(["lm_head"]))


@pytest.fixture
def vision(monkeypatch):
    """The demo's processor and conversations with pictures, as TRL takes them."""
    pytest.importorskip("trl")
    monkeypatch.setenv("CI", "1")  # TRL counts its uses on line
    from datasets import Dataset
    from PIL import Image

    from fastalign.demo.base import build_processor
    from fastalign.demo.scenes import scenes

    shown = scenes(4, seed=3)
    rows = []
    for i, caption in enumerate(shown.captions):
        picture = [] if i == 3 else [Image.fromarray(shown.images[i])]
        prompt = [{"role": "user", "content": caption}]
        rows.append(
            {
                "prompt": prompt,
                "completion": [{"role": "assistant", "content": caption}],
                "images": picture,
            }
        )
    return build_processor(), Dataset.from_list(rows)


def sft_trainer(folder, vision, **changes):
    from trl import SFTConfig

    from fastalign.demo.base import build_model
    from fastalign.integrations.trl import AlignmentSFTTrainer

    processor, rows = vision
    own = {k: changes.pop(k) for k in ("objective_options", "peft_config") if k in changes}
    plain = run.arguments(folder, **changes)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
    names += ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "logging_steps")
    names += ("save_strategy", "train_sampling_strategy", "report_to", "use_cpu", "disable_tqdm")
    kept = {name: getattr(plain, name) for name in names}
    kept |= {"activation_checkpointing": False, "bf16": False}  # TRL turns both on
    return AlignmentSFTTrainer(
        model=build_model(0),
        args=SFTConfig(output_dir=str(folder), max_length=None, **kept),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        objective="cal",
        **own,
    )


def test_trl(tmp_path, vision):
    """A vision dataset as TRL takes it; gradients are those of the objective on TRL's batch."""
    seen = run.Gradients()
    made = sft_trainer(
        tmp_path, vision, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1
    )
    made.add_callback(seen)
    batch = made.data_collator([dict(row) for row in vision[1]])
    model = type(made.model)(made.model.config)
    model.load_state_dict(made.model.state_dict())
    terms = fa.objectives.cal(fa.VLM(model), batch)
    made.train()
    line = made.state.log_history[0]
    for name in ("loss", "ce", "delta", "weight"):
        assert line[name] == pytest.approx(terms[name].item(), rel=1e-5)
    assert "entropy" not in line
    assert distance(seen.steps[0], gradients(model, terms["loss"])) < 1e-5
    metrics = made.evaluate()
    assert metrics["eval_ce"] < terms["ce"].item()
    made.save_model()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in made.model.state_dict().items())


def test_trl_image_tokens_are_no_labels(tmp_path, vision):
    """TRL's collator leaves them in the labels of conversations."""
    processor, rows = vision
    talks = rows.map(
        lambda row: {"messages": row["prompt"] + row["completion"]},
        remove_columns=["prompt", "completion"],
    )
    made = sft_trainer(tmp_path, (processor, talks), max_steps=1)
    batch = made.data_collator([dict(row) for row in talks])
    image = batch["input_ids"] == made.model.config.image_token_id
    assert (batch["labels"][image] != -100).all()
    made.train()
    assert math.isfinite(made.state.log_history[0]["loss"])


def test_trl_with_lora(tmp_path, vision):
    peft = pytest.importorskip("peft")
    made = sft_trainer(
        tmp_path, vision, max_steps=1, peft_config=peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    made.train()
    assert math.isfinite(made.state.log_history[0]["loss"])
    made.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_mixin_works_over_any_trainer(tmp_path):
    """A trainer of one's own: its hooks still run."""

    class Own(Trainer):
        def training_step(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().training_step(*args, **kwargs)

    class Aligned(AlignmentMixin, Own):
        pass

    made = Aligned(
        model=run.model(),
        args=run.arguments(tmp_path),
        train_dataset=list(range(8)),
        data_collator=run.collate,
        objective="cal",
    )
    made.train()
    assert made.calls == 4 and run.losses(made) == run.losses(run.run(tmp_path)[0])
