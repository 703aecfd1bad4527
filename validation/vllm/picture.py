"""The question about an image that a validation asks multimodal models.

With text alone, the vision tower and the projector would be checked only by reading back their weights. So an image is
sent to the engine in the way that a client sends it, and the answer is compared with that of the torch model, whose
inputs are prepared by the source's processor.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.structure import load_config

__all__ = ["PICTURED", "PictureQuestion", "picture_question"]

PICTURED: Final = "(a picture) "  # prefix of this question in a record
_PROMPT: Final = "What is in the picture?"
_SIDE: Final = 112  # pixels


@dataclass(frozen=True)
class PictureQuestion:
    """An image and a question, for the engine and for the torch model.

    Attributes:
        prompt: the question as it appears in a record.
        content: the message content in the format of the engine's chat API.
        inputs: inputs of the torch model: the output of the source's processor for image and question, batch size 1.
    """

    prompt: str
    content: list[dict[str, Any]]
    inputs: dict[str, Tensor]

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt, including the image tokens."""
        return [int(token) for token in self.inputs["input_ids"][0]]

    def answered(self, tokens: Sequence[int]) -> dict[str, Tensor]:
        """The model inputs with the tokens of an answer appended to the question."""
        following = {"input_ids": torch.tensor([list(tokens)]), "attention_mask": torch.ones(1, len(tokens)).long()}
        length, found = self.inputs["input_ids"].shape[1], dict(self.inputs)
        for name, value in self.inputs.items():
            if value.shape == (1, length):  # one value per token; answer tokens are text, so 0 by default
                more = following.get(name, torch.zeros(1, len(tokens)))
                found[name] = torch.cat([value, more.to(value.dtype)], dim=1)
        return found


def picture_question(source: Path) -> PictureQuestion | None:
    """Create the question; None if the model does not accept images, or its processor does not prepare them.

    Raises:
        BadArtifactError: the model accepts images, and its processor cannot be read.
    """
    if getattr(load_config(source), "vision_config", None) is None:
        return None
    try:
        processor = import_transformers().AutoProcessor.from_pretrained(
            str(source), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # processors raise any type
        raise BadArtifactError(
            f"the model in {source} accepts images, and its image processor cannot be read",
            why=f"{type(error).__name__}: {str(error).partition('. ')[0]}",
            fix="copy preprocessor_config.json of the original model to the base model, and make artifact and export "
            "again: vLLM does not start without it",
        ) from error
    if getattr(processor, "image_processor", None) is None or not getattr(processor, "chat_template", None):
        return None
    picture = _picture()
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": _PROMPT}]}]
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _as_url(picture)}},
        {"type": "text", "text": _PROMPT},
    ]
    return PictureQuestion(PICTURED + _PROMPT, content, dict(inputs))


def _picture() -> Image.Image:
    """A red disc on a gradient from blue to white."""
    picture = Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB")
    picture = Image.merge("RGB", (*picture.split()[:2], Image.new("L", picture.size, 255)))
    ImageDraw.Draw(picture).ellipse((24, 24, 72, 72), fill=(220, 20, 20))
    return picture


def _as_url(picture: Image.Image) -> str:
    with io.BytesIO() as file:
        picture.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
