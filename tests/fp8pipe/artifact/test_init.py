"""The package's names are there, and cost what they need: help waits for every module that is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fp8pipe.artifact as package


def test_every_name_is_found_and_no_other():
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_a_name_of_one_module_does_not_import_the_others():
    code = "import sys, fp8pipe.artifact as a, fp8pipe.artifact.kinds; a.checksum_path; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "fp8pipe.artifact.record" in loaded
    assert not {"fp8pipe.artifact.manifest", "fp8pipe.artifact.writer"} & set(loaded)
