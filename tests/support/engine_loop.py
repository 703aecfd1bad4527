"""Probes in one vLLM process, one after the other, as they are asked for: importing vLLM is most of a tiny engine.

Started with vLLM's Python, and the environment of its engines: `engine_loop.py PROBE.py`. Each line of standard input
is `JOB.json<TAB>LOG`; the answer is the exit status that the probe would have had. Engines run in a fork of the process
that has imported vLLM. After a failure it is forked anew, so that what one leaves behind is never taken for a finding
of the next engine.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import traceback
from types import ModuleType


def loaded(path: str) -> ModuleType:
    """The probe as a module, with vLLM in memory."""
    spec = importlib.util.spec_from_file_location("probe", path)
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    import vllm.engine.arg_utils
    import vllm.entrypoints.llm  # noqa: F401

    return probe


# An engine collects garbage nine times, at half a second each with vLLM's objects in memory; once is enough.
_collect = gc.collect
gc.collect = lambda generation=2: 0


def done(probe: ModuleType, job: str, log: str) -> int:
    """Do one job, whose output goes to `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    try:
        probe.main(job)
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()
        _collect()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def work(probe: ModuleType) -> int:
    """Do jobs until one fails: 1; or until there are no more: 0."""
    answers = os.fdopen(os.dup(1), "w")
    while line := sys.stdin.readline():
        code = done(probe, *line.rstrip("\n").split("\t"))
        print(code, file=answers, flush=True)
        if code:
            return code
    return 0


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    probe = loaded(sys.argv[1])
    os.dup2(answers, 1)
    failed = True
    while failed:
        pid = os.fork()
        if pid == 0:
            os._exit(work(probe))
        failed = os.waitpid(pid, 0)[1] != 0


if __name__ == "__main__":
    main()
