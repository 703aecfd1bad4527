"""Where processes meet, and which of several failures is printed."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from fp8pipe.core import launch
from fp8pipe.core.errors import ConfigurationError, InterruptedRunError, OutOfMemoryError
from fp8pipe.core.launch import Place, launched, own_failure


@pytest.fixture
def places(monkeypatch):
    """Three processes of one run; none of them ends this one."""
    monkeypatch.setattr(launch.atexit, "register", lambda *call: None)
    store = dist.HashStore()
    return [Place(rank, 3, rank, store) for rank in range(3)]


def test_a_process_alone_is_not_one_of_several(monkeypatch):
    launched.cache_clear()
    for name, value in (("WORLD_SIZE", None), ("WORLD_SIZE", "1")):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert launched() is None
        launched.cache_clear()


def test_an_incomplete_environment_is_refused_by_name(monkeypatch):
    launched.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="WORLD_SIZE is 2") as error:
        launched()
    assert error.value.why == "missing: LOCAL_RANK, MASTER_ADDR, MASTER_PORT"


def test_only_the_first_failure_is_printed_and_its_exit_code_is_everyones(places):
    assert places[0].failed() is None
    first = OutOfMemoryError("no memory")
    assert own_failure(places[2], first, 15) == (first, 15)
    assert own_failure(places[0], ConfigurationError("another"), 10) == (None, 15)
    assert own_failure(places[1], RuntimeError("Connection closed by peer [127.0.0.1]"), 1) == (None, 15)
    assert all(place.failed() == (2, 15) for place in places)


@pytest.mark.parametrize("error", [dist.DistBackendError("timeout"), RuntimeError("[pair.cc:5] Broken pipe")])
def test_a_lost_connection_without_another_failure_is_told_as_such(places, error):
    told, code = own_failure(places[1], error, 1)
    assert isinstance(told, InterruptedRunError)
    assert code == 130
    assert "--resume" in told.fix


def test_an_error_of_its_own_is_no_lost_connection(places):
    own = RuntimeError("shapes do not fit")
    assert own_failure(places[0], own, 1) == (own, 1)
