"""Converts a GGUF file to an ordinary Hugging Face checkpoint, and caches the result for later calls.

transformers can read GGUF weights, but marks the loaded model as quantized with gguf and refuses to save it, although
its weights are plain floating point by then. They are therefore assigned to a new model whose configuration has no
``quantization_config``, and that model is saved: bfloat16 safetensors under the usual tensor names (without a tied
lm_head), generation_config, tokenizer and chat template.

The conversion writes to ``<target>.partial`` under a file lock and ends with a single rename. Readers thus see either
the complete checkpoint or none, concurrent processes convert only once, and the next conversion removes the remains of
an interrupted one.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import sha256_file
from fp8pipe.artifact.writer import sync
from fp8pipe.core.errors import (
    BadArtifactError,
    ConfigurationError,
    Fp8PipeError,
    MissingCapabilityError,
    OutOfMemoryError,
)
from fp8pipe.core.machine import is_disk_full

log = logging.getLogger(__name__)

# Stored in each converted directory. Increment it when the conversion changes, so that old results are replaced.
CONVERSION_VERSION: Final = 2  # 1 accepted files that lack tensors, and made these up
_SHOWN: Final = 3
RECORD: Final = "conversion.json"
GGUF_MAGIC: Final = b"GGUF"


def cache_root() -> Path:
    """The directory for converted models: ``$FP8PIPE_CACHE/models`` or ``~/.cache/fp8pipe/models``."""
    base = os.environ.get("FP8PIPE_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "fp8pipe") / "models"


def convert_gguf(gguf: Path, *, name: str | None = None) -> Path:
    """Convert a GGUF file unless that was done before, and return the directory of the resulting checkpoint.

    The directory is ``<cache>/<name>-<first 12 hex digits of the file's sha256>``.

    Args:
        gguf: the GGUF file.
        name: first part of the directory's name; by default the file's name without its suffix.

    Raises:
        ConfigurationError: the file does not exist, is not GGUF, or lacks tensors; transformers cannot read its
            architecture; or the cache is not writable.
        BadArtifactError: the cached directory is damaged.
        MissingCapabilityError: the package gguf or accelerate is not installed.
        OutOfMemoryError: the disk is full.
    """
    _check_gguf(gguf)
    digest = sha256_file(gguf)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name or gguf.stem).strip("-.") or "model"
    target = cache_root() / f"{stem}-{digest[:12]}"
    if target.is_dir() and _is_current(target, digest):
        return target
    with _translated_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(target.name + ".lock").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the operating system releases it if the process dies
            # Another process may have converted while this one waited for the lock.
            if target.is_dir() and _is_current(target, digest):
                return target
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            log.info("converting %s to a bf16 checkpoint in %s (once)", gguf.name, target)
            try:
                _convert_into(gguf, partial)
                _write_record(partial, gguf, digest)
                shutil.rmtree(target, ignore_errors=True)  # an older conversion version, if any
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_gguf(gguf: Path) -> None:
    if not gguf.is_file():
        raise ConfigurationError(
            f"there is no file {gguf}", why="a path ending in .gguf must be a GGUF file", fix="check the path"
        )
    with gguf.open("rb") as handle:
        magic = handle.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ConfigurationError(
            f"{gguf} is not a GGUF file",
            why=f"it begins with {magic!r}, not {GGUF_MAGIC!r}",
            fix="download it again: the file may be truncated or an HTML error page",
        )


def _is_current(target: Path, digest: str) -> bool:
    """Whether a directory is a complete conversion of this file by the current `CONVERSION_VERSION`.

    Args:
        target: the converted directory.
        digest: sha256 of the GGUF file.

    Raises:
        BadArtifactError: a file is missing or its size has changed since it was written.
    """
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        files: dict[str, int] = record["files"]
        version, source = record["version"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(target, f"{RECORD}: {type(error).__name__}: {error}") from error
    if version != CONVERSION_VERSION or source != digest:
        return False
    for name, size in files.items():
        path = target / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise _damaged(target, f"{name} has {found} bytes, {size} were written")
    return True


def _damaged(target: Path, why: str) -> BadArtifactError:
    fix = f"delete {target}; it will be converted again"
    return BadArtifactError(f"the converted model in {target} is damaged", why=why, fix=fix)


def _write_record(root: Path, gguf: Path, digest: str) -> None:
    """Write the source, its digest and the size of each file to `RECORD`, and flush every file to disk."""
    files = {p.name: p.stat().st_size for p in sorted(root.iterdir())}
    record = {"version": CONVERSION_VERSION, "source": gguf.name, "sha256": digest, "files": files}
    (root / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in root.iterdir():
        sync(path)


def _convert_into(gguf: Path, root: Path) -> None:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingCapabilityError(
                f"the package {package} is not installed",
                why="transformers needs gguf and accelerate to read a GGUF file",
                fix="pip install gguf accelerate",
            )
    import torch

    from fp8pipe.models.compat import import_transformers

    transformers = import_transformers()
    try:
        _check_blocks(gguf)
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            output_loading_info=True,
            dtype=torch.bfloat16,
            trust_remote_code=False,
            # Otherwise transformers keeps the weights in GGUF blocks if a kernel for them is installed.
            quantization_config=transformers.GgufConfig(dequantize=True),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, trust_remote_code=False
        )
    except (Fp8PipeError, OSError, MemoryError):
        raise
    except Exception as error:  # GGUF readers raise almost any type, tokenizers a bare Exception
        if "allocate memory" in str(error):  # torch's message when the CPU runs out of memory
            raise MemoryError(str(error)) from error
        raise ConfigurationError(
            f"{gguf} cannot be converted",
            why=f"transformers {transformers.__version__} cannot read it: {type(error).__name__}: {error}",
            fix="download it again, if it may be incomplete; else give the original Hugging Face checkpoint instead",
        ) from error
    # transformers would fill them with random values, and say so only in its log.
    if missing := sorted({*found["missing_keys"], *(str(name) for name, *_ in found["mismatched_keys"])}):
        raise ConfigurationError(
            f"{gguf} lacks {len(missing)} weight(s) of a {type(loaded).__name__}",
            why=f"none of its tensors has the name and shape for {', '.join(missing[:_SHOWN])}; they would be random",
            fix="download it again, or give the original Hugging Face checkpoint instead",
        )
    _fix_pre_tokenizer(tokenizer, gguf)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    root.mkdir()
    _unmarked(loaded).save_pretrained(root)
    tokenizer.save_pretrained(root)


def _unmarked(loaded: Any) -> Any:
    """A model of the same class that shares the weights of `loaded`, but is not marked as quantized."""
    import torch

    config = copy.deepcopy(loaded.config)
    for mark in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, mark):
            delattr(config, mark)
    with torch.device("meta"):  # allocates and initializes nothing: every weight is assigned below
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    return fresh


def _check_blocks(gguf: Path) -> None:
    """Refuse a file with tensors of more decoder blocks than it declares, which transformers would leave out."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    declared = next((f.contents() for name, f in reader.fields.items() if name.endswith(".block_count")), None)
    numbers = [int(match[1]) for tensor in reader.tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))]
    if declared is not None and numbers and max(numbers) >= declared:
        raise ConfigurationError(
            f"{gguf} contradicts itself",
            why=f"it declares {declared} block(s), and has tensors of block {max(numbers)} (from 0)",
            fix="give the original Hugging Face checkpoint instead",
        )


def _fix_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Restore SmolLM's splitting of numbers into digits, which transformers omits when it reads a GGUF file.

    The vocabulary has no tokens of several digits, so only white space before a number is tokenized differently. It is
    restored nevertheless, so that text is tokenized exactly as in the model's original training.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )


@contextlib.contextmanager
def _translated_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise OutOfMemoryError(
                f"the disk of {cache} is full",
                why=str(error),
                fix="free space, or set FP8PIPE_CACHE to a directory on another disk",
            ) from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise ConfigurationError(
                f"the cache {cache} cannot be written", why=str(error), fix="set FP8PIPE_CACHE to a writable directory"
            ) from error
        raise
