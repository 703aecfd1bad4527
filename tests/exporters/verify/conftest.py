"""One tree of every kind of artifact, built once; tests copy what they spoil."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from artifact_tree import write_language, write_run_record, write_vision
from language_edits import even, uneven

from exporters.verify import graph_export


@pytest.fixture(scope="session")
def whole_tree(
    language_artifact: Callable[..., Path], language_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run's directory; not to be changed. It was moved, so no parent lies where a manifest records it."""
    root = tmp_path_factory.mktemp("whole") / "run"
    root.mkdir()
    model = language_artifact("qwen2", edit=uneven)
    write_language(root, model, language_artifact("llama", edit=even), language_text)
    write_vision(root, engines=importlib.util.find_spec("tensorrt_rtx") is not None)
    write_run_record(root)
    return root.rename(root.with_name("moved"))


@pytest.fixture
def tree(whole_tree: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole_tree, tmp_path / "run")


@pytest.fixture(scope="module")
def graphs_made_once() -> Iterator[None]:
    """What an export would write follows from the parent alone, and tracing it takes seconds."""
    made, real = {}, graph_export._against

    def against(artifact, model, parent, notes, checks):
        def once(quantized, source):
            key = (artifact.kind, (Path(parent) / "manifest.sha256").read_bytes())
            if key not in made:
                made[key] = checks.remake(quantized, source)
            return made[key]

        yield from real(artifact, model, parent, notes, replace(checks, remake=once))

    graph_export._against = against
    yield
    graph_export._against = real
