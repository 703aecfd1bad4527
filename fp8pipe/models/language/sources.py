"""Resolves the base model that the user named to a local directory, downloading or converting it if necessary.

Every stage reads a Hugging Face directory (config.json and safetensors). The user may give such a directory, a hub id
(``org/name`` or ``org/name@revision``), a GGUF file, or ``sample:smollm2``. The origin of the model is recorded.
Directories that cannot serve as a base model are rejected: PEFT adapters, pickled weights, and configurations that
would run code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError, class_and_first_line
from fp8pipe.models.checkpoint.adapters import ADAPTER_FILE, read_adapter
from fp8pipe.models.checkpoint.gguf import convert_gguf
from fp8pipe.models.checkpoint.sidecars import HUB_FILES
from fp8pipe.models.checkpoint.tensors import weight_files
from fp8pipe.models.samples import sample_name, smollm2_gguf
from fp8pipe.models.settings import check_config

MODEL_SAMPLES: Final = ("smollm2",)
# A hub id: one or two names separated by a slash, and optionally "@" with a revision.
_HUB_ID: Final = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+))?$")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model on the local disk.

    Attributes:
        path: directory with config.json and safetensors.
        origin: the model as the user named it; recorded in manifests.
        revision: the hub commit, or the first 12 hex digits of the GGUF file's sha256; None for a local directory.
    """

    path: Path
    origin: str
    revision: str | None = None


def resolve_model(src: str) -> ModelSource:
    """The local directory of the model ``src``; downloads or converts it if necessary.

    Args:
        src: a directory, a hub id, a path ending in .gguf, or ``sample:smollm2``.

    Raises:
        ConfigurationError: nothing of that name exists, or it is not a usable checkpoint.
        MissingCapabilityError: a required package is not installed, or the download failed.
        BadArtifactError: a file is damaged.
    """
    if not src.strip():
        raise ConfigurationError(
            "no model was named",
            why="the name is empty",
            fix="give a directory, a hub id, a .gguf file or sample:smollm2",
        )
    if sample_name(src, MODEL_SAMPLES, "model") is not None:
        return _from_gguf(smollm2_gguf(), src, "smollm2")
    path = Path(src).expanduser()
    if path.is_dir():
        _check_checkpoint(path)
        return ModelSource(path.resolve(), src)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(path.absolute(), src)
    if path.exists():
        raise ConfigurationError(
            f"{src} is not a model",
            why="it is a file; a model is a directory or a .gguf file",
            fix="give the directory that holds config.json",
        )
    match = _HUB_ID.match(src)
    if match is None:
        raise ConfigurationError(
            f"there is no directory {src}",
            why="and it does not look like a hub id (org/name)",
            fix="check the path, or use sample:smollm2 for a small built-in model",
        )
    return _from_hub(src, match["id"], match["revision"])


def _from_gguf(gguf: Path, origin: str, name: str | None = None) -> ModelSource:
    path = convert_gguf(gguf, name=name)
    return ModelSource(path, origin, path.name.rpartition("-")[2])


def _from_hub(src: str, repo_id: str, revision: str | None) -> ModelSource:
    """Download a snapshot from the hub; with ``HF_HUB_OFFLINE=1``, huggingface_hub uses only its cache."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        path = Path(huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(HUB_FILES)))
    except (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError) as error:
        raise ConfigurationError(
            f"there is no directory {src!r} here, and the hub does not give a model of that name",
            why=class_and_first_line(error),
            fix="check the name and the revision; for a private or gated model run `hf auth login` first",
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, hub.HfHubHTTPError, OSError) as error:
        raise MissingCapabilityError(
            f"there is no directory {src!r} here, and the model could not be downloaded",
            why=class_and_first_line(error),
            fix="check the path, or the network (HF_HUB_OFFLINE must be unset to download); "
            "sample:smollm2 needs no network",
        ) from error
    _check_checkpoint(path)
    return ModelSource(path, src, path.name)


def _check_config(path: Path) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        raise ConfigurationError(
            f"{path} is not a Hugging Face model directory",
            why="it has no config.json",
            fix=f"name the file instead: {path / ggufs[0]}" if ggufs else "give the directory that holds config.json",
        )
    check_config(path)


def check_no_adapter(path: Path) -> None:
    """Reject a directory that contains a PEFT adapter, which transformers would silently apply to the model.

    Raises:
        ConfigurationError: there is an adapter; the message names its base model, if known.
    """
    if (adapter := read_adapter(path)) is None:
        return
    alone = not (path / "config.json").is_file()
    raise ConfigurationError(
        f"{path} holds a PEFT adapter" + (", which is not a model on its own" if alone else " beside the model"),
        why=f"{ADAPTER_FILE} is there, and it is unclear whether base or adapted weights are meant"
        if not alone
        else f"{ADAPTER_FILE} is there, and no config.json",
        fix=adapter.merge if alone else f"{adapter.merge}; to leave the adapter out, move {ADAPTER_FILE} away",
    )


def _check_checkpoint(path: Path) -> None:
    check_no_adapter(path)
    _check_config(path)
    weight_files(path)  # raises unless exactly one complete set of weights is there, in this directory
