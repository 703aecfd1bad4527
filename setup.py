"""Builds as pyproject.toml says, and notes in the wheel which commit it was built from, for `fp8pipe --version`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithCommit(build_py):
    """Adds `fp8pipe/core/COMMIT`; without git, as in a container's build, `FP8PIPE_COMMIT` may give it."""

    def run(self) -> None:
        """Copy the packages, then write the file if the commit is known."""
        super().run()
        if not self.editable_mode and (commit := os.environ.get("FP8PIPE_COMMIT") or _commit()):
            Path(self.build_lib, "fp8pipe", "core", "COMMIT").write_text(commit + "\n")


def _commit() -> str:
    """The checkout's commit, marked if files differ from it; empty if this is no checkout of this project."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty=-modified", "--exclude=*", "--abbrev=12"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


setup(cmdclass={"build_py": BuildWithCommit})
