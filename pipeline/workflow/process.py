"""One stage as a process: started under a guard, its log kept and shown, its answer read when it has ended."""

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
    """How a stage ended."""

    code: int
    seconds: float  # wall time
    peak_rss_bytes: int  # largest resident memory of any of its processes
    document: dict[str, Any]  # what it printed with `--json`; empty where that is no document


class StageProcess:
    """A running stage.

    Args:
        arguments: the command line after `fp8pipe`; `--json` is added.
        log: file for what it says on stderr.
        environment: variables to set where they are not set already.
        show: called with every line that it says.
        lock: a descriptor that its guard holds, too.
        program: what the command line is given to.
    """

    def __init__(
        self,
        arguments: Sequence[str], log: Path, environment: Mapping[str, str], show: Callable[[str], None], *, lock: int,
        program: Sequence[str],
    ) -> None:  # fmt: skip
        self._answer, self._report = log.with_suffix(".json"), log.with_suffix(".ended")
        self._report.unlink(missing_ok=True)
        with self._answer.open("wb") as answer:
            # A session of its own: Ctrl-C reaches the run alone, which passes it on once.
            self._process, self._held = start_guarded(
                [*program, *arguments, "--json"], report=self._report, pass_fds=(lock,), stdin=subprocess.DEVNULL,
                stdout=answer, stderr=subprocess.PIPE, env={**environment, **os.environ},
            )  # fmt: skip
        self._reader = threading.Thread(target=self._copy, args=(log, show), daemon=True)
        self._reader.start()

    def poll(self) -> Ended | None:
        """How it ended; None while it runs."""
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
        """Ask it to stop, as Ctrl-C does; kill all of it when it has not after some time."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self.close()
        self._process.wait()

    def close(self) -> None:
        """Let go of the guard: what still runs is killed."""
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
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
