"""Ray's actors: how many fit, what becomes of lost ones, and a cluster that starts none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.work import Item, Job
from fp8pipe.core.work_ray import RayPool, actors_that_fit

ROOT = Path(__file__).resolve().parents[3]
SECOND_RUN = """
import sys
from fp8pipe.core.work import Job
from fp8pipe.core.work_ray import RayPool

with RayPool(sys.argv[1], lambda: None, threads=1, gpu=False, start_s=2) as pool:
    list(pool.results(Job("work", 1, b""), None))
"""


def test_actors_are_counted_per_node() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert actors_that_fit(nodes, "GPU", 1) == 2
    assert actors_that_fit(nodes, "CPU", 3) == 3
    assert actors_that_fit(nodes, "CPU", 5) == 1  # 10 CPUs in all, but an actor cannot use two nodes
    assert actors_that_fit(nodes, "CPU", 8) == 0


@pytest.fixture
def _one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's clusters have one CPU here, whatever the machine has, and its workers find this fp8pipe."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 1}')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("_one_cpu")
def test_lost_actors_are_replaced_until_none_can_be_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Callable[[Job], Item]:
        def compute(job: Job, number: int) -> bytes:
            marker = tmp_path / f"{number}"
            if job.name == "fatal" or (number == 1 and not marker.exists()):
                marker.touch()
                os._exit(1)
            return f"{job.name} {number}".encode()

        return lambda job: lambda number: compute(job, number)

    with RayPool("local", load, threads=1, gpu=False) as pool:
        found = sorted(pool.results(Job("work", 5, b""), lambda number: b""))
        assert found == [(number, f"work {number}".encode()) for number in range(5)]
        assert caplog.text.count("is replaced") == 1
        import ray

        address = ray.get_runtime_context().gcs_address  # the CPU of this cluster is taken
        second = [sys.executable, "-c", SECOND_RUN, address]
        done = subprocess.run(second, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0
        assert "has started none of 1 actors" in done.stderr
        with pytest.raises(MissingCapabilityError, match="has lost all actors"):
            list(pool.results(Job("fatal", 1, b""), lambda number: b""))
