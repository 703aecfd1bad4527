"""In place of starting Python and vLLM anew for every engine: its command in a fork of a process that has both."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

from exporters.vllm.environment import inspect_environment, last_lines
from fp8pipe.core.errors import Fp8PipeError
from validation.vllm import launcher

__all__ = ["LastingEngines", "lasting_engines", "probed", "vllm_fork"]

LOOP = Path(__file__).with_name("engine_loop.py")
_IMPORTED_S, _POLL_S = 300, 0.25


class VllmFork:
    """Runs commands of one interpreter in forks of a process that has imported vLLM; see `engine_loop`."""

    def __init__(self, python: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fp8pipe-engines-")
        self._log, self._socket = Path(self._folder.name) / "log", Path(self._folder.name) / "socket"
        environment = launcher.in_process()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, "-P", str(LOOP), str(self._socket)], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=environment, start_new_session=True,
            )  # fmt: skip
        atexit.register(self._end)

    def run(
        self, command: list[str], environment: dict[str, str], out: Path, err: Path, timeout_s: float, ended: Event
    ) -> int | None:
        """The exit status of `python command`; None if time was up or `ended` was set, which ends the process."""
        asked = {"command": command, "environment": environment, "out": str(out), "err": str(err)}
        until, said = time.monotonic() + timeout_s, b""
        with self._connected() as connection:
            connection.sendall(json.dumps(asked).encode() + b"\n")
            connection.settimeout(_POLL_S)
            while said.count(b"\n") < 2:  # its process id, and its exit status
                try:
                    more = connection.recv(64)
                except TimeoutError:
                    if b"\n" in said and (ended.is_set() or time.monotonic() > until):
                        os.killpg(int(said), signal.SIGKILL)
                        return None
                else:
                    said += more
                    if not more:  # it was killed
                        return -signal.SIGKILL
        return int(said.split()[1])

    def _connected(self) -> socket.socket:
        until = time.monotonic() + _IMPORTED_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._socket))
            except OSError:
                connection.close()
                ends = self._process.poll() is not None or time.monotonic() > until
                assert not ends, last_lines(self._log, 40)
                time.sleep(0.05)
            else:
                return connection

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


@cache
def vllm_fork(python: str) -> VllmFork:
    """The one of this process and interpreter."""
    return VllmFork(python)


class LastingEngines:
    """Takes the place of `launcher._run`.

    Attributes:
        started: engines that were asked for.
    """

    def __init__(self) -> None:
        self.started = 0

    def __call__(self, command: list[str], variables: dict[str, str], log: Path, timeout_s: float, ended: Event) -> int:
        python, safe, *given = command
        assert safe == "-P"
        self.started += 1
        code = vllm_fork(python).run(given, variables, log, log, timeout_s, ended)
        if code is None:
            raise Fp8PipeError("vLLM did not finish in time, or was ended", why=last_lines(log, 40))
        return code


@contextmanager
def lasting_engines() -> Iterator[LastingEngines]:
    """While this lasts, validations in vLLM run their engines in forks of one process."""
    engines = LastingEngines()
    with patch.object(launcher, "_run", engines):
        yield engines


def probed(python: Path, jobs: Iterable[launcher.ProbeJob], dump: Path) -> list[dict[str, Any]]:
    """The results of jobs, one engine after the other; tensors that differ are written into `dump`, a folder each."""
    environment, found = inspect_environment(python), []
    with lasting_engines():
        for number, job in enumerate(jobs):
            (folder := dump / f"differs-{number}").mkdir()
            found.append(launcher.run_probe(job, environment, folder, timeout_s=900))
    return found
