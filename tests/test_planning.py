"""`fastalign.planning` against what real models of three families have, keep and compute."""

import functools
import math

import pytest
import torch
from _planned import ADAPTER, FAMILIES, batch_for, config_of, options_for, prepared
from _planned import build as build_model
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastalign as fa
from fastalign.objectives import DeepAlignConfig, DeepAlignState
from fastalign.ops import _lce_portable, _structure_portable
from fastalign.planning import TEACHERS, PlanConfig, make_plan
from fastalign.planning._flops import find_gradient
from fastalign.planning._memory import activations
from fastalign.planning._sizes import measure
from fastalign.planning._teacher import measure_teacher
from fastalign.testing.families import family_batch


@pytest.fixture
def open_operators(monkeypatch):
    """The counter does not look into operators of our own: their bodies run in their place."""
    for module, name in (
        (_lce_portable, "linear_cross_entropy_fwd"),
        (_lce_portable, "linear_cross_entropy_bwd_weight"),
        (_structure_portable, "structure_distill_fwd"),
        (_structure_portable, "structure_distill_bwd"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)


def counted(step):
    """FLOPs of matrix products, convolutions and attention."""
    aten = torch.ops.aten

    # What the counter does not know; of shapes.
    missing = {
        aten.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[1],
        aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[2],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: (
            2 * math.prod(q) * (k[2] + v[2])
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=missing) as counter:
        step()
    return counter.get_total_flops()


def close(plan, step, skip=(), tolerance=1e-3):
    planned = sum(v for k, v in plan.flops.items() if k not in skip)
    measured = counted(step) / plan.options.batch_size
    assert measured == pytest.approx(planned, rel=tolerance), (plan.flops, measured / planned)


# -- parameters and bytes ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(name):
    config = config_of(name)
    model = build_model(config)
    vlm = fa.VLM(model)
    plan = make_plan(config, PlanConfig(adapter=ADAPTER, teacher="dinov2-small"))
    parts = dict(plan.parameters)
    # Published: DINOv2 ViT-S/14, 22.1 M parameters.
    assert parts.pop("teacher") == pytest.approx(22.1e6, rel=0.01)
    assert parts.pop("adapter") == fa.adapters.adapter_parameters(ADAPTER, config)["total"]
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert parts["decoder"] == sum(p.numel() for p in vlm.decoder.parameters())
    assert parts["head"] == vlm.head.weight.numel()
    merger = getattr(vlm.vision_tower, "merger", torch.nn.Identity())
    assert parts["tower"] == sum(p.numel() for p in vlm.vision_tower.parameters()) - sum(
        p.numel() for p in merger.parameters()
    )
    assert plan.trained == plan.parameters["adapter"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_gradients_and_moments_are_exact(name, everything):
    config = config_of(name)
    model = prepared(config, everything=everything, adapter=not everything)
    batch = batch_for(name, model)
    trainable = "all" if everything else "adapters"
    options = options_for(name, batch, objective="sft", trainable=trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    fa.objectives.sft(fa.VLM(model), batch)["loss"].backward()
    optimizer.step()
    memory = make_plan(config, options).memory
    assert memory["weights"] == sum(p.nbytes for p in model.parameters())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert memory["gradients"] == sum(g.nbytes for g in grads)
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert memory["optimizer moments"] == sum(m.nbytes for m in moments)


# -- FLOPs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_flops(name, open_operators):
    config = config_of(name)
    model = build_model(config).eval()
    batch = batch_for(name, model)
    plan = make_plan(config, options_for(name, batch, objective="sft", trainable="all"))
    vlm = fa.VLM(model)

    @torch.no_grad()
    def step():
        fa.objectives.sft(vlm, batch)

    close(plan, step, [k for k in plan.flops if k.startswith("backward")])


@pytest.mark.parametrize("trainable", ["adapters", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sft_flops(name, trainable, open_operators):
    config = config_of(name)
    everything = trainable == "all"
    model = prepared(config, everything=everything, adapter=not everything)
    batch = batch_for(name, model)
    plan = make_plan(config, options_for(name, batch, objective="sft", trainable=trainable))
    vlm = fa.VLM(model)
    close(plan, lambda: fa.objectives.sft(vlm, batch)["loss"].backward())


@pytest.mark.parametrize("trainable", ["adapters", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_deepalign_flops(name, trainable, open_operators):
    config = config_of(name)
    model = prepared(config, everything=trainable == "all", adapter=True)
    batch = batch_for(name, model)
    vlm = fa.VLM(model)
    settings = DeepAlignConfig(layers=(1, 2), student_layers=(3,))
    # The features have the width of the teacher planned with, on the student's grid.
    batch["teacher"] = [
        torch.randn(*grid, TEACHERS["dinov2-small"]["hidden_size"])
        for grid in vlm.patches(batch).grids
    ]
    state = DeepAlignState(vlm, settings)
    plan = make_plan(
        config,
        options_for(name, batch, trainable=trainable, deepalign=settings, teacher_cached=True),
    )
    assert plan.flops["teacher"] == 0
    close(plan, lambda: fa.objectives.deepalign(vlm, batch, state=state)["loss"].backward())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_pass_for_negatives_is_counted(name, open_operators):
    """Both passes of `mutual_shares`; the base model's is not run again in the step."""
    config = config_of(name)
    model = prepared(config, everything=False, adapter=True)
    batch = batch_for(name, model)
    vlm = fa.VLM(model)
    settings = DeepAlignConfig(layers=(1, 2), without=("distillation",))
    state = DeepAlignState(vlm, settings)
    plan = make_plan(config, options_for(name, batch, accumulation=2, deepalign=settings))
    both = plan.flops["second pass"] + plan.flops["pass for negatives"]
    step = lambda: fa.objectives.mutual_shares(vlm, [batch, batch], state=state)
    measured = counted(step) / (2 * plan.options.batch_size)
    assert measured == pytest.approx(both, rel=1e-3)
    alone = make_plan(config, options_for(name, batch, deepalign=settings))
    assert "pass for negatives" not in alone.flops


@pytest.mark.parametrize("trainable", ["adapters", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cal_flops(name, trainable, open_operators):
    config = config_of(name)
    everything = trainable == "all"
    model = prepared(config, everything=everything, adapter=not everything)
    batch = batch_for(name, model)
    plan = make_plan(config, options_for(name, batch, objective="cal", trainable=trainable))
    vlm = fa.VLM(model)
    close(plan, lambda: fa.objectives.cal(vlm, batch)["loss"].backward())


def test_teacher_flops(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    config.save_pretrained(tmp_path)
    sizes = measure_teacher(str(tmp_path), 42)
    teacher = Dinov2Model._from_config(config, attn_implementation="eager").eval()
    assert sizes.parameters == sum(p.numel() for p in teacher.parameters())
    assert (sizes.patches, sizes.width, sizes.itemsize) == (9, 32, 4)

    @torch.no_grad()
    def step():
        teacher(torch.zeros(1, 3, 42, 42))

    assert counted(step) == sizes.flops


@pytest.mark.parametrize("trainable", ["adapters", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_computes_layers_again(name, trainable, open_operators):
    config = config_of(name)
    everything = trainable == "all"
    model = prepared(config, everything=everything, adapter=not everything)
    # `gradient_checkpointing_enable` would also have the embeddings require a gradient.
    again = functools.partial(checkpoint, use_reentrant=False)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=again)
    batch, vlm = batch_for(name, model), fa.VLM(model)
    asked = {"objective": "sft", "trainable": trainable, "checkpointing": True}
    plan = make_plan(config, options_for(name, batch, **asked))
    assert plan.flops["recomputation"] > 0
    close(plan, lambda: fa.objectives.sft(vlm, batch)["loss"].backward())


# -- activations ---------------------------------------------------------------------------------


def kept_for_backward(vlm, batch, autocast):
    """Bytes of what autograd keeps in a forward pass, weights and their copies apart."""
    parameters = list(vlm.model.parameters())
    known = {x.untyped_storage().data_ptr() for x in (*parameters, *vlm.model.buffers())}
    shapes = {tuple(p.shape) for p in parameters if p.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    found = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and tuple(x.shape) not in shapes:
            found[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        vlm.forward(batch, labels_only=True)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_what_autograd_keeps(name, everything, dtype):
    config = config_of(name)
    config.get_text_config().num_key_value_heads = 4  # the CPU's attention keeps scores otherwise
    model = prepared(config, everything=everything, adapter=not everything, attention="sdpa")
    if dtype == "bfloat16" and not everything:
        model.to(torch.bfloat16)
        fa.adapters.adapter_of(model).float()
    batch, vlm = family_batch(name, model, ["ttttitt" + 150 * "y"]), fa.VLM(model)
    with torch.no_grad():
        vlm.forward(batch)  # the first pass also sees how logits are made
    trainable = "all" if everything else "adapters"
    asked = {"objective": "sft", "trainable": trainable, "dtype": dtype, "attention": "flash"}
    options = options_for(name, batch, **asked)
    sizes = measure(config, options)
    gradient = find_gradient(sizes, None if everything else ADAPTER, config, everything)
    planned = activations(sizes, gradient, options)
    kept = kept_for_backward(vlm, batch, dtype == "bfloat16")
    assert kept == pytest.approx(planned, rel=0.15), kept / planned


def test_flash_attention_skips_half_and_computes_scores_again():
    asked = {"objective": "sft", "adapter": ADAPTER}
    plans = [
        make_plan(config_of("llava"), PlanConfig(**asked, attention=kind)).flops
        for kind in ("eager", "flash")
    ]
    # 4 layers of 64 wide over 16 image and 170 text tokens, causal; the tower is not, 4 tokens
    # a side and a class token, 32 wide, and goes backward through its layers 3 and 4.
    square, tower = 4 * 4 * 64 * 186**2, 2 * 4 * 32 * 17**2
    forward, backward = (
        plans[0][phase] - plans[1][phase]
        for phase in ("decoder forward", "backward to activations")
    )
    assert forward == square / 2
    assert backward == (2 - 2.5 / 2) * square + (2 - 2.5) * tower
