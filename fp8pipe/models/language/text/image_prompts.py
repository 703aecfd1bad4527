"""Tokenizes prompts with images, and makes the model's inputs for them, with the checkpoint's own processor.

A processor replaces each placeholder in the text by as many tokens as the image takes, and turns the images to pixel
values. It is asked twice: once per example for the token ids, when the data is encoded, and once per batch and step for
the rest, so that pixel values of only one batch are in memory. The images are read again for that, and must still have
the bytes that were encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError, class_and_first_line, first_line
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.text.conversation import ImagePart, Record
from fp8pipe.models.language.text.images import image_bytes, open_image

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PromptImages:
    """The part of an example that has images: all before its first answer.

    Attributes:
        prompt: the rendered text, with one placeholder per image.
        parts: the images, in the order of the placeholders.
        digests: sha256 of each image's bytes, in hex.
        tokens: the token ids of `prompt`, with those that stand for the images.
    """

    prompt: str
    parts: tuple[ImagePart, ...]
    digests: tuple[str, ...]
    tokens: tuple[int, ...]


class ImagePrompts:
    """The image side of a checkpoint's processor.

    Args:
        processor: a transformers processor with an image processor, a tokenizer and a placeholder for images.

    Attributes:
        processor: the processor.
        placeholder: the text that stands for one image in a rendered prompt.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.placeholder = processor, str(processor.image_token)
        if processor.tokenizer.pad_token is None:  # prompts of a batch are padded; what with is never read
            processor.tokenizer.pad_token = processor.tokenizer.eos_token or self.placeholder

    def read(self, prompt: str, parts: Sequence[ImagePart]) -> PromptImages:
        """Tokenize a prompt with its images, each of which is opened and put through the image processor.

        Args:
            prompt: the rendered text, with one placeholder per image.
            parts: its images, in order.

        Raises:
            ConfigurationError: an image cannot be read, or the processor refuses the prompt.
        """
        contents = [image_bytes(part) for part in parts]
        images = [open_image(part, content) for part, content in zip(parts, contents, strict=True)]
        tokens = self._call([prompt], [images], parts[0].place)["input_ids"][0].tolist()
        digests = tuple(hashlib.sha256(content).hexdigest() for content in contents)
        return PromptImages(prompt, tuple(parts), digests, tuple(tokens))

    def inputs(self, rows: Sequence[PromptImages | None], width: int) -> dict[str, Tensor]:
        """The model's inputs for a batch, apart from token ids and an attention mask.

        Args:
            rows: the images of each row; None for a row of text alone.
            width: tokens per row, with padding on the right.

        Returns:
            On the CPU: `pixel_values` and what else the processor makes of the images, and values per token (its kinds,
            by which models place image tokens), `(len(rows), width)`, which are 0 for text and padding.

        Raises:
            ConfigurationError: an image has changed or disappeared since it was encoded.
        """
        pictured = [(number, row) for number, row in enumerate(rows) if row is not None]
        images = [[_unchanged(*each) for each in zip(row.parts, row.digests, strict=True)] for _, row in pictured]
        places = " and ".join(dict.fromkeys(row.parts[0].place for _, row in (pictured[0], pictured[-1])))
        made = self._call([row.prompt for _, row in pictured], images, f"the batch with {places}")
        shape, lengths = made["input_ids"].shape, [len(row.tokens) for _, row in pictured]
        for (_, row), ids in zip(pictured, made["input_ids"].tolist(), strict=True):
            if tuple(ids[: len(row.tokens)]) != row.tokens:
                raise ConfigurationError(
                    f"the image of {row.parts[0].place} has other tokens in a batch than alone",
                    why="what the processor makes of an image depends on the other images of the batch",
                    fix="use --batch-size 1",
                )
        found = {}
        for key, value in made.items():
            if key in ("input_ids", "attention_mask"):
                continue
            if value.shape != shape or value.is_floating_point():
                found[key] = value
                continue
            found[key] = value.new_zeros((len(rows), width))
            for (number, _), length, given in zip(pictured, lengths, value, strict=True):
                found[key][number, :length] = given[:length]
        return found

    def _call(self, prompts: list[str], images: list[list[Any]], name: str) -> dict[str, Tensor]:
        try:
            made = self.processor(
                text=prompts, images=images, add_special_tokens=False, padding=True, padding_side="right",
                return_tensors="pt",
            )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # third-party code, which may raise any type
            raise ConfigurationError(
                f"the model's processor cannot read the images of {name}",
                why=class_and_first_line(error)[:300],
                fix="leave this record out, or change its images",
            ) from error
        return dict(made)


def _unchanged(part: ImagePart, digest: str) -> Any:
    content = image_bytes(part)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigurationError(
            f"the image {part.source} has changed since this run began",
            why="its sha256 is another one than when the data was read",
            fix="restore the file and continue with --resume, or start a new run",
        )
    return open_image(part, content)


def load_image_prompts(directory: Path, origin: str, records: Sequence[Record]) -> ImagePrompts | None:
    """The processor of a checkpoint if records have images; None if none has.

    Args:
        directory: the model's directory; no code from there is run.
        origin: the model's name in error messages.
        records: the records.

    Raises:
        ConfigurationError: records have images, and the checkpoint has no processor for them.
        MissingCapabilityError: a package that the processor needs is not installed.
    """
    first = next((record.images[0] for record in records if record.images), None)
    if first is None:
        return None
    what = f"{origin} cannot read the image of {first.place}"
    fix = "give text without image parts, or the checkpoint of a model that takes images, with its processor's files"
    try:
        processor = import_transformers().AutoProcessor.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except ImportError as error:
        raise MissingCapabilityError(what, why=first_line(error), fix="pip install 'fp8pipe[vit]'") from error
    except Exception as error:  # third-party code, which may raise any type
        why = f"its processor cannot be loaded: {class_and_first_line(error)[:300]}"
        raise ConfigurationError(what, why=why, fix=fix) from error
    needed = ("image_processor", "tokenizer", "image_token")
    if lacking := [name for name in needed if getattr(processor, name, None) is None]:
        why = f"it takes text alone: transformers loads a {type(processor).__name__} for it, which has no {lacking[0]}"
        raise ConfigurationError(what, why=why, fix=fix)
    return ImagePrompts(processor)


def refuse_images(records: Sequence[Record], fix: str = "give text without image parts") -> None:
    """Refuse records with images, for callers that read text alone.

    Args:
        records: the records.
        fix: what the user can do about it.

    Raises:
        ConfigurationError: a record has an image.
    """
    first = next((record.images[0] for record in records if record.images), None)
    if first is not None:
        raise ConfigurationError(f"the image of {first.place} cannot be used", why="only text is read here", fix=fix)
