"""The models that comparisons run on, written into the work directory by the first comparison that needs them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from comparison.harness import Settings
from comparison.processes import environment_of, run_measured

FP8PIPE = (sys.executable, "-P", "-m", "fp8pipe")


def fp8pipe(settings: Settings, log: str, *arguments: str | Path) -> None:
    """Run a command of fp8pipe.

    Args:
        settings: shared settings.
        log: name of the log file in the work directory.
        *arguments: the command line after `fp8pipe`.

    Raises:
        ContenderError: the command failed.
    """
    run_measured([*FP8PIPE, *arguments], settings.work / log, environment=environment_of(project=True))


def project_script(settings: Settings, script: Path, arguments: Sequence[str | Path], log: str) -> dict[str, float]:
    """Run a script in this project's environment; returns the figures of the last line that it says.

    Raises:
        ContenderError: the script failed.
    """
    command = [sys.executable, script, *arguments]
    return dict(run_measured(command, settings.work / log, environment=environment_of(project=True)).figures)


def language_model(settings: Settings) -> tuple[Path, str]:
    """A bf16 checkpoint in Hugging Face's layout, and its name.

    It is SmolLM2-135M-Instruct, or in quick sizes a random model with two small layers.

    Raises:
        ContenderError: it cannot be written, for instance because the sample is not installed.
    """
    if settings.quick:
        return random_model(settings, "tiny"), "a tiny random Llama"
    folder, export = settings.work / "smollm2-bf16", settings.work / "smollm2-export"
    if not folder.exists():
        fp8pipe(settings, "smollm2.log", "export", "sample:smollm2", "--target", "vllm", "--format", "bf16", "--force",
                "--output", export)  # fmt: skip
        for record in ("manifest.json", "manifest.sha256", "README.md"):
            (export / record).unlink()  # so that it is a model like any other
        export.rename(folder)
    return folder, "SmolLM2-135M-Instruct"


def random_model(settings: Settings, shape: str) -> Path:
    """A random Llama with a shape of `benchmarks/large_model.py`, as a bf16 checkpoint."""
    from large_model import SHAPES, make

    folder = settings.work / f"model-{shape}"
    make(folder, SHAPES[shape])
    return folder


def fp8_export(settings: Settings) -> Path:
    """This project's FP8 export of `language_model`.

    Raises:
        ContenderError: it cannot be written.
    """
    folder = settings.work / "language-fp8"
    if not folder.exists():
        model, _ = language_model(settings)
        fp8pipe(settings, "language-fp8.log", "export", model, "--target", "vllm", "--output", folder)
    return folder


def fresh(folder: Path) -> None:
    """Remove a directory that a command is about to write."""
    shutil.rmtree(folder, ignore_errors=True)
