"""Runs in which a step is not finite."""

import math

import _train_run as run

import fastalign as fa
from fastalign.objectives import DeepAlignConfig

BAD = 3  # the step that is not finite
PAIRS = DeepAlignConfig(classifier_pairs=8, classifier_steps=2)


class Fault:
    """A collate function that knows the step, and hands out what a step is to be like.

    Attributes:
        on: Whether the batches are those of a bad step, also while it is diagnosed.
    """

    def __init__(self, spoil=None, last=BAD, start=0):
        self.model = run.model()
        self.spoil, self.last, self.batches, self.on = spoil, last, 2 * start, False

    def __call__(self, indices):
        batch = run.collate(indices)
        if not self.model.training:  # the classifier's pairs, before the steps and after them
            return batch
        self.step, micro = self.batches // 2 + 1, self.batches % 2
        self.batches += 1
        self.on = BAD <= self.step <= self.last
        if self.on and micro == 1 and self.spoil is not None:
            self.spoil(batch)
        return batch

    def times(self, factor):
        """A hook on a module's output."""
        return lambda module, args, output: output * factor if self.on else None


def train(folder, fault, objective="sft", collate=None, **changes):
    config = run.config(folder, objective, deepalign=PAIRS, **({"save_every": 1} | changes))
    return fa.train(config, model=fault.model, dataset=range(20), collate=collate or fault)


def poison(name, row=0, value=math.nan):
    def spoil(batch):
        if name in batch:
            batch[name][row].view(-1)[5] = value

    return spoil
