"""Checks a base model before training: first config.json and the headers of the weight files, then every value once.

Problems that would stop the training run or a later export are thus reported before hours of training, not after.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError, class_and_first_line
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.models.checkpoint.rows import same_values
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor
from fp8pipe.models.checkpoint.values import refuse_not_finite
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.experts import check_expert_counts
from fp8pipe.models.language.structure import ModelStructure, Role, load_config, read_structure

_VOCABULARIES: Final = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_SHOWN: Final = 3
_PREDICTING: Final = "num_nextn_predict_layers"  # layers that predict several tokens at once
_OFFSET: Final = 2  # OPT's position table has this many extra rows at the start
# RoPE types for which max_position_embeddings may be the length before scaling.
_SCALED: Final = ("linear", "dynamic", "yarn")


def check_base(directory: Path, origin: str) -> ModelStructure:
    """Check that a model can be fine-tuned, and return its structure; reads only config.json and headers.

    Args:
        directory: the model's directory.
        origin: the model's name in error messages.

    Raises:
        ConfigurationError: the model is quantized in a format that cannot be decoded, has an unknown architecture, is
            not a causal language model, lacks tensors of the architecture in its config.json, or has layers that
            this file does not declare.
    """
    entries = base_entries(directory)
    structure = read_structure(directory)
    table = structure.naming.table(entries)
    stored = {known.name: entries[name] for name, known in table.items() if known.whole}
    joined = {known.name for known in table.values() if not known.whole}
    check_expert_counts(origin, structure.tensors, stored)
    check_declared(directory, origin, structure, stored)
    fix = "complete the download, or use the config.json that belongs to these weights"
    if missing := [name for name in structure.tensors if _is_missing(name, structure, stored, joined)]:
        raise ConfigurationError(
            f"{origin} lacks {len(missing)} weight(s) of a {structure.architecture}",
            why=f"no tensor of the checkpoint becomes {', '.join(missing[:_SHOWN])}; they would be random",
            fix=fix,
        )
    for name, entry in stored.items():
        declared = structure.tensors.get(name, entry.shape)
        if entry.shape != declared:
            raise ConfigurationError(
                f"{entry.name} of {origin} has another shape than config.json declares",
                why=f"{entry.shape}; config.json: {declared}",
                fix=fix,
            )
    return structure


def _is_missing(name: str, structure: ModelStructure, stored: dict[str, TensorEntry], joined: set[str]) -> bool:
    """Whether a parameter that text generation needs is absent from the checkpoint."""
    owner = structure.owner(name) or ""
    needed = structure.in_decoder(owner) or owner == structure.output_head
    same = {name, structure.tied.get(name)} | {tied for tied, original in structure.tied.items() if original == name}
    return needed and name not in structure.buffers | joined and not same & stored.keys()


def unknown_tensors(directory: Path, structure: ModelStructure) -> list[str]:
    """Warn of tensors in a checkpoint that the model does not have; reads only headers.

    Not meant are those of old checkpoints that transformers knows, and layers that predict further tokens.

    Args:
        directory: the model's directory.
        structure: the model's structure.

    Returns:
        One warning, or none.
    """
    table = structure.naming.table(base_entries(directory))
    unknown = [name for name, known in table.items() if known.name not in structure.tensors
               and not structure.is_discarded(known.name) and not _is_beyond(known.name, structure)]  # fmt: skip
    if not unknown:
        return []
    return [
        f"{len(unknown)} tensor(s) of the checkpoint belong to no part of a {structure.architecture}, the first: "
        f"{unknown[0]}; transformers ignores them, exports hold them unchanged, and vLLM may refuse to load them"
    ]


def check_values(directory: Path, origin: str, structure: ModelStructure) -> None:
    """Reject non-finite weights, and tied weights that are stored twice with different values; reads every tensor.

    Args:
        directory: the model's directory.
        origin: the model's name in error messages.
        structure: the model's structure.

    Raises:
        ConfigurationError: there are such weights; the message names the tensors.
    """
    entries = base_entries(directory)
    refuse_not_finite(((name, read_tensor(entry)) for name, entry in entries.items()), origin)
    table = structure.naming.table(entries)
    stored = {known.name: entries[name] for name, known in table.items() if known.whole}
    for tied, original in structure.tied.items():
        copies = [stored[name] for name in (tied, original) if name in stored]
        if len(copies) > 1 and not same_values(*copies):
            raise ConfigurationError(
                f"{origin} contains two different copies of a tied weight",
                why=f"config.json ties {copies[0].name} and {copies[1].name}, whose values in the checkpoint differ",
                fix="set tie_word_embeddings to false in config.json, or remove the wrong copy",
            )


def check_declared(directory: Path, origin: str, structure: ModelStructure, stored: Iterable[str]) -> None:
    """Reject a checkpoint that has more layers than its config.json declares: the model would be built without them.

    Args:
        directory: the model's directory.
        origin: the model's name in error messages.
        structure: the structure of the model that config.json declares.
        stored: names of the tensors in the checkpoint, converted to the model's naming.

    Raises:
        ConfigurationError: there are such layers; the message names one of their tensors.
    """
    if read_config(directory / "config.json").get(_PREDICTING):
        return  # these are stored as further layers, which transformers never builds
    beyond = [name for name in stored if _is_beyond(name, structure) and not structure.is_discarded(name)]
    if beyond:
        raise ConfigurationError(
            f"{origin} has layers that its config.json does not declare",
            why=f"{len(beyond)} tensor(s), the first: {min(beyond)}; the model would be built without them",
            fix="use the config.json that belongs to these weights",
        )


def _is_beyond(name: str, structure: ModelStructure) -> bool:
    """Whether a tensor is in an element of a list of modules that the model has, while it lacks that element."""
    for match in re.finditer(r"\.\d+\.", name):
        if name[: match.start()] in structure.modules and name[: match.end() - 1] not in structure.modules:
            # A module with several names is among `modules` under one of them.
            return not any(tensor.startswith(name[: match.end()]) for tensor in structure.tensors)
    return False


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer in a model's directory, without running any code from there.

    Raises:
        ConfigurationError: the directory contains no tokenizer, or it cannot be read.
    """
    fix = "copy tokenizer.json and tokenizer_config.json of the model there (tokenizer.save_pretrained writes them)"
    names = [path.name for path in directory.iterdir()]
    if not any(fnmatch(name, pattern) for name in names for pattern in _VOCABULARIES):
        why = f"none of {', '.join(_VOCABULARIES)} is there"
        raise ConfigurationError(f"{directory} holds no tokenizer", why=why, fix=fix)
    try:
        return import_transformers().AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raise a bare Exception, converters any type
        raise ConfigurationError(
            f"the tokenizer in {directory} cannot be read",
            why=class_and_first_line(error),
            fix=fix,
        ) from error


def embedding_rows(directory: Path) -> int:
    """Number of rows of the input embedding, according to config.json."""
    structure = read_structure(directory)
    return structure.tensors[f"{structure.embedding}.weight"][0]


def check_tokens(tokenizer: Any, rows: int, texts: Sequence[Sequence[int]]) -> list[str]:
    """Reject text with token ids beyond the embedding; warn if the tokenizer has such ids but the text has none.

    Args:
        tokenizer: the model's tokenizer.
        rows: number of rows of the input embedding.
        texts: token ids of each example; empty if the text is not known yet.

    Returns:
        Warnings for the user.

    Raises:
        ConfigurationError: the text uses such tokens; the message names them.
    """
    beyond = {int(number): str(token) for token, number in tokenizer.get_vocab().items() if number >= rows}
    if not beyond:
        return []
    used = sorted({number for ids in texts for number in ids} & beyond.keys())
    shown = ", ".join(f"{beyond[number]!r} ({number})" for number in (used or sorted(beyond))[:_SHOWN])
    if used:
        raise ConfigurationError(
            f"the text uses {len(used)} token(s) that the model has no embedding for",
            why=f"the tokenizer has {shown}; the embedding has rows 0..{rows - 1}",
            fix="resize the model first (resize_token_embeddings, save_pretrained), or use the tokenizer it came with",
        )
    unused = "which no text uses" if texts else "so that no prompt may hold them"
    return [f"the tokenizer has {len(beyond)} token(s) beyond the {rows} rows of the embedding, {unused}: {shown}"]


def check_positions(directory: Path, origin: str, texts: Sequence[Sequence[int]]) -> None:
    """Reject examples that are longer than the model's maximum sequence length.

    Beyond it, learned position embeddings do not exist, and rotary ones were never trained.

    Args:
        directory: the model's directory.
        origin: the model's name in messages.
        texts: token ids of each example, cut to the length used in training.

    Raises:
        ConfigurationError: an example is too long; the message gives both lengths.
    """
    limit, longest = positions(load_config(directory)), max(map(len, texts), default=0)
    if limit is not None and longest > limit:
        raise ConfigurationError(
            f"the text has examples of {longest} tokens, and {origin} has {limit} positions",
            why=f"max_position_embeddings of its config.json is {limit}; beyond it learned positions do not exist, and "
            "rotary ones were never trained",
            fix=f"--sequence-length {limit} (longer examples are cut), or a model with a longer context",
        )


def learned_positions(directory: Path) -> int | None:
    """Maximum tokens per sequence of a model with a table of learned position embeddings; None for other models."""
    limit, structure = positions(load_config(directory)), read_structure(directory)
    tables = (structure.tensors[f"{name}.weight"][0] for name, role in structure.roles.items()
              if role is Role.EMBEDDING and name != structure.embedding)  # fmt: skip
    return limit if limit is not None and any(0 <= rows - limit <= _OFFSET for rows in tables) else None


def positions(settings: Any) -> int | None:
    """The model's maximum sequence length in tokens; None if its configuration states no limit.

    With scaled rotary position embeddings, it is at least `factor` times the original length.

    Args:
        settings: the model's transformers configuration.
    """
    text = settings.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # some models have one per layer type
    scaled = [float(kind.get("factor") or 1) * (kind.get("original_max_position_embeddings") or limit)
              for kind in kinds if kind.get("rope_type", kind.get("type")) in _SCALED]  # fmt: skip
    return max([limit, *map(int, scaled)])
