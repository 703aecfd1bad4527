"""Processes of their own with a fast start: forks of a server that has imported everything once (see `ranks.serve`).

For tests of what a killed process leaves behind, not for those of how an interpreter starts or ends.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess

import torch
from engine_loop import run
from ranks import serve


def forked(*command: str) -> BaseProcess:
    """`python *command` (`-c CODE` or a script, and arguments), without its standard output."""
    serve()
    process = multiprocessing.get_context("forkserver").Process(target=_main, args=(command,))
    process.start()
    return process


def _main(command: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    raise SystemExit(run(list(command)))
