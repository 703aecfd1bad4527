"""Errors on their way from a node of a Ray cluster."""

from __future__ import annotations

import pytest

from fp8pipe.core.errors import BadArtifactError, Fp8PipeError
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
