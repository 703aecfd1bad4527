"""Runs contenders in processes of their own, and measures their time and memory.

`run_measured` runs a command to its end. `Worker` is a process that does its work whenever it is told to, so that the
time to load a model is not part of what is measured. Both end the whole process group when the time is up.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "benchmarks" / "workers"
sys.path.insert(0, str(WORKERS))

from protocol import read  # noqa: E402

_SAMPLE_S = 0.01
_SHOWN_LINES, _SHOWN_CHARACTERS = 4, 600


class ContenderError(Exception):
    """A contender cannot be measured; the message is the reason that the tables give."""


@dataclass(frozen=True)
class Measured:
    """A command that has ended.

    Attributes:
        seconds: wall time.
        processor_seconds: user and system time of the process and of the children that it waited for.
        resident_bytes: peak resident memory of the process and its descendants, with files that are mapped.
        anonymous_bytes: the same without mapped files.
        figures: the last line that the command wrote as a worker does (`workers/protocol.py`).
    """

    seconds: float
    processor_seconds: float
    resident_bytes: int
    anonymous_bytes: int
    figures: Mapping[str, float]


def run_measured(
    command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None, timeout_s: float = 3600.0
) -> Measured:
    """Run a command to its end, while its memory is sampled every 10 ms.

    Args:
        command: the command line.
        log: the file that receives what the command writes.
        environment: all variables of its environment; None for those of this process.
        timeout_s: the time after which it is ended.

    Raises:
        ContenderError: it cannot be started, failed, or took longer; the message has its last lines.
    """
    resident = anonymous = 0
    with log.open("wb") as out:
        began = time.monotonic()
        try:
            process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ContenderError(f"{command[0]} does not start: {error.strerror}") from error
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if done:
                break
            sizes = memory(process.pid)
            resident, anonymous = max(resident, sizes[0]), max(anonymous, sizes[1])
            if seconds > timeout_s:
                end_group(process.pid)
                os.wait4(process.pid, 0)
                raise ContenderError(f"it took longer than {timeout_s:g} s")
            time.sleep(_SAMPLE_S)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ContenderError(_ended(process.returncode, log))
    lines = [found for line in log.read_text(errors="replace").splitlines() if (found := read(line)) is not None]
    processor = used.ru_utime + used.ru_stime
    return Measured(seconds, processor, resident, anonymous, lines[-1] if lines else {})


class Worker:
    """A process that does its work once for every `round`.

    Args:
        command: the command line.
        log: the file that receives its standard error.
        environment: all variables of its environment; None for those of this process.
        timeout_s: the longest time until it is ready, and the longest of a round.

    Attributes:
        ready: what it said when it was ready.

    Raises:
        ContenderError: it did not start.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None,
        timeout_s: float = 1800.0,
    ) -> None:  # fmt: skip
        self._log, self._timeout_s, self._pending = log, timeout_s, b""
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
                env=environment, start_new_session=True, bufsize=0,
            )  # fmt: skip
        try:
            self.ready = self._answer()
        except ContenderError:
            self.close()
            raise

    def round(self) -> dict[str, float]:
        """Let it do its work once; returns its figures.

        Raises:
            ContenderError: it ended, or took too long; the message has its last lines.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"round\n")
        except BrokenPipeError:
            raise ContenderError(_ended(self._process.wait(), self._log)) from None
        return {name: float(value) for name, value in self._answer().items()}

    def close(self) -> None:
        """Close its input, which ends it; a process that goes on after some seconds is killed, with its children."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        end_group(self._process.pid)
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, float]:
        """The next line of figures."""
        assert self._process.stdout is not None
        until = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                line, found, rest = self._pending.partition(b"\n")
                if found:
                    self._pending = rest
                    figures = read(line.decode(errors="replace"))
                    if figures is not None:
                        return figures  # type: ignore[return-value]
                    continue
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise ContenderError(f"it did not answer within {self._timeout_s:g} s")
                part = self._process.stdout.read(65536)
                if not part:
                    raise ContenderError(_ended(self._process.wait(), self._log))
                self._pending += part


def memory(pid: int) -> tuple[int, int]:
    """Resident memory and anonymous memory of a process and its descendants now, in bytes.

    The resident memory of a single process is its peak so far, which the system keeps (`VmHWM`).
    """
    pids = _family(pid)
    resident = anonymous = 0
    key = "VmHWM:" if len(pids) == 1 else "VmRSS:"
    for one in pids:
        try:
            text = Path(f"/proc/{one}/status").read_text()
            resident += int(text.split(key)[1].split()[0]) * 1024
            anonymous += int(text.split("RssAnon:")[1].split()[0]) * 1024
        except (OSError, IndexError):  # it has just ended
            continue
    return resident, anonymous


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            with suppress(OSError):  # it has just ended
                found += map(int, children.read_text().split())
    return found


def environment_of(*, project: bool, **more: str) -> dict[str, str]:
    """The variables for a contender's process.

    Args:
        project: whether it imports this project's packages; peers must not see them.
        **more: further variables.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | ({"PYTHONPATH": str(ROOT)} if project else {}) | more


def last_lines(log: Path) -> str:
    """The last lines of a log, as one line for a table."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-_SHOWN_LINES:])[-_SHOWN_CHARACTERS:]


def _ended(code: int, log: Path) -> str:
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"it ended {how}: {last_lines(log) or 'it wrote nothing'}"


def end_group(group: int) -> None:
    """Kill a process that was started in a new session, and its descendants."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
