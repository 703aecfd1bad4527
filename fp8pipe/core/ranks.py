"""The place of this process among the processes that torchrun (or a launcher that sets the same variables) has started.

Nothing heavy is imported here, so that a command can ask before it loads anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from fp8pipe.core.errors import ConfigurationError

__all__ = ["Ranks", "ranks_of_environment"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The place of one process among all that run the same command."""

    rank: int  # number of this process, from 0; rank 0 writes and prints
    size: int  # number of processes
    local_rank: int  # number of this process on its machine: the GPU that it uses


def ranks_of_environment() -> Ranks:
    """The place that `RANK`, `WORLD_SIZE` and `LOCAL_RANK` state; rank 0 of one process if none of them is set.

    Raises:
        ConfigurationError: some are missing, or they are not consistent numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given:
        return Ranks(0, 1, 0)
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    try:
        rank, size, local = (int(given[name]) for name in names)
        if not (0 <= rank < size and 0 <= local < size):
            raise ValueError("a rank is not below the number of processes")
    except (KeyError, ValueError) as error:
        raise ConfigurationError(
            "the environment describes no process of a group",
            why=f"{shown}; {'all of ' + ', '.join(names) + ' are needed' if isinstance(error, KeyError) else error}",
            fix="start the command with torchrun, or unset these variables",
        ) from error
    return Ranks(rank, size, local)
