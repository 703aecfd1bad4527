"""A guard process that runs a command and finally kills all of its descendants: `guard.py PIPE REPORT COMMAND...`.

A command may start engines and workers in process sessions of their own, and the signal that the kernel can send when a
parent dies reaches only one process. The guard is therefore a subreaper: orphaned descendants become its children. It
also watches the file descriptor PIPE, the reading end of a pipe whose other end is held by the process that started the
guard. It kills all descendants when the command exits, or when the pipe is closed, as it is however the starting
process ends. SIGTERM and SIGINT are forwarded to the command, and the kernel kills the command if the guard itself is
killed. Exit status, wall time (seconds) and peak memory (bytes) are written to the file REPORT, unless that is empty.
The guard runs with `-I -S` and uses only the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 0.1
_KILL_ROUNDS = 50


def start_guarded(
    command: Sequence[str], *, report: Path | None = None, pass_fds: tuple[int, ...] = (), **options: Any
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command under a guard, in a new process session.

    Args:
        command: the command and its arguments.
        report: JSON file to which the guard writes exit status, wall time and peak memory of the command.
        pass_fds: file descriptors that the guard keeps open.
        **options: passed to `subprocess.Popen` for the guard.

    Returns:
        The guard process, and a file descriptor; closing it kills the command and all processes that it started.
    """
    watched, held = os.pipe()
    line = [sys.executable, "-I", "-S", __file__, str(watched), str(report or ""), *command]
    try:
        return subprocess.Popen(line, pass_fds=(watched, *pass_fds), start_new_session=True, **options), held
    except BaseException:
        os.close(held)
        raise
    finally:
        os.close(watched)


def main() -> int:
    """Run the command, and return its exit status, or 128 plus the number of the signal that ended it."""
    watched, report, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    _set_option(_PR_SET_CHILD_SUBREAPER, 1)
    started = time.monotonic()
    child = subprocess.Popen(command, preexec_fn=lambda: _set_option(_PR_SET_PDEATHSIG, signal.SIGKILL), close_fds=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: child.send_signal(n))
    while True:
        ended, _, _ = select.select([watched], [], [], _POLL_S)
        if ended and not os.read(watched, 1):
            _kill_descendants()
            return 128 + signal.SIGKILL
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    _kill_descendants()
    if report:
        seconds = time.monotonic() - started
        found = {"code": code, "seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}
        Path(report).write_text(json.dumps(found))
    return code


def _set_option(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _kill_descendants() -> None:
    """Kill all descendants of this process, including orphaned ones, repeatedly until none is left."""
    for _ in range(_KILL_ROUNDS):
        for pid in _descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


def _descendants(root: int) -> list[int]:
    """Process ids of all descendants of the process with id `root`, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [pid for pid, parent in parents.items() if parent == root]
    for pid in found:
        found += [inner for inner, parent in parents.items() if parent == pid]
    return found


if __name__ == "__main__":
    sys.exit(main())
