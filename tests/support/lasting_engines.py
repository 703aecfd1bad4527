"""In place of starting vLLM anew for every probe: the same probe, jobs and environment, in processes that last."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from unittest.mock import patch

from exporters.vllm.environment import last_lines
from validation.vllm import launcher

__all__ = ["LastingEngines", "lasting_engines"]

LOOP = Path(__file__).with_name("engine_loop.py")


class LastingEngines:
    """Takes the place of `launcher._run`: one process for each environment that engines are asked for in.

    Attributes:
        started: engines that were asked for.
    """

    def __init__(self) -> None:
        self.started = 0
        self._folder = tempfile.TemporaryDirectory(prefix="fp8pipe-engines-")
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __call__(self, command: list[str], variables: dict[str, str], log: Path, timeout_s: float, ended: Event) -> int:
        python, _, probe, job = command
        self.started += 1
        log.touch()
        key = json.dumps([probe, variables], sort_keys=True)
        process = self._processes.get(key) or self._start([python, "-P", str(LOOP), probe], variables, key)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{job}\t{log}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, last_lines(Path(self._folder.name) / "imports.log", 40)
        return int(answer)

    def _start(self, command: list[str], variables: dict[str, str], key: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        with (Path(self._folder.name) / "imports.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, env=variables, text=True, start_new_session=True
            )
        self._processes[key] = process
        return process

    def end(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._folder.cleanup()


@contextmanager
def lasting_engines() -> Iterator[LastingEngines]:
    """While this lasts, validations in vLLM run their engines in processes that last as long."""
    engines = LastingEngines()
    with patch.object(launcher, "_run", engines):
        try:
            yield engines
        finally:
            engines.end()
