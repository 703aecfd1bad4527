"""The set-up scripts: a pip that finds no CPU build of torch is explained, in words and with an exit code."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = """#!/bin/sh
case "$*" in *"-m pip install"*) echo "$FAKE_PIP" >&2; exit 1 ;; esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A virtual environment whose Python holds nothing, and whose pip fails with the words in FAKE_PIP."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    return tmp_path / "venv"


def _set_up(venv: Path, words: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / "setup_vllm.sh"), str(venv)]
    env = {"PATH": "/usr/bin:/bin", "FAKE_PIP": words}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_no_cpu_build_of_torch_is_explained(venv: Path) -> None:
    done = _set_up(venv, "ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert done.returncode == 11
    assert "CPU build of torch 2.13.0" in done.stderr
    assert "pip config set global.extra-index-url" in done.stderr
    assert "No matching distribution" in done.stderr  # pip's own words stay


def test_other_failures_keep_pips_words_alone(venv: Path) -> None:
    done = _set_up(venv, "ERROR: no space left")
    assert done.returncode == 11
    assert "no space left" in done.stderr
    assert "CPU build" not in done.stderr


def test_torch_is_named_beside_torchvision() -> None:
    """Or pip takes the newest torchvision, and with it the torch that this one was built for."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    recipe = next(line for line in lines if "pip install -q -e" in line)
    assert "$(EXTRAS)" in recipe
    assert ",vit," in next(line for line in lines if line.startswith("EXTRAS :="))
    assert recipe.endswith(" $(TORCH)")


def test_the_makefile_explains_it_too() -> None:
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install -q $(TORCH)" in line)
    assert "explain_torch.sh" in recipe
