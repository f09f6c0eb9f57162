"""One view of every image-text-to-text model of transformers: `VLM`."""

from fastalign.models._contrast import CONTRAST_MODES as CONTRAST_MODES
from fastalign.models._contrast import Batch as Batch
from fastalign.models._contrast import Forward as Forward
from fastalign.models._corrupt import corrupt as corrupt
from fastalign.models._corrupt import gaussian_blur as gaussian_blur
from fastalign.models._corrupt import patch_mask as patch_mask
from fastalign.models._module import evaluating as evaluating
from fastalign.models._module import first_tensor as first_tensor
from fastalign.models._module import forward_of as forward_of
from fastalign.models._module import layer_stack as layer_stack
from fastalign.models._packed import BACKENDS as BACKENDS
from fastalign.models._packed import Segments as Segments
from fastalign.models._packed import packed as packed
from fastalign.models._packed import packed_attention as packed_attention
from fastalign.models._patches import Patches as Patches
from fastalign.models._qformer import query_attention as query_attention
from fastalign.models._side_stream import is_sharded as is_sharded
from fastalign.models._vlm import IGNORE_INDEX as IGNORE_INDEX
from fastalign.models._vlm import VLM as VLM
