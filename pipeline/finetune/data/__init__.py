"""Training data: conversations (`fp8pipe.models.language.text`) in batches that are a function of the step."""

from fp8pipe.models.language.text import Encoded, Encoding, Message, Record, TemplateInfo, encode, load_records, split
from pipeline.finetune.data.batches import Batch, Batches

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
