"""Reads the training text: records, with their images, are split, encoded and batched before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.artifact import sha256_file
from fp8pipe.artifact.kinds import PackingFacts, TextFacts
from fp8pipe.models.language.base import (
    check_positions,
    check_tokens,
    embedding_rows,
    learned_positions,
    load_tokenizer,
)
from fp8pipe.models.language.ending import Ending, ending_of
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.models.language.text import (
    Encoding,
    ImagePrompts,
    Record,
    TemplateInfo,
    data_files,
    encode,
    load_image_prompts,
    load_records,
    of_heldout,
    split,
    template_info,
)
from pipeline.finetune.batches import Batches, encoded_digest
from pipeline.finetune.checkpoint import ENCODED_TEXT
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.packing import NOT_WITH_IMAGES


@dataclass(frozen=True, slots=True)
class TrainingText:
    """The training text as batches, with everything that was learned while reading it.

    Attributes:
        train: training batches.
        heldout: held-out batches, each used once per evaluation.
        facts: numbers of records, for the manifest.
        template: the chat template with which the text was rendered.
        digests: sha256 of the local files that were read, by name, and of the encoded text, under ENCODED_TEXT.
        warnings: warnings, for instance about dropped records.
        ending: the token that ends answers, at which engines must stop.
        packing: how examples of a row are isolated from each other; None until the model has been tested, which texts
            with images do not need.
    """

    train: Batches
    heldout: Batches
    facts: TextFacts
    template: TemplateInfo
    digests: dict[str, str]
    warnings: list[str]
    ending: Ending
    packing: PackingFacts | None = None


def load_text(config: FinetuneConfig, source: ModelSource) -> TrainingText:
    """Read, split, encode and batch the training text, with its images.

    Args:
        config: the resolved configuration.
        source: the base model, for its tokenizer, chat template and number of positions.

    Raises:
        ConfigurationError: the data is empty, malformed, without answers, or has examples with more tokens than the
            model has positions; the chat template is invalid; or an image cannot be read, or not by this model.
        MissingCapabilityError: the data needs a package that is not installed.
    """
    tokenizer = load_tokenizer(source.path)
    template_info(tokenizer)  # rejects an invalid template before the data is read
    warnings: list[str] = []
    records = load_records(config.data, warnings.append)
    images = load_image_prompts(source.path, config.model, records)
    train, heldout = split(records, heldout_fraction=config.heldout_fraction, seed=0, warn=warnings.append)
    heldout = heldout[: config.heldout_limit]
    encoded = _encode(config, tokenizer, images, (train, heldout), warnings)
    ending = ending_of(source.path, tokenizer, encoded[0].template)
    batches = _batched(config, source, tokenizer, images, encoded, warnings)
    return TrainingText(
        train=batches[0],
        heldout=batches[1],
        facts=TextFacts(records=len(records), train=len(train), heldout=len(heldout)),
        template=encoded[0].template,
        digests={
            **{name: sha256_file(file) for name, file in _named_files(config.data)},
            ENCODED_TEXT: encoded_digest(*(part.examples for part in encoded)),
        },
        warnings=[*warnings, *ending.warnings(example.labels for example in encoded[0].examples)],
        ending=ending,
        packing=NOT_WITH_IMAGES if config.packing and images is not None else None,
    )


def _encode(
    config: FinetuneConfig, tokenizer: Any, images: ImagePrompts | None,
    parts: tuple[Sequence[Record], Sequence[Record]], warnings: list[str],
) -> tuple[Encoding, Encoding]:  # fmt: skip
    """The tokens of training and held-out records; adds to `warnings`."""
    heldout_warnings: list[str] = []
    train, heldout = (
        encode(
            part,
            tokenizer,
            config.sequence_length,
            images=images,
            last_only=config.answers == "last",
            warn=found.append,
        )
        for part, found in zip(parts, (warnings, heldout_warnings), strict=True)
    )
    warnings += of_heldout(heldout_warnings, warnings)
    return train, heldout


def _batched(
    config: FinetuneConfig, source: ModelSource, tokenizer: Any, images: ImagePrompts | None,
    parts: tuple[Encoding, Encoding], warnings: list[str],
) -> tuple[Batches, Batches]:  # fmt: skip
    """Training and held-out batches of examples that the model can compute; adds to `warnings`."""
    rows = embedding_rows(source.path)
    texts = [example.input_ids for part in parts for example in part.examples]
    warnings += check_tokens(tokenizer, rows, texts)
    check_positions(source.path, config.model, texts)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < rows), 0)
    width = min(config.sequence_length, learned_positions(source.path) or config.sequence_length)
    packing = config.packing and images is None
    if packing and width < config.sequence_length:
        warnings.append(f"rows hold {width} tokens, not {config.sequence_length}: the model has no further positions")
    train, heldout = (
        Batches(part.examples, config.batch_size, width, seed, packing, pad, images)
        for part, seed in zip(parts, (config.seed, 0), strict=True)
    )
    return train, heldout


def _named_files(data: str) -> list[tuple[str, Path]]:
    """Name and path of each local file of the training text; the name of a single file is the user's argument."""
    files = data_files(data) or []
    return [(data, files[0])] if len(files) == 1 else [(str(file), file) for file in files]
