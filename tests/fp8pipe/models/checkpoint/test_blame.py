"""Whose fault a damaged file is does not depend on who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.checkpoint.sidecars import read_config
from fp8pipe.models.checkpoint.tensors import header_entries, weight_entries, weight_files
from fp8pipe.models.inspection.places import inspect_contents
from fp8pipe.models.language.structure import load_config
from fp8pipe.models.settings import check_config

KINDS = {"a model": ("m", (), ConfigurationError), "an artifact": ("a", (MANIFEST_NAME,), BadArtifactError),
         "without manifest": ("b", (CHECKSUM_NAME,), BadArtifactError),
         "unfinished": ("c.partial", (), BadArtifactError)}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("config.json", '{"a": ', lambda root: read_config(root / "config.json")),
        ("config.json", '{"a": ', inspect_contents),
        ("config.json", '{"model_type": "none"}', load_config),
        ("config.json", '{"torch_dtype": "os.system"}', check_config),
        ("model.safetensors", "cut", lambda root: header_entries(root / "model.safetensors")),
        ("model.safetensors", "cut", weight_entries),
        ("model.safetensors", "cut", inspect_contents),
        ("model.safetensors", None, weight_files),
    ],
)
def test_every_reader_blames_alike(
    kind: str, name: str, content: str | None, read: Callable[[Path], object], tmp_path: Path
) -> None:
    folder, marks, expected = KINDS[kind]
    root = tmp_path / folder
    root.mkdir()
    save_file({"w": torch.zeros(2, 2)}, root / "model.safetensors")
    for mark in marks:
        (root / mark).write_text("{}")
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_text(content)
    with pytest.raises(expected) as caught:
        read(root)
    assert str(root) in caught.value.what
    assert caught.value.fix
