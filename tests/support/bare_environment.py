"""An environment as a container image has it: the pinned requirements, fp8pipe's wheel, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_ROOMS = ["fp8pipe", "pipeline", "exporters", "validation", "serving", "calibration"]
_SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", *_ROOMS]


def bare_environment(folder: Path, pins: str) -> Path:
    """Make it in `folder`; its Python. The test is skipped where no package index can be reached.

    Args:
        folder: does not exist yet; its parent is used as scratch.
        pins: which of serving/container/requirements-*.txt.
    """
    requirements = _ROOT / "serving" / "container" / f"requirements-{pins}.txt"
    _require_index(folder.parent / "probe", requirements)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "-r", str(requirements)], check=True, timeout=600)
    source = folder.parent / "source"
    source.mkdir()
    for name in _SOURCES:
        copy = shutil.copytree if (_ROOT / name).is_dir() else shutil.copy
        copy(_ROOT / name, source / name)
    subprocess.run([*pip, str(source)], check=True, timeout=600)
    return python


def _require_index(scratch: Path, requirements: Path) -> None:
    """Skip when not even a small package that everybody has can be fetched; a wrong pin must fail instead."""
    (pin,) = (line for line in requirements.read_text(encoding="utf-8").splitlines() if line.startswith("idna=="))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--no-deps", "--retries", "1"]
    done = subprocess.run([*command, "--dest", str(scratch), pin], capture_output=True, text=True, timeout=120,
                          check=False)  # fmt: skip
    if done.returncode:
        pytest.skip(f"no package index can be reached: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
