"""CAL and DeepAlign under FSDP2: two gloo ranks give the gradients of one process.

Run as a script, this file is one of the ranks: test_fsdp.py FOLDER RANK.
"""

import datetime
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastalign as fa
from fastalign.integrations._engine import call_inside
from fastalign.objectives import DeepAlignConfig, DeepAlignState
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

# What each rank holds. A rank without images has no contrast to take and no use for the vision
# tower, and must not leave the other one waiting for it: these cases come last, since a hang or a
# crash ends the ranks.
ONE = (["ttityyy", "tityy"], ["tyyyy", "ttyy"])
BATCHES = {
    "images on both": (["ttityyy", "tyy"], ["tityyty", "ttiyy"]),
    "images on none": (["tyy", "tyyyy"], ["ttyyy"]),
    "images on one, vision frozen": ONE,
    "images on one": ONE,
}
# Sharded as a module around the model, as the model, with head and final norm of their own, and as
# accelerate asks for by default: the root too gives its weights back after its forward.
ROOTS = ("step", "model", "tail", "returning")


# DeepAlign with its adapter: the base runs a second time, and the adapter lies in the root.
DEEPALIGN = {
    "deepalign, images on both": BATCHES["images on both"],
    "deepalign, images on none": BATCHES["images on none"],
    "deepalign, images on one": ONE,
}
CASES = BATCHES | DEEPALIGN
RUNS = [(case, root) for case in BATCHES for root in ROOTS]
RUNS += [(case, root) for case in DEEPALIGN for root in ("step", "model")]


class Step(nn.Module):
    """The loss as the output of one module."""

    def __init__(self, vlm, objective):
        super().__init__()
        self.model, self._objective = vlm.model, objective

    def forward(self, batch, totals):
        return self._objective(batch, totals=totals)


def micro_batches(case):
    batches = [llava_batch(samples, seed=i) for i, samples in enumerate(CASES[case])]
    if case in DEEPALIGN:
        for i, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(i)
            images = len(batch.get("pixel_values", ()))
            batch["teacher"] = torch.randn(images, TOKENS, 5, generator=generator)
    return batches


def objective_of(case, vlm):
    """The objective, and whether its shares are divided by a sum of weights at the end."""
    if case not in DEEPALIGN:
        return functools.partial(fa.objectives.cal, vlm)
    # The negatives of mutual information are those of all ranks, and here of one batch.
    config = DeepAlignConfig(layers=(1, 2), student_layers=(2,), without=("mutual",))
    torch.manual_seed(3)
    state = DeepAlignState(vlm, config)
    state.direction.update(torch.randn(4, vlm.hidden_size, generator=torch.manual_seed(4)))
    return functools.partial(fa.objectives.deepalign, vlm, state=state)


def model_of(case):
    model = tiny_llava(head_scale=3.0)
    if case in DEEPALIGN:
        model.requires_grad_(False)
        adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(2,), shift_hidden_dim=5))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    if "frozen" in case:
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
    return model


def totals_of(vlm, batches):
    counts = [fa.objectives.counts(vlm, batch) for batch in batches]
    totals = {name: sum(c[name] for c in counts).float() for name in counts[0]}
    return {**totals, "batches": torch.tensor(float(len(batches)))}


def one_process(case):
    """Gradients and loss of the weighted sum over both batches, divided by the summed weights."""
    vlm = fa.VLM(model_of(case))
    batches, objective = micro_batches(case), objective_of(case, vlm)
    totals = totals_of(vlm, batches)
    shares = [objective(batch, totals=totals) for batch in batches]
    whole = sum(share.get("weight_sum", torch.tensor(0.5)) for share in shares)
    loss = sum(share["loss"] for share in shares) / whole
    loss.backward()
    grads = {k: p.grad for k, p in vlm.model.named_parameters() if p.grad is not None}
    return grads, loss.detach()


def shard(root, case):
    """The view of a sharded model, and (batch, totals) -> terms through its outermost call."""
    model = model_of(case)
    vlm = fa.VLM(model)
    objective = objective_of(case, vlm)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in vlm.layers:
        fully_shard(layer, mesh=mesh)
    if root == "step":
        step = Step(vlm, objective)
        fully_shard(step, mesh=mesh)
        return vlm, step
    if root == "tail":
        fully_shard([vlm.decoder.norm, vlm.head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=True if root == "returning" else None)

    def call(batch, totals):
        return call_inside(model, model, functools.partial(objective, totals=totals), batch)

    return vlm, call


def one_rank(folder, rank):
    """All cases in one process: starting it costs more than running it."""
    store, limit = f"file://{folder}/store", datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    for case, root in RUNS:
        vlm, call = shard(root, case)
        batches = micro_batches(case)
        terms = call(batches[rank], totals_of(vlm, batches))
        (terms["loss"] * 2).backward()  # FSDP averages gradients, and the shares are to be added
        sums = torch.stack([terms.get("weight_sum", torch.tensor(0.5)), terms["loss"].detach()])
        dist.all_reduce(sums)
        named = vlm.model.named_parameters()
        grads = {k: (p.grad / sums[0]).full_tensor() for k, p in named if p.grad is not None}
        if rank == 0:
            torch.save([grads, sums[1] / sums[0]], f"{folder}/{root}, {case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of what two ranks computed, and what they said if they failed."""
    folder = tmp_path_factory.mktemp("fsdp")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), str(rank)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    return folder, [e for e, process in zip(errors, ranks, strict=True) if process.returncode]


@pytest.mark.parametrize(("case", "root"), RUNS)
def test_gradients_are_those_of_one_process(sharded, root, case):
    folder, errors = sharded
    path = folder / f"{root}, {case}.pt"
    assert path.is_file(), "\n".join(errors)
    grads, loss = torch.load(path, weights_only=True)
    expected, whole = one_process(case)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=0)
    # A parameter that only the other rank used has a gradient of 0 here, or none.
    for name in expected.keys() | grads.keys():
        wanted = expected.get(name, torch.zeros(()))
        distance = (grads.get(name, torch.zeros(())) - wanted).norm()
        # The bias of keys has no gradient but rounding.
        assert distance <= 1e-5 * wanted.norm() + 1e-6, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(Path(sys.argv[1]), int(sys.argv[2]))
