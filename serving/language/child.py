"""One run of the server below the supervisor: its processes, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp8pipe.core.guard import start_guarded

__all__ = ["Child"]


class Child:
    """The command, running below a guard in a session of its own.

    Args:
        command: what to run.
        env: its environment.
        log: where its output goes; begun anew with each run, so that it cannot fill a disk with restarts.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        with log.open("wb") as out:
            self._process, self._held = start_guarded(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(env)
            )
        self.log = log

    @property
    def pid(self) -> int:
        """The guard's, which is also the group's."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; the signal's number, negative, if a signal ended it."""
        code = self._process.poll()
        return code if code is None or code <= 128 else 128 - code

    async def stop(self, grace_s: float) -> None:
        """End every process that was started: politely, then not. Also to be called after it ended by itself."""
        if self.exit_code() is None and grace_s > 0:
            self._process.terminate()  # the guard passes it on
            await self._wait(grace_s)
        with contextlib.suppress(OSError):
            os.close(self._held)  # the guard kills what is left
            self._held = -1
        await self._wait(5.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # had the guard been killed itself, workers might have stayed behind
        await self._wait(5.0)

    async def _wait(self, longest_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + longest_s
        while self._process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
