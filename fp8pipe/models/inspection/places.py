"""Inspects a path: a directory of Hugging Face's layout or of an artifact, or one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.inspection.contents import Contents
from fp8pipe.models.inspection.graph_files import read_gguf, read_onnx
from fp8pipe.models.inspection.safetensors_layers import StoredTensor, read_headers, read_layers

_INDEX: Final = "model.safetensors.index.json"
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PREPROCESSING: Final = ("preprocessing.json", "preprocessor_config.json", "processor_config.json")
_ADAPTER: Final = "adapter.safetensors"  # no weights of the model itself


def inspect_contents(path: Path, *, look: bool = True) -> Contents:
    """What a checkpoint holds.

    Args:
        path: a directory, or a .safetensors, .onnx or .gguf file.
        look: read codes and scales; without it headers alone.

    Raises:
        ConfigurationError: nothing there, or nothing that is known.
        BadArtifactError: a file cannot be read.
        MissingCapabilityError: a package is missing.
    """
    if path.is_dir():
        return _directory(path, look)
    readers = {".onnx": read_onnx, ".gguf": read_gguf}
    if path.is_file() and path.suffix in readers:
        return readers[path.suffix](path, look=look)
    if path.is_file() and path.suffix == ".safetensors":
        return Contents("safetensors", read_layers(read_headers(path), look=look))
    raise ConfigurationError(
        f"{path} is nothing that can be inspected",
        why="there is no such path" if not path.exists() else f"a file of type '{path.suffix}'",
        fix="give an artifact, a checkpoint's directory, or a .safetensors, .onnx or .gguf file",
    )


def _directory(root: Path, look: bool) -> Contents:
    model, ggufs = root / "model.onnx", sorted(root.glob("*.gguf"))
    files = [f for f in sorted(root.glob("*.safetensors")) if f.name != _ADAPTER]
    config = _json(root / "config.json")
    if model.is_file():
        contents = read_onnx(model, look=look)
    elif files:
        method, bits = _method(config)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            tensors |= read_headers(file)
        contents = Contents(method, read_layers(tensors, bits, look=look))
        contents.notes += _index_notes(root, tensors)
    elif ggufs:
        contents = read_gguf(ggufs[0], look=look)
    else:
        raise ConfigurationError(
            f"{root} holds no weights that can be inspected",
            why="no .safetensors, model.onnx or .gguf file is in it",
            fix="give the directory of a checkpoint, or a file",
        )
    contents.facts |= _facts(root, config)
    return contents


def _method(config: Mapping[str, Any]) -> tuple[str, int]:
    """How config.json calls the quantization, and the width of packed codes."""
    block = config.get("quantization_config") or {}
    method = str(block.get("quant_method", "plain"))
    detail = block.get("format") or block.get("quant_algo") or block.get("fmt")
    groups = block.get("config_groups") or {}
    widths = [block.get("bits"), *((group.get("weights") or {}).get("num_bits") for group in groups.values())]
    bits, size = next(filter(None, widths), 4), block.get("weight_block_size")
    shown = [str(x) for x in (detail, f"blocks of {size[0]}x{size[1]}" if size else None) if x]
    return method + (f" ({', '.join(shown)})" if shown else ""), int(bits)


def _facts(root: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if config:
        found["architecture"] = ", ".join(config.get("architectures") or []) or None
        found["tokenizer"] = next((name for name in _TOKENIZERS if (root / name).is_file()), None)
        in_settings = "chat_template" in _json(root / "tokenizer_config.json")
        found["chat_template"] = in_settings or (root / "chat_template.jinja").is_file()
    if (name := next((name for name in _PREPROCESSING if (root / name).is_file()), None)) is not None:
        found["preprocessing"] = _json(root / name)
    return found


def _index_notes(root: Path, tensors: Mapping[str, StoredTensor]) -> list[str]:
    index = _json(root / _INDEX).get("weight_map")
    if not isinstance(index, dict):
        return []
    wrong = [n for n, f in index.items() if n not in tensors or tensors[n].file.name != f]
    wrong += [name for name in tensors if name not in index]
    return [f"{_INDEX} disagrees with its files in {len(wrong)} tensors, the first: {wrong[0]}"] if wrong else []


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadArtifactError(f"{path} is not readable JSON", why=str(error)) from error
    return data if isinstance(data, dict) else {}
