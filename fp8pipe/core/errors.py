"""The errors that a user can encounter, each with an exit code and a message of up to three parts.

There is one class for each exit code, so that scripts can distinguish a typo (10), a missing GPU (11) and a corrupt
artifact (12) without parsing the message. Modules raise these errors; only the command line prints them and exits.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import ClassVar


class Fp8PipeError(Exception):
    """Base class of the errors.

    Args:
        what: what failed, and the object concerned.
        why: the cause, with the observed values.
        fix: what the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def __str__(self) -> str:
        parts = (self.what, self.why and f"  why: {self.why}", self.fix and f"  fix: {self.fix}")
        return "\n".join(filter(None, parts))


class ConfigurationError(Fp8PipeError):
    """A configuration, model or data set given by the user cannot be used."""

    exit_code = 10


class MissingCapabilityError(Fp8PipeError):
    """A required package, library, device or network connection is missing; the message names it and how to get it."""

    exit_code = 11


class BadArtifactError(Fp8PipeError):
    """An input artifact is incomplete, corrupt, or of an unknown schema."""

    exit_code = 12


class LintRefusedError(Fp8PipeError):
    """A linter found problems in the input of an export, and nothing was written."""

    exit_code = 13


class GateFailedError(Fp8PipeError):
    """A gate failed: a measured value is on the wrong side of its threshold."""

    exit_code = 14


class OutOfMemoryError(Fp8PipeError):
    """Memory or disk space ran out or will not suffice; the message states how much is needed."""

    exit_code = 15


class InterruptedRunError(Fp8PipeError):
    """The run was interrupted and can be resumed."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of the error's class if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__


def word(path: Path | str) -> str:
    """A path as one word of a shell, for commands that users copy from a message."""
    return shlex.quote(str(path))


def class_and_first_line(error: BaseException) -> str:
    """The name of an error's class, and the first line of its message if it has one."""
    return _with_class(error, first_line(error))


def one_line(error: BaseException, most: int | None = 300) -> str:
    """An error's whole message on one line, for libraries whose first line says little.

    Args:
        error: the error.
        most: characters that are kept; None keeps all.

    Returns:
        The message with single spaces in place of all white space; the name of the error's class if it has none.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def class_and_one_line(error: BaseException, most: int | None = 300) -> str:
    """The name of an error's class, and its message as `one_line` gives it if it has one."""
    return _with_class(error, one_line(error, most))


def _with_class(error: BaseException, line: str) -> str:
    kind = type(error).__name__
    return kind if line == kind else f"{kind}: {line}"
