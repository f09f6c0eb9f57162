"""Records of images and conversations, and the collator that turns them into batches.

A record is rendered with the processor's own chat template, one prefix after the other, so that
what is learned is what the template puts between a prompt and the next one. Image tokens are never
cut, and no label is ever an image token.
"""

from fastalign.data._collate import IGNORE_INDEX as IGNORE_INDEX
from fastalign.data._collate import Collator as Collator
from fastalign.data._errors import SampleError as SampleError
from fastalign.data._images import open_image as open_image
from fastalign.data._open import open_data as open_data
from fastalign.data._processors import plain_template as plain_template
from fastalign.data._records import IMAGE_MARK as IMAGE_MARK
from fastalign.data._records import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from fastalign.data._records import Record as Record
from fastalign.data._records import Role as Role
from fastalign.data._records import Turn as Turn
from fastalign.data._records import image_folder as image_folder
from fastalign.data._records import load_records as load_records
from fastalign.data._records import parse_record as parse_record
from fastalign.data._records import text_folder as text_folder
from fastalign.data._skip import CountedBatch as CountedBatch
from fastalign.data._skip import Replacing as Replacing
from fastalign.data._sources import ShardedRecords as ShardedRecords
from fastalign.data._sources import TableRecords as TableRecords
from fastalign.data._stream import Stream as Stream
from fastalign.data._stream import open_stream as open_stream
