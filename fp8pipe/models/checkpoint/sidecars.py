"""Lists and copies the files that accompany a model's weights, for downloads, fine-tuning and exports alike.

All three use the same lists, because an omitted file is a mistake that is easily overlooked: without its licence file,
a copy violates the licence; without a tokenizer file or chat template, the model answers differently.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from fp8pipe.models.checkpoint.blame import unusable

TEMPLATE_DIRECTORY: Final = "additional_chat_templates"

# Files for serving that Hugging Face repositories store beside the weights. None of these patterns matches training
# logs, plots, adapters or weights in other formats.
SERVED_FILES: Final = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "spiece.model",
    "sentencepiece*.model",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# A base model's directory contains only the model, so every file that may affect it is copied.
BASE_MODEL_FILES: Final = (*SERVED_FILES, "*.json", "*.jinja", "*.model", "*.txt")
HUB_FILES: Final = ("*.safetensors", *BASE_MODEL_FILES, f"{TEMPLATE_DIRECTORY}/*")
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "manifest.*")


def sidecar_files(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Find the files beside a model's weights; never the weights themselves.

    Args:
        root: the model's directory.
        patterns: shell patterns for file names at the top level. The files in `TEMPLATE_DIRECTORY` are always included.

    Yields:
        Paths relative to `root`, sorted.
    """
    top = [p for p in root.iterdir() if p.is_file() and not any(fnmatch(p.name, weights) for weights in _WEIGHTS)]
    found = [p for p in top if any(fnmatch(p.name, pattern) for pattern in patterns)]
    templates = root / TEMPLATE_DIRECTORY
    if templates.is_dir():
        found += [p for p in templates.iterdir() if p.is_file()]
    yield from sorted(p.relative_to(root) for p in found)


def copy_sidecars(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy `sidecar_files` from `source` to `target`, byte for byte."""
    for relative in sidecar_files(source, patterns):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def sidecar_bytes(root: Path, patterns: Sequence[str]) -> int:
    """Total size of `sidecar_files`, in bytes."""
    return sum((root / relative).stat().st_size for relative in sidecar_files(root, patterns))


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object stored beside the weights, such as config.json.

    Raises:
        BadArtifactError, ConfigurationError: the file is missing, unreadable, not a JSON object, or has a key twice;
            see `unusable`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
        why = "" if isinstance(content, dict) else "it is not a JSON object"
    except (OSError, ValueError) as error:
        content, why = {}, f"{type(error).__name__}: {error}"
    if why:
        raise unusable(path, f"{path} cannot be read", why=why, fix="fetch the model again")
    return dict(content)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its (key, value) pairs, rejecting duplicate keys; an `object_pairs_hook` for `json`.

    Without this hook, the parser silently keeps the last of several equal keys.

    Raises:
        ValueError: a key occurs more than once; the message gives the first one.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        raise ValueError(f"{len(twice)} name(s) occur twice, the first: {twice[0]}")
    return found
