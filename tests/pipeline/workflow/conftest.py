"""A chain of quick stages in a directory of its own."""

from __future__ import annotations

import pytest
from chain_runner import Runner


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "run")
