"""Conversations: reading them from the user's files, and tokenizing them with labels on the answers only.

Both training and exports use this package: exports calibrate on text and evaluate models on it.
"""

from fp8pipe.models.language.text.conversation import Message, Record
from fp8pipe.models.language.text.encode import IGNORED, Encoded, Encoding, encode
from fp8pipe.models.language.text.files import data_files
from fp8pipe.models.language.text.notes import of_heldout
from fp8pipe.models.language.text.records import load_records
from fp8pipe.models.language.text.split import split
from fp8pipe.models.language.text.template import TemplateInfo, template_info

__all__ = [
    "IGNORED", "Encoded", "Encoding", "Message", "Record", "TemplateInfo", "data_files", "encode", "load_records",
    "of_heldout", "split", "template_info",
]  # fmt: skip
