"""The process of a stage: it runs under a supervisor (`fp8pipe/core/guard.py`), and its log is saved and shown."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.core.guard import start_guarded

__all__ = ["Ended", "StageProcess"]


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of a stage's process."""

    code: int
    seconds: float  # wall time
    peak_rss_bytes: int  # largest resident memory of any of its processes
    document: dict[str, Any]  # its output for `--json`; empty if that is not a JSON object


class StageProcess:
    """A running stage.

    Args:
        command: the command line; `--json` is added.
        log: the file to which its stderr is appended.
        environment: default environment variables; those of this process take precedence.
        show: called with every line of its stderr.
        locks: file descriptors of the locks that the supervisor of the stage inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        show: Callable[[str], None],
        locks: Sequence[int],
    ) -> None:
        self._answer, self._report = log.with_suffix(".json"), log.with_suffix(".ended")
        self._report.unlink(missing_ok=True)
        with self._answer.open("wb") as answer:
            # The stage has its own process session, so Ctrl-C reaches only the run, which interrupts the stage once.
            self._process, self._held = start_guarded(
                [*command, "--json"], report=self._report, pass_fds=tuple(locks), stdin=subprocess.DEVNULL,
                stdout=answer, stderr=subprocess.PIPE, env={**environment, **os.environ},
            )  # fmt: skip
        self._reader = threading.Thread(target=self._copy, args=(log, show), daemon=True)
        self._reader.start()

    def poll(self) -> Ended | None:
        """The result of the stage; None while it is running."""
        if self._process.poll() is None:
            return None
        self._reader.join()
        self.close()
        figures = _document(self._report) or {"code": 1, "seconds": 0.0, "peak_rss_bytes": 0}
        self._report.unlink(missing_ok=True)
        code = int(self._process.returncode) or int(figures["code"])
        ended = Ended(code, figures["seconds"], figures["peak_rss_bytes"], _document(self._answer))
        self._answer.unlink(missing_ok=True)
        return ended

    def interrupt(self, seconds: float) -> None:
        """Send SIGINT, as Ctrl-C does; kill all processes of the stage if it has not ended after `seconds`."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.close()
        self._process.wait()

    def close(self) -> None:
        """Close the pipe to the supervisor, which then kills all processes of the stage that are still running."""
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _copy(self, log: Path, show: Callable[[str], None]) -> None:
        assert self._process.stderr is not None
        with log.open("ab", buffering=0) as file:
            for line in self._process.stderr:
                file.write(line)
                show(line.decode("utf-8", errors="replace").rstrip("\n"))


def _document(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`; empty if the file is missing or contains something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
