"""How much a run of the tests tries where more of the same is only more certainty: seeds, kills, sizes.

`make test` tries the usual number. `FP8PIPE_TEST_BREADTH=long make test` tries all, and takes an hour more: before a
release, and after a change to what is judged.
"""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("FP8PIPE_TEST_BREADTH", "usual") == "long"
only_long = pytest.mark.skipif(not LONG, reason="FP8PIPE_TEST_BREADTH=long tries it")


def usual(count: int, long: int) -> int:
    """`count`, or `long` in a long run."""
    return long if LONG else count
