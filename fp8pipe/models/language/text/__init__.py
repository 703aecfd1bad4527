"""Conversations: records from the user's files, and tokens of which the answers are learned.

Training reads them, and so do exports that calibrate on text or measure a model on it; that is why they are here.
"""

from fp8pipe.models.language.text.encode import IGNORED, Encoded, Encoding, TemplateInfo, encode
from fp8pipe.models.language.text.records import Message, Record, load_records, split

__all__ = ["IGNORED", "Encoded", "Encoding", "Message", "Record", "TemplateInfo", "encode", "load_records", "split"]
