"""The fused ops, usable alone: a kernel on CUDA, the reference or a leaner path elsewhere."""

from fastalign.ops.calibrate import calibrate as calibrate
from fastalign.ops.hadamard_reweight import hadamard_reweight as hadamard_reweight
from fastalign.ops.label_logits import label_logits as label_logits
from fastalign.ops.syrk import syrk as syrk

__all__ = ["calibrate", "hadamard_reweight", "label_logits", "syrk"]
