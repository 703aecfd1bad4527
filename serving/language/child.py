"""One run of the server below the supervisor: its processes, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Child"]

_GUARD = Path(__file__).with_name("guard.py")


class Child:
    """The command, running below a guard in a session of its own.

    Args:
        command: what to run.
        env: its environment.
        log: where its output goes; begun anew with each run, so that it cannot fill a disk with restarts.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        read, self._leash = os.pipe()
        try:
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_GUARD), str(read), *command],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(env),
                    pass_fds=(read,), start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(read)
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
        """End every process of the group: politely, then not. Also to be called after it ended by itself."""
        with contextlib.suppress(ProcessLookupError):
            if self.exit_code() is None and grace_s > 0:
                os.killpg(self.pid, signal.SIGTERM)
                await self._wait(grace_s)
        # Workers may have stayed behind, so the group is killed even when its leader has gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._wait(5.0)
        with contextlib.suppress(OSError):
            os.close(self._leash)
            self._leash = -1

    async def _wait(self, longest_s: float) -> None:
        deadline = asyncio.get_running_loop().time() + longest_s
        while self._process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
