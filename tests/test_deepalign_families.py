"""DeepAlign's whole step on every family: patches against their teacher, gradients to adapters."""

import pytest
import torch
import torch.nn.functional as F
from _versions import whole_graph_needed

import fastalign as fa
from fastalign.adapters import adapter_of
from fastalign.objectives import DeepAlignConfig, DeepAlignState
from fastalign.testing.families import FAMILIES, RECURRENT, family, family_batch, samples_for

FAMILIES = [name for name in (*FAMILIES, *RECURRENT) if name != "mllama"]
QFORMERS = ("instructblip", "instructblip_opt", "blip2")
WIDTH = 6


def teacher_for(vlm):
    """Maps of 5 x 3 cells of each view, a function of its pixels."""

    def features(batch):
        maps = []
        for view in vlm.views(batch):
            colours = F.interpolate(view[None].float(), (5, 3), mode="area")[0].permute(1, 2, 0)
            maps.append(torch.cat([colours, colours.roll(1, 0).sin()], -1))
        return torch.stack(maps)

    return features


def prepared(name, samples=None, **options):
    """A frozen model with a shift module that does something, a batch and DeepAlign's state."""
    model = family(name)
    model.requires_grad_(False)
    fa.attach(model, fa.AdapterConfig(shift_layers=(1,), shift_hidden_dim=4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_of(model).parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    vlm = fa.VLM(model)
    batch = family_batch(name, model, samples or samples_for(name))
    config = DeepAlignConfig(student_layers=(1, 3), layers=(1, 2), **options)
    torch.manual_seed(0)
    return vlm, batch, DeepAlignState(vlm, config, teacher_for(vlm))


def similarities(rows):
    unit = F.normalize(rows.double(), dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize("name", FAMILIES)
def test_visual_term_view_by_view(name):
    """The term against a loop over views, each with its teacher resampled to its own grid."""
    vlm, batch, state = prepared(name)
    terms = fa.objectives.deepalign(vlm, batch, state=state)
    maps, hidden = teacher_for(vlm)(batch), vlm.hidden_states(batch)
    qformer = name in QFORMERS
    patches = vlm.queries(batch) if qformer else vlm.patches(batch)
    looks = vlm.forward(batch).looks
    expected = []
    for k in state.student_layers:
        rows = patches.of(hidden[k - 1]).split(patches.lengths)
        for view, (student, grid) in enumerate(zip(rows, patches.grids, strict=True)):
            grid = (4, 4) if qformer else grid
            image = maps[view].permute(2, 0, 1)[None].double()
            target = F.interpolate(image, grid, mode="bilinear", antialias=True)[0]
            target = target.flatten(1).T
            if qformer:  # of 17 tokens the first is the class token
                seen = looks[view, :, 1:].double()
                target = seen / seen.sum(1, keepdim=True) @ target
            difference = similarities(student) - similarities(target)
            expected.append(difference.square().mean())
    torch.testing.assert_close(
        terms["visual"].double(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_each_term_reaches_the_adapter_and_nothing_else(name):
    vlm, batch, state = prepared(name)
    vlm.model.train()
    loss = fa.objectives.deepalign(vlm, batch, state=state)
    assert all(value.isfinite() for value in loss.values()), loss
    assert {"global", "instance", "mutual", "visual", "ce"} <= set(loss)
    loss["loss"].backward()
    adapter = {id(p) for p in adapter_of(vlm.model).parameters()}
    for key, parameter in vlm.model.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert moved == (id(parameter) in adapter), key
    vlm.model.zero_grad()
    shift = next(iter(adapter_of(vlm.model).shifts.values()))
    for term in ("instance", "mutual", "visual"):
        without = {"instance", "mutual", "global", "distillation"} - {term}
        without -= {"distillation"} if term == "visual" else set()
        only = DeepAlignState(
            vlm, DeepAlignConfig(layers=(1, 2), without=tuple(sorted(without))), teacher_for(vlm)
        )
        plain = fa.objectives.deepalign(vlm, {**batch}, state=only)
        (plain["loss"] - fa.objectives.sft(vlm, batch)["loss"]).backward()
        assert shift.conv2.weight.grad.abs().max() > 1e-7, term
        vlm.model.zero_grad()


def test_features_of_every_form_are_the_same_teacher():
    """Square rows in the batch, maps, a list of maps, and rows with their grid."""
    vlm, batch, state = prepared("llava", ["tiyy", "iyyy"])
    maps = torch.randn(2, 4, 4, WIDTH)
    found = []
    for given in (
        {"teacher": maps.flatten(1, 2)},
        {"teacher": maps},
        {"teacher": list(maps)},
        {"teacher": maps.flatten(1, 2), "teacher_grid": (4, 4)},
    ):
        found.append(fa.objectives.deepalign(vlm, {**batch, **given}, state=state)["visual"])
    assert all(torch.equal(value, found[0]) for value in found)
    wide = torch.randn(2, 2 * 8, WIDTH)
    one = fa.objectives.deepalign(
        vlm, {**batch, "teacher": wide, "teacher_grid": (2, 8)}, state=state
    )
    other = fa.objectives.deepalign(
        vlm, {**batch, "teacher": wide.view(2, 2, 8, WIDTH)}, state=state
    )
    # 16 rows fit the student's own grid of 4 x 4, unless they say that they are 2 x 8.
    assert not torch.equal(other["visual"], found[0])
    assert torch.equal(one["visual"], other["visual"])


def test_wrong_features_are_named():
    vlm, batch, state = prepared("llava_next", ["tiyy"])
    with pytest.raises(ValueError, match="each of the 2 views .*: got 1"):
        fa.objectives.deepalign(vlm, {**batch, "teacher": torch.randn(1, 16, 3)}, state=state)
    with pytest.raises(ValueError, match=r"square grid, or batch\[teacher_grid\]: got n = 15"):
        fa.objectives.deepalign(vlm, {**batch, "teacher": torch.randn(2, 15, 3)}, state=state)
    state = DeepAlignState(vlm, DeepAlignConfig())
    with pytest.raises(ValueError, match="needs teacher features"):
        fa.objectives.deepalign(vlm, batch, state=state)


# One compiled graph


@pytest.fixture
def whole_graphs():
    """As transformers' own forward needs them to be one graph."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        yield
    torch._dynamo.reset()


@whole_graph_needed
@pytest.mark.parametrize(("name", "backend"), [("llava", "aot_eager"), ("internvl", "eager")])
def test_joint_step_compiles_whole(whole_graphs, name, backend):
    """All terms, with the second pass inside: value, gradients and the direction are eager's."""
    vlm, batch, state = prepared(name)
    batch["teacher"] = teacher_for(vlm)(batch)
    vlm.model.train()

    def run(objective):
        state.direction.restart(torch.zeros(0, vlm.hidden_size))
        vlm.model.zero_grad()
        loss = objective(batch)["loss"]
        loss.backward()
        gradients = [p.grad.clone() for p in adapter_of(vlm.model).parameters()]
        return [loss.detach(), state.direction.value, *gradients]

    def step(inputs):
        return fa.objectives.deepalign(vlm, inputs, state=state)

    expected = run(step)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules())
    with vlm.compilable(batch):
        found = run(torch.compile(step, fullgraph=True, backend=backend))
    assert hooks == sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in vlm.model.modules()
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_compilable_changes_no_pass_outside_a_graph():
    vlm, batch, _ = prepared("llava")
    plain = vlm.hidden_states(batch)
    fresh = fa.VLM(vlm.model)
    with fresh.compilable(batch):
        assert fresh.logit_scale == 1.0 and fresh._transform is not None
        assert all(
            torch.equal(a, b) for a, b in zip(fresh.hidden_states(batch), plain, strict=True)
        )
