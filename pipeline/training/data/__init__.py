"""Training data: records from the user's files, tokens with labels, batches as a function of the step.

``records`` reads and checks, ``encode`` turns conversations into token ids of which only the answers are
learned, ``batches`` groups them. Each is usable alone.
"""

from pipeline.training.data.batches import Batch, Batches
from pipeline.training.data.encode import Encoded, Encoding, TemplateInfo, encode
from pipeline.training.data.records import Message, Record, load_records, split

__all__ = [
    "Batch",
    "Batches",
    "Encoded",
    "Encoding",
    "Message",
    "Record",
    "TemplateInfo",
    "encode",
    "load_records",
    "split",
]
