"""Checkpoints of a linear layer and its AdamW, without a run."""

import torch

from fastalign import checkpoint


def trained(value=0.0):
    """A layer whose weights are told by the step they are of, and an optimizer with moments."""
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(value)
    return dict(layer.named_parameters()), optimizer


def states(step):
    return {
        name: {"step": step} if name.endswith(".json") else {"value": torch.tensor([step])}
        for name in checkpoint.STATES
    }


def save(folder, step, keep=2, value=None):
    tensors, optimizer = trained(float(step) if value is None else value)
    return checkpoint.save(folder, step, tensors, optimizer, states(step), keep)
