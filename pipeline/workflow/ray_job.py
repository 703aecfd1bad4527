"""The task that runs one stage on a node of a Ray cluster, as a command under a supervisor.

If Ray ends the process of the task, or the process is lost, the supervisor kills all processes of the stage.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import Fp8PipeError, MissingCapabilityError
from fp8pipe.core.guard import start_guarded
from fp8pipe.core.ray_cluster import describe
from fp8pipe.core.version import __version__

__all__ = ["PROGRAM", "STOP_S", "Outcome", "StageJob", "run_job"]

PROGRAM: Final = ("-P", "-m", "fp8pipe")  # what Python runs on a node
STOP_S: Final = 90.0  # in which an interrupted stage must end; `fp8pipe run` gives it 60 s
_POLL_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class StageJob:
    """A stage to run, as it is sent to a node.

    Attributes:
        name: of the stage.
        arguments: the command line after `fp8pipe`.
        folder: the working directory.
        shared: absolute path of a file in the directory of the run, by which a node knows that it shares the directory.
        version: of fp8pipe, where the run was started.
        gpus: number of GPUs that the stage has.
        threads: OMP_NUM_THREADS where the run was started, if it was set there.
        program: what Python runs there.
    """

    name: str
    arguments: tuple[str, ...]
    folder: str
    shared: str
    version: str
    gpus: int
    threads: str | None = None
    program: tuple[str, ...] = PROGRAM

    def check(self) -> None:
        """Check what this node has in common with the one where the run was started.

        Raises:
            MissingCapabilityError: it does not share the directories, or has another fp8pipe.
        """
        node = platform.node()
        if self.version != __version__:
            raise MissingCapabilityError(
                f"{node} has fp8pipe {__version__}", why=f"the run was started with {self.version}",
                fix="install the same version in the Python environment of every node",
            )  # fmt: skip
        for path in (self.shared, self.folder):
            if not Path(path).exists():
                raise MissingCapabilityError(
                    f"{node} does not share the directory of the run", why=f"{path} is not there",
                    fix="start the run in a directory on a file system that all nodes have under the same path, and "
                    "give --output there",
                )  # fmt: skip

    def environment(self, present: Mapping[str, str]) -> dict[str, str]:
        """The environment of the stage, from that of Ray's worker.

        Ray sets OMP_NUM_THREADS to the number of CPUs that it reserves, so results would depend on that; and a task
        without GPUs sees all of them.
        """
        found = {name: value for name, value in present.items() if name != "OMP_NUM_THREADS"}
        if self.threads is not None:
            found["OMP_NUM_THREADS"] = self.threads
        return found if self.gpus else {**found, "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage: exit code and JSON document of its command, or an error (see `describe`) before it."""

    code: int = 0
    document: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def run_job(job: StageJob) -> Outcome:
    """Run a stage on this node; a `KeyboardInterrupt` interrupts it."""
    try:
        job.check()
    except Fp8PipeError as error:
        return Outcome(error=describe(error))
    # A process that Ray starts blocks SIGINT, which its own children would inherit.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    command = [sys.executable, *job.program, *job.arguments]
    process, held = start_guarded(
        command, cwd=job.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=job.environment(os.environ)
    )
    try:
        answer = _wait(process)
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
        raise
    finally:
        os.close(held)
        process.wait()
    return Outcome(process.returncode, _document(answer))


def _wait(process: subprocess.Popen[bytes]) -> bytes:
    """What the process prints; waits in steps, as Ray's interruption of a task ends no system call."""
    while True:
        try:
            return process.communicate(timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired:
            continue


def _document(answer: bytes) -> dict[str, Any]:
    """The JSON object that a command has printed; empty if it printed something else."""
    try:
        found = json.loads(answer)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
