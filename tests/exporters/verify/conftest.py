"""One tree of every kind of artifact, built once; tests copy what they spoil."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_tree import write_language, write_run_record, write_vision
from language_edits import even, uneven


@pytest.fixture(scope="session")
def whole_tree(
    language_artifact: Callable[..., Path], language_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's directory; not to be changed."""
    root = tmp_path_factory.mktemp("whole") / "run"
    root.mkdir()
    model = language_artifact("qwen2", edit=uneven)
    write_language(root, model, language_artifact("llama", edit=even), language_text)
    write_vision(root, engines=importlib.util.find_spec("tensorrt_rtx") is not None)
    write_run_record(root)
    return root


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole_tree, tmp_path / "run")
