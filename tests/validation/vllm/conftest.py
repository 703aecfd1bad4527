"""Exports beside what they were made from, and a torch engine in vLLM's place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from artifact_tree import rehash
from lasting_engines import lasting_engines
from torch_engine import ENVIRONMENT, TorchEngine
from trained_exports import write_family

from exporters.vllm.environment import find_vllm_python
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm import comparison, validate


@pytest.fixture(scope="session")
def python() -> Path:
    """vLLM's interpreter."""
    try:
        return find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))


@pytest.fixture
def forked_engines(python: Path) -> Iterator[None]:
    """Real engines, without their start: `fp8pipe run` and `test_validate` start whole processes."""
    with lasting_engines():
        yield


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `write_family`; not to be changed."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def tree(family: Path, tmp_path: Path) -> Path:
    """A copy whose exports lie beside what they were made from, and nowhere else."""
    copy = Path(shutil.copytree(family, tmp_path / "tree"))
    for name, source in (("quantized", "plain"), ("copied", "trained"), ("bf16", "trained")):
        rehash(copy / name, lambda data, source=source: data["parents"][0].update(path=f"/gone/{source}"))
    return copy


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TorchEngine]:
    """`engine(faults, weights)` takes vLLM's place."""
    monkeypatch.setattr(validate, "find_vllm_python", lambda python: Path("python"))
    monkeypatch.setattr(validate, "inspect_environment", lambda python: ENVIRONMENT)
    monkeypatch.setattr(comparison, "_room_for_two", lambda expected: False)  # one after the other: in a known order

    def put(*args: Any) -> TorchEngine:
        made = TorchEngine(*args)
        monkeypatch.setattr(comparison, "run_probe", made)
        return made

    put()
    return put
