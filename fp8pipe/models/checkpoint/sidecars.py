"""The list of files that accompany a model's weights, shared by downloads, fine-tuning and exports.

Omitting a licence file violates the licence; omitting a tokenizer file or chat template changes the model's answers.
All three places that copy such files therefore use this list.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

from fp8pipe.models.checkpoint.blame import unusable

TEMPLATE_DIRECTORY: Final = "additional_chat_templates"

# What Hugging Face repositories keep beside their weights for serving. Training logs, plots, adapters and weights in
# other formats match none of these.
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
# A base model's directory holds nothing but the model, so everything that may matter is copied.
BASE_MODEL_FILES: Final = (*SERVED_FILES, "*.json", "*.jinja", "*.model", "*.txt")
HUB_FILES: Final = ("*.safetensors", *BASE_MODEL_FILES, f"{TEMPLATE_DIRECTORY}/*")
_WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json", "manifest.*")


def sidecar_files(root: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Files at the top level of a model's directory that match `patterns`, and its named chat templates; never weights.

    Yields paths relative to `root`, sorted.
    """
    top = [p for p in root.iterdir() if p.is_file() and not any(fnmatch(p.name, weights) for weights in _WEIGHTS)]
    found = [p for p in top if any(fnmatch(p.name, pattern) for pattern in patterns)]
    templates = root / TEMPLATE_DIRECTORY
    if templates.is_dir():
        found += [p for p in templates.iterdir() if p.is_file()]
    yield from sorted(p.relative_to(root) for p in found)


def copy_sidecars(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copy `sidecar_files` byte for byte: changing one character of a chat template changes a model's answers."""
    for relative in sidecar_files(source, patterns):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def sidecar_bytes(root: Path, patterns: Sequence[str]) -> int:
    """Total size of `sidecar_files`, in bytes."""
    return sum((root / relative).stat().st_size for relative in sidecar_files(root, patterns))


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object stored beside the weights, such as config.json.

    Raises:
        BadArtifactError, ConfigurationError: missing, unreadable, or not an object; see `unusable`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        why = "" if isinstance(content, dict) else "it is not a JSON object"
    except (OSError, ValueError) as error:
        content, why = {}, f"{type(error).__name__}: {error}"
    if why:
        raise unusable(path, f"{path} cannot be read", why=why, fix="fetch the model again")
    return dict(content)
