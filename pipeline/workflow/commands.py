"""What a workflow must know of a command to run it: which settings it takes, what it reads, where it writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["StageCommand"]

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageCommand:
    """One command that a stage may name.

    Attributes:
        name: as on the command line.
        sources: settings that may name models, data and artifacts from outside the run.
        check: builds the typed configuration and raises a ConfigurationError that names every mistake. It gets the
            settings and, by setting, the command of the stage that is read.
        arguments: the command line after `fp8pipe`, from settings (paths in the place of references), the output, and
            the file that holds the settings.
        output: where it writes, from settings, the run's directory and the stage's name.
        inline: settings that `arguments` puts on the command line; the file holds the others.
        resumable: whether it takes --resume.
        program: what the command line is given to; fp8pipe itself.
        environment: variables that it runs with, unless the user has set them.
    """

    name: str
    sources: tuple[str, ...]
    check: Callable[[Settings, Mapping[str, str]], None]
    arguments: Callable[[Settings, Path, Path], list[str]]
    output: Callable[[Settings, Path, str], Path]
    inline: tuple[str, ...] = ()
    resumable: bool = False
    program: tuple[str, ...] = (sys.executable, "-P", "-m", "fp8pipe")
    environment: Callable[[Settings], Mapping[str, str]] = lambda settings: {}
