"""Errors on their way from a node of a Ray cluster."""

from __future__ import annotations

import socket

import pytest

from fp8pipe.core import ray_cluster
from fp8pipe.core.errors import BadArtifactError, Fp8PipeError, MissingCapabilityError
from fp8pipe.core.ray_cluster import describe, described_error


@pytest.mark.parametrize(
    "error", [BadArtifactError("it is damaged", why="it ends early", fix="copy it"), KeyError("x")]
)
def test_an_error_keeps_its_class_and_parts_on_its_way_between_processes(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        found = described_error(describe(raised), "a node")
    if isinstance(error, Fp8PipeError):
        assert (type(found), found.what, found.why, found.fix) == (
            BadArtifactError, "it is damaged (on a node)", "it ends early", "copy it",
        )  # fmt: skip
    else:
        assert (type(found), found.what) == (Fp8PipeError, "KeyError: 'x' (on a node)")
        assert "raise error" in found.why


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_refused_in_time(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packets vanish, as they do here as soon as the queue of a listener is full, Ray would try for minutes."""
    monkeypatch.setattr(ray_cluster, "_CONNECT_S", 0.2)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = f"{scheme}127.0.0.1:{full.getsockname()[1]}"
        ray_cluster._require_reachable(address)  # takes the only place
        with pytest.raises(MissingCapabilityError, match="cannot be reached"):
            ray_cluster._require_reachable(address)
    for without_port in ("auto", "local"):
        ray_cluster._require_reachable(without_port)
