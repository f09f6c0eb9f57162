"""What older versions of transformers do otherwise."""

import pytest
import transformers
from packaging.version import Version

INSTALLED = Version(transformers.__version__)
CHECKPOINTING = (
    "activation_checkpointing" if Version("5.23") <= INSTALLED else "gradient_checkpointing"
)
"""The option of transformers.TrainingArguments."""


def applies_softcap(name: str) -> bool:
    """Whether this family's class, which has images, applies the softcap of its text model."""
    return name.startswith("paligemma") and Version("5.23") <= INSTALLED


# Before 5.23 image tokens were put in place by masked_scatter, which torch.compile refuses.
whole_graph_needed = pytest.mark.skipif(
    Version("5.23") > INSTALLED, reason="models are no whole graph in transformers < 5.23"
)
