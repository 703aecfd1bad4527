"""What `--version` says, and that a wheel holds the packages whole, and the commit that it was built from."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from fp8pipe.core.version import __version__, build_facts

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("fp8pipe", "pipeline", "exporters", "validation", "serving", "calibration")


def test_the_facts_are_those_of_this_environment():
    lines = build_facts().splitlines()
    assert lines[:2] == [f"fp8pipe {__version__}", f"from {ROOT}"]  # installed in place, so without a commit
    assert lines[2].startswith(f"Python {platform.python_version()} on ")
    assert f"torch {metadata.version('torch')}" in lines[3].split(", ")


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_packages_and_its_commit(tmp_path):
    """What is not listed in pyproject.toml would be missing only where the wheel is installed."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tracked = set(listed.stdout.rstrip("\0").split("\0"))
    for name in tracked:  # a copy, as setuptools writes beside the sources
        if name.startswith((*(f"{package}/" for package in PACKAGES), "setup.py", "pyproject", "README", "LICENSE")):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")], check=True,
                   env={**os.environ, "FP8PIPE_COMMIT": "0123456789ab"})  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
        opened.extractall(tmp_path / "installed")
    apart = ("serving/vllm_plugin/", "serving/container/requirements-")  # a distribution of its own; for images
    wanted = {name for name in tracked if name.startswith(PACKAGES) and not name.startswith(apart)}
    assert sorted(wanted - held) == []
    shown = subprocess.run([sys.executable, "-m", "fp8pipe", "--version"], cwd=tmp_path / "installed", check=True,
                           capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    assert shown.stdout.splitlines()[:2] == [
        f"fp8pipe {__version__} (commit 0123456789ab)", f"from {tmp_path / 'installed'}",
    ]  # fmt: skip
