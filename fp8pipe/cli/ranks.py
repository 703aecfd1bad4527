"""Lets a command run as several processes of a launcher such as torchrun: one reports the result, one an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from fp8pipe.cli.common import Console, failure_of
from fp8pipe.core.errors import ConfigurationError

__all__ = ["one_report", "require_one_process"]


@contextmanager
def one_report() -> Iterator[bool]:
    """A context for a command's work; the value is whether this process reports the result.

    Of the errors of several processes, only the first is raised; the other processes end without printing, with the
    same exit code.
    """
    from fp8pipe.core.launch import launched, print_errors_with, report_failure

    place = launched()
    console = click.get_current_context().find_object(Console)
    if place is not None and console is not None:
        print_errors_with(console.abort)
    try:
        yield place is None or place.rank == 0
    except BaseException as error:
        if place is None:
            raise
        printed, code = report_failure(place, error, failure_of(error).exit_code)
        if printed is None:
            raise click.exceptions.Exit(code) from error
        if printed is error:
            raise
        raise printed from error


def require_one_process(command: str) -> None:
    """Refuse a command that would do the same work in each process of torchrun, and write the same files.

    Raises:
        ConfigurationError: torchrun has started several; raised in one of them.
    """
    # Not WORLD_SIZE alone: clusters set it for whatever runs in a job.
    if "TORCHELASTIC_RUN_ID" in os.environ and (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        with one_report():
            raise ConfigurationError(
                f"{command} runs in one process only",
                why=f"torchrun has started {size}; only finetune and quantize-vit share their work",
                fix=f"start it without torchrun: fp8pipe {command} ...",
            )
