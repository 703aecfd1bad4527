"""The place of a process among those that a launcher has started."""

from __future__ import annotations

import pytest

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.ranks import Ranks, ranks_of_environment


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_rank_0():
    assert ranks_of_environment() == Ranks(0, 1, 0)


def test_what_torchrun_sets(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert ranks_of_environment() == Ranks(5, 8, 1)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"RANK": "0"}, "all of RANK, WORLD_SIZE, LOCAL_RANK are needed"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not below"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=x"),
    ],
)
def test_a_place_that_is_none(given, why, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        ranks_of_environment()
    assert why in caught.value.why
