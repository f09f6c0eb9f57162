"""What alignment does to a model, as data and as figures.

Every diagnostic is a function that returns plain data and one, named `plot_*`, that draws it and
returns a `matplotlib.figure.Figure`; nothing is shown and no global setting of matplotlib changes.
"""

from fastalign.diagnostics._contrast import TokenContrast as TokenContrast
from fastalign.diagnostics._contrast import contrast_html as contrast_html
from fastalign.diagnostics._contrast import plot_token_contrast as plot_token_contrast
from fastalign.diagnostics._contrast import token_contrast as token_contrast
from fastalign.diagnostics._curves import learning_curve as learning_curve
from fastalign.diagnostics._curves import plot_learning_curve as plot_learning_curve
from fastalign.diagnostics._figures import COLORS as COLORS
from fastalign.diagnostics._figures import DPI as DPI
from fastalign.diagnostics._figures import new_figure as new_figure
from fastalign.diagnostics._figures import save_figure as save_figure
from fastalign.diagnostics._mir import measure_mir as measure_mir
from fastalign.diagnostics._mir import mir_per_layer as mir_per_layer
from fastalign.diagnostics._mir import plot_mir_per_layer as plot_mir_per_layer
from fastalign.diagnostics._patches import PatchSimilarity as PatchSimilarity
from fastalign.diagnostics._patches import patch_similarity as patch_similarity
from fastalign.diagnostics._patches import plot_patch_similarity as plot_patch_similarity
