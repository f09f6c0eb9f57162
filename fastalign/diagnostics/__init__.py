"""What alignment does to a model, as data and as figures.

Every diagnostic is a function that returns plain data and one, named `plot_*`, that draws it and
returns a `matplotlib.figure.Figure`; nothing is shown and no global setting of matplotlib changes.
"""

from fastalign.diagnostics._attention import ImageAttention as ImageAttention
from fastalign.diagnostics._attention import image_attention as image_attention
from fastalign.diagnostics._attention import plot_image_attention as plot_image_attention
from fastalign.diagnostics._blind import blind_accuracy as blind_accuracy
from fastalign.diagnostics._blind import plot_blind_accuracy as plot_blind_accuracy
from fastalign.diagnostics._contrast import TokenContrast as TokenContrast
from fastalign.diagnostics._contrast import contrast_html as contrast_html
from fastalign.diagnostics._contrast import plot_token_contrast as plot_token_contrast
from fastalign.diagnostics._contrast import token_contrast as token_contrast
from fastalign.diagnostics._curves import learning_curve as learning_curve
from fastalign.diagnostics._curves import plot_learning_curve as plot_learning_curve
from fastalign.diagnostics._documents import documents as documents
from fastalign.diagnostics._embedding import plot_token_embedding as plot_token_embedding
from fastalign.diagnostics._embedding import token_embedding as token_embedding
from fastalign.diagnostics._figures import COLORS as COLORS
from fastalign.diagnostics._figures import DPI as DPI
from fastalign.diagnostics._figures import new_figure as new_figure
from fastalign.diagnostics._figures import save_figure as save_figure
from fastalign.diagnostics._gap import modality_gap as modality_gap
from fastalign.diagnostics._gap import plot_modality_gap as plot_modality_gap
from fastalign.diagnostics._intervention import ChannelEnergy as ChannelEnergy
from fastalign.diagnostics._intervention import ModalityChannels as ModalityChannels
from fastalign.diagnostics._intervention import modality_channels as modality_channels
from fastalign.diagnostics._intervention import plot_modality_channels as plot_modality_channels
from fastalign.diagnostics._intervention import plot_shift_alignment as plot_shift_alignment
from fastalign.diagnostics._mir import plot_mir_per_layer as plot_mir_per_layer
from fastalign.diagnostics._patches import PatchSimilarity as PatchSimilarity
from fastalign.diagnostics._patches import patch_similarity as patch_similarity
from fastalign.diagnostics._patches import plot_patch_similarity as plot_patch_similarity
from fastalign.diagnostics._perplexity import perplexity as perplexity
from fastalign.diagnostics._perplexity import plot_perplexity as plot_perplexity
from fastalign.diagnostics._probe import linear_probe as linear_probe
from fastalign.diagnostics._probe import plot_linear_probe as plot_linear_probe
from fastalign.diagnostics._words import PatchWords as PatchWords
from fastalign.diagnostics._words import nearest_words as nearest_words
from fastalign.diagnostics._words import plot_nearest_words as plot_nearest_words
from fastalign.models._mir import measure_mir as measure_mir
from fastalign.models._mir import mir_per_layer as mir_per_layer
