"""Stands between a supervisor and the server it runs, so that no process outlives it: `guard.py FD COMMAND...`.

vLLM starts engines and workers of its own. A signal that the kernel sends at a parent's death reaches one process
only, so this one leads a process group that holds them all, and watches a pipe whose other end the supervisor
holds: the pipe ends when the supervisor does, however it dies, and then the group is killed. The server itself also
gets the kernel's signal, should the guard be killed. Standard library only; started with `-I -S`.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> int:
    """Run the command; its exit status, or 128 and the signal's number."""
    leash, command = int(sys.argv[1]), sys.argv[2:]
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans of the server come here, not to init
    # A handler, not SIG_IGN, which the server would inherit: the group's SIGTERM is meant for the server.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent, close_fds=True)
    os.set_blocking(leash, False)
    while True:
        ended, _, _ = select.select([leash], [], [], 0.2)
        if ended and not os.read(leash, 1):
            os.killpg(0, signal.SIGKILL)
        code = child.poll()
        if code is not None:
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
