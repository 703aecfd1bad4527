"""Reads conversations from the user's data, and tokenizes them with labels on the answers only.

Training uses this package, and so do exports, which calibrate and evaluate models on text.
"""

from fp8pipe.models.language.text.conversation import Message, Record
from fp8pipe.models.language.text.encode import IGNORED, Encoded, Encoding, encode
from fp8pipe.models.language.text.files import data_files
from fp8pipe.models.language.text.image_prompts import ImagePrompts, load_image_prompts, refuse_images
from fp8pipe.models.language.text.notes import of_heldout
from fp8pipe.models.language.text.records import load_records
from fp8pipe.models.language.text.split import split
from fp8pipe.models.language.text.template import TemplateInfo, template_info

__all__ = [
    "IGNORED", "Encoded", "Encoding", "ImagePrompts", "Message", "Record", "TemplateInfo", "data_files", "encode",
    "load_image_prompts", "load_records", "of_heldout", "refuse_images", "split", "template_info",
]  # fmt: skip
