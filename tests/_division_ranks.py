"""Runs whose steps of 32 samples are divided in different ways, in float64; and ranks for them.

_division_ranks.py FOLDER: two ranks, then four, each over all objectives.
"""

import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import _samples
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastalign as fa
from fastalign.config import CALConfig
from fastalign.metrics import ModalityIntegrationRate
from fastalign.objectives import DeepAlignConfig, DeepAlignState, deepalign, mutual_shares
from fastalign.testing.models import TOKENS, llava_batch, tiny_llava

# Lengths, labels and images differ: text only, no label, several images.
SAMPLES = ["ttityyy", "tyyyyy", "titiyyt", "ttt", "tyyt", "ttyiyiityyyyyyy", "it", "tiyyyyyyyyyyy"]
SAMPLES += ["tyyyytyy", "ttiyt"]
_classifier = {"classifier_steps": 20, "classifier_pairs": 12}
OBJECTIVES = {
    "sft": {"objective": "sft"},
    "cal": {"objective": "cal"},
    "cal by sample": {
        "objective": "cal",
        "cal": CALConfig(normalize="sample", mode="mask", window=5),
    },
    "deepalign": {"objective": "deepalign", "deepalign": DeepAlignConfig(**_classifier)},
    "deepalign, other options": {
        "objective": "deepalign",
        "deepalign": DeepAlignConfig(
            layers=(1, 3), pool="mean", kind="mse", estimator="gaussian", **_classifier
        ),
    },
}
# Ranks: samples in a micro-batch, micro-batches.
RANKED = {2: (4, 4), 4: (8, 1)}


def sample(index):
    batch = llava_batch([SAMPLES[index % len(SAMPLES)]], seed=index, dtype=torch.float64)
    if "pixel_values" in batch:
        generator = torch.Generator().manual_seed(index)
        shape = (len(batch["pixel_values"]), TOKENS, 5)
        batch["teacher"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return batch


def collate(indices):
    return _samples.merged([sample(index) for index in indices])


def train(folder, name, size, steps, data=range(70), **changes):
    """Every line of the log, and the adapter, of three steps whose gradients are clipped."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 3,
        "batch_size": size,
        "gradient_accumulation_steps": steps,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.1,
        "log_every": 1,
        "save_every": 0,
        "adapter": fa.AdapterConfig(shift_layers=(1, 2), calibration=True),
        "progress": False,
    }
    config = fa.TrainConfig(**(settings | OBJECTIVES[name] | changes))
    model = tiny_llava(head_scale=2.0, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the classifier has had 20 steps
        result = fa.train(config, model=model, dataset=data, collate=collate)
    adapter = fa.adapters.adapter_of(result.model)
    return result.history, {k: v.detach() for k, v in adapter.named_parameters()}


# -- by hand ---------------------------------------------------------------------------------------


def adapted(config, dropout=0.0):
    """A model whose adapter has moved, and a state whose classifier never fitted; float64."""
    model = tiny_llava(head_scale=2.0, dtype=torch.float64).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = fa.attach(model, fa.AdapterConfig(shift_layers=(1, 2), calibration=True))
        state = DeepAlignState(fa.VLM(model), config)
    with torch.no_grad():
        for parameter in adapter.requires_grad_(True).parameters():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
    return fa.VLM(model.train()), state, adapter


def totals_of(vlm, batches):
    counts = [fa.objectives.counts(vlm, batch) for batch in batches]
    return {name: sum(c[name] for c in counts).float() for name in counts[0]}


def shared_gradients(vlm, state, batches, totals, ranks=1, run=lambda batch, f: f(batch)):
    """Losses of a step's micro-batches, whose gradients are left in the parameters."""
    terms = []
    shares = mutual_shares(vlm, batches, state=state, run=run)
    for batch, mutual in zip(batches, shares, strict=True):
        objective = lambda b, m=mutual: deepalign(vlm, b, state=state, totals=totals, mutual=m)
        terms.append(run(batch, objective))
        (terms[-1]["loss"] * ranks).backward()
    return [{name: value.detach() for name, value in t.items()} for t in terms]


class Step(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, function):
        return function(batch)


# Of two ranks with two micro-batches each: the second rank's first one is text only.
SHARDED = ([[0, 1], [2]], [[1, 4], [5, 6, 8]])


def sharded_step(rank):
    """Value of the mutual term and gradients of a step under FSDP2."""
    vlm, state, adapter = adapted(DeepAlignConfig(without=("distillation",)))
    micro = [[collate(indices) for indices in part] for part in SHARDED]
    totals = totals_of(vlm, [batch for part in micro for batch in part])
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in vlm.layers:
        fully_shard(layer, mesh=mesh)
    step = Step(vlm.model)
    fully_shard(step, mesh=mesh)
    terms = shared_gradients(vlm, state, micro[rank], totals, 2, step)
    value = sum(t["mutual"] for t in terms)
    dist.all_reduce(value)
    return value, {k: p.grad.full_tensor() for k, p in adapter.named_parameters()}


def mir(rank, ranks):
    """MIR of the states of 32 samples, of which this rank sees its part."""
    vlm = fa.VLM(tiny_llava(dtype=torch.float64))
    metric = ModalityIntegrationRate(vlm.num_layers, vlm.hidden_size)
    share = 32 // ranks
    for first in range(rank * share, (rank + 1) * share, 4):
        batch = collate(range(first, first + 4))
        with torch.no_grad():
            hidden = vlm.hidden_states(batch)
        vision, text = vlm.vision_mask(batch), vlm.text_mask(batch)
        metric.update([h[vision] for h in hidden], [h[text] for h in hidden])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric.compute()


# -- ranks -----------------------------------------------------------------------------------------


def one_rank(folder, rank, ranks):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    # Accelerate wants to know of an address, but takes the group that there is.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    meet = f"file://{folder}/meet{ranks}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    found = {name: train(folder / f"{ranks} {name}", name, *RANKED[ranks]) for name in OBJECTIVES}
    found["mir"] = mir(rank, ranks)
    if ranks == 2:
        found["sharded"] = sharded_step(rank)
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")
    dist.barrier()


def all_ranks(folder, ranks, seconds=120.0):
    """Fork the ranks: importing costs more than what they do. 0 if all went well."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            status = 1
            try:
                one_rank(folder, rank, ranks)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                # What follows is the interpreter's teardown, in which threads now and then abort.
                os._exit(status)
        children.append(child)
    end, failed = time.monotonic() + seconds, 0
    while children:
        child, status = os.waitpid(children[0], os.WNOHANG)
        if child:
            children.pop(0)
            failed = failed or status
        elif time.monotonic() > end:
            for left in children:
                os.kill(left, 9)
            end, failed = float("inf"), 1
        else:
            time.sleep(0.05)
    return failed


if __name__ == "__main__":
    sys.exit(any([all_ranks(Path(sys.argv[1]), ranks) for ranks in RANKED]))
