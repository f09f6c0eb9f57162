"""The fused row-wise ops, usable alone: a kernel on CUDA, the reference elsewhere."""

from fastalign.ops.calibrate import calibrate as calibrate
from fastalign.ops.hadamard_reweight import hadamard_reweight as hadamard_reweight
from fastalign.ops.label_logits import label_logits as label_logits

__all__ = ["calibrate", "hadamard_reweight", "label_logits"]
