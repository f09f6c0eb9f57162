"""What is minimised: (VLM, batch) -> named terms, "loss" among them.

Called plainly, every term is a mean over the batch. In training a step may span several
micro-batches and ranks: `totals` then holds the counts over all of them, each micro-batch returns
its share, and the shares add up to the value that one large batch would give. DeepAlign's mutual
information is no sum over samples; what `mutual_shares` finds in all micro-batches makes it one.
"""

from fastalign.objectives._classifier import ClassifierAccuracy as ClassifierAccuracy
from fastalign.objectives._classifier import ClassifierReport as ClassifierReport
from fastalign.objectives._classifier import ModalityScore as ModalityScore
from fastalign.objectives._classifier import classifier_accuracy as classifier_accuracy
from fastalign.objectives._classifier import fit_classifier as fit_classifier
from fastalign.objectives._deepalign import DeepAlignConfig as DeepAlignConfig
from fastalign.objectives._deepalign import DeepAlignState as DeepAlignState
from fastalign.objectives._deepalign import deepalign as deepalign
from fastalign.objectives._negatives import MutualShare as MutualShare
from fastalign.objectives._negatives import mutual_shares as mutual_shares
from fastalign.objectives._supervised import cal as cal
from fastalign.objectives._supervised import sft as sft
from fastalign.objectives._terms import Terms as Terms
from fastalign.objectives._terms import counts as counts
