"""The methods' lines in plain differentiable torch: the specification, and the oracle of the tests.

Everything here computes in float32 or wider and checks nothing: the public functions of
`fastalign.ops` and `fastalign.losses` check their arguments and then call it.
"""

from fastalign.reference.calibrate import calibrate as calibrate
from fastalign.reference.contrast_weights import contrast_weights as contrast_weights
from fastalign.reference.hadamard_reweight import hadamard_reweight as hadamard_reweight
from fastalign.reference.label_logits import label_logits as label_logits
from fastalign.reference.linear_cross_entropy import CrossEntropy as CrossEntropy
from fastalign.reference.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastalign.reference.mutual_information import mutual_information as mutual_information
from fastalign.reference.shift_align import shift_align as shift_align
from fastalign.reference.structure_distill import structure_distill as structure_distill
from fastalign.reference.syrk import syrk as syrk
