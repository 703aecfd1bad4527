"""A Python that has imported vLLM, which is most of a tiny engine, and runs what it is asked to in forks of itself.

Started with vLLM's Python: `engine_loop.py SOCKET`. Each connection to the socket asks for one run, with a line of
JSON: `command` (a path or `-c CODE`, and arguments), `environment`, and the files `out` and `err`. The answers are two
lines: the process id, and the exit status. What a fork leaves behind, none of the next can see. The process ends when
its standard input does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from typing import Any


def load() -> None:
    """Import what an engine imports before it loads plugins."""
    gc.disable()
    import vllm.engine.arg_utils
    import vllm.entrypoints.llm  # noqa: F401

    # An engine collects garbage nine times, at half a second each with vLLM's objects among what is looked at.
    gc.collect()
    gc.freeze()
    gc.enable()


def become(job: dict[str, Any]) -> None:
    """Take a job's output files, environment and number of threads, as a new process would."""
    import torch

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def run(command: list[str]) -> int:
    """Run a script, or code after `-c`, as the main program; its exit status."""
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def answer(connection: socket.socket) -> None:
    """Do what one connection asks for, in a process of its own."""
    with connection.makefile("rw") as talk:
        job = json.loads(talk.readline())
        talk.write(f"{os.getpid()}\n")
        talk.flush()
        become(job)
        code = run(job["command"])
        sys.stdout.flush()
        sys.stderr.flush()
        talk.write(f"{code}\n")


def main() -> None:
    load()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                try:
                    answer(connection)
                finally:
                    os._exit(0)
            connection.close()


if __name__ == "__main__":
    main()
