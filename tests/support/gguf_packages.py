"""Whether the packages that GGUF files need are installed."""

from __future__ import annotations

import importlib.metadata

import pytest


def has(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_gguf = pytest.mark.skipif(not (has("gguf") and has("accelerate")), reason="gguf, accelerate not installed")
