"""The waiting of threads is only decided where the user has not."""

from __future__ import annotations

import os

import pytest

from fp8pipe.core.machine import wait_briefly

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the call sets is undone after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_threads_spin_shortly(bare: pytest.MonkeyPatch):
    wait_briefly()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_user_s_choice_stays(bare: pytest.MonkeyPatch, name: str):
    bare.setenv(name, "7")
    wait_briefly()
    assert {n: os.environ.get(n) for n in NAMES} == {n: "7" if n == name else None for n in NAMES}
