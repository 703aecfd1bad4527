"""Stands between the chain and a stage, so that nothing of a stage outlives either: `guard.py LEASH REPORT COMMAND...`.

A stage may start engines in sessions of their own. This process adopts what they leave behind (it is a subreaper),
watches a pipe whose other end the chain holds, and kills every descendant when the pipe ends, that is when the chain
does, however it dies; and when the stage itself ends. It reports exit status, wall time and peak memory. Standard
library only; started with `-I -S`.
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
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.1
_KILL_ROUNDS = 50


def main() -> int:
    """Run the command; its exit status, or 128 and the signal's number."""
    leash, report, command = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.monotonic()
    child = subprocess.Popen(command, close_fds=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: child.send_signal(n))
    while True:
        ended, _, _ = select.select([leash], [], [], _POLL_S)
        if ended and not os.read(leash, 1):
            kill_descendants()
            return 128 + signal.SIGKILL
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if pid:
            break
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    kill_descendants()
    seconds = time.monotonic() - started
    report.write_text(json.dumps({"code": code, "seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}))
    return code


def kill_descendants() -> None:
    """Kill children, and what they leave to us, until none is left."""
    for _ in range(_KILL_ROUNDS):
        for pid in descendants(os.getpid()):
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


def descendants(root: int) -> list[int]:
    """Processes below `root`, from /proc."""
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
