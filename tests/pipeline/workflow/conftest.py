"""Recipes of quick stages, run in a directory of their own."""

from __future__ import annotations

import pytest
from workflow_runner import Runner


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "run")
