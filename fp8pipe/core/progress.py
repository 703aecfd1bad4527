"""Progress display and logging on stderr, so that stdout contains only results; and plain-text tables.

Modules log with `logging.getLogger(__name__)`; only commands call `setup_logging`. Log records that a library prints
with its own handlers are not printed a second time.

On a terminal, progress is shown by Rich as a bar with rate and time left, elsewhere by a plain line every few seconds.
If no bars are shown, the progress bars of libraries are hidden too. Usage:

    with track(steps, "train") as progress:
        for step in range(steps):
            ...
            progress.advance(1, loss=loss)
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

PLAIN_INTERVAL_S = 5.0
_settings = {"quiet": False, "plain": False}


def configure(*, quiet: bool = False, plain: bool = False) -> None:
    """Set how progress is shown from now on.

    Args:
        quiet: show no progress.
        plain: print plain lines instead of a bar, also on a terminal.
    """
    _settings.update(quiet=quiet, plain=plain)


def track(total: int, label: str, *, done: int = 0, interval_s: float = PLAIN_INTERVAL_S) -> Tracker:
    """A context manager that shows the progress of some work.

    Args:
        total: number of units of work.
        label: name of the work.
        done: number of units that an earlier run has finished; they do not count for the rate and the time left.
        interval_s: minimum time between plain lines, in seconds.
    """
    if not any(_settings.values()) and sys.stderr.isatty():
        return _BarTracker(total, label, done=done)
    return Tracker(total, label, done=done, interval_s=interval_s, silent=_settings["quiet"])


class Tracker:
    """Shows progress as plain lines, at most one every `interval_s` seconds and one at the end; see `track`."""

    def __init__(
        self, total: int, label: str, *, done: int = 0, interval_s: float = PLAIN_INTERVAL_S, silent: bool = False
    ) -> None:
        self.total, self.label, self.completed = total, label, done
        self.fields: dict[str, Any] = {}
        self._start_units, self._interval_s, self._silent = done, interval_s, silent
        self._start_s = self._shown_s = time.monotonic()

    def __enter__(self) -> Tracker:
        self._start_s = self._shown_s = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self.total or kind is not None:  # show nothing if there was nothing to do
            self._print("done" if kind is None else "stopped")

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Add `n` finished units; `fields` (such as a loss) are shown beside the progress until they are replaced."""
        self.completed += n
        self.fields.update(fields)
        if time.monotonic() - self._shown_s >= self._interval_s:
            self._print("")

    def line(self, ending: str = "") -> str:
        """The line to print: label, progress, rate, and time left, or `ending` and the elapsed time if it is given."""
        elapsed_s, rate = self._pace()
        parts = [f"{self.label}: {self.completed}/{self.total}", f"{rate:.3g}/s"]
        if ending:
            parts.append(f"{ending} after {format_duration(elapsed_s)}")
        elif rate > 0:
            parts.append(f"{format_duration((self.total - self.completed) / rate)} left")
        return "  ".join([*parts, *_format_fields(self.fields)])

    def _pace(self) -> tuple[float, float]:
        """Seconds since the start, and units completed per second since then."""
        elapsed_s = time.monotonic() - self._start_s
        return elapsed_s, (self.completed - self._start_units) / elapsed_s if elapsed_s > 0 else 0.0

    def _print(self, ending: str) -> None:
        self._shown_s = time.monotonic()
        if not self._silent:
            print(self.line(ending), file=sys.stderr, flush=True)


class _BarTracker(Tracker):
    """Shows progress as a bar on a terminal."""

    def __init__(self, total: int, label: str, *, done: int = 0) -> None:
        super().__init__(total, label, done=done)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        # stdout is not redirected, because training code may write to it as well.
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=Console(stderr=True),
            redirect_stdout=False,
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done, rate="", shown="")

    def __enter__(self) -> _BarTracker:
        super().__enter__()
        self._bar.start()
        return self

    def advance(self, n: int = 1, **fields: Any) -> None:
        self.completed += n
        self.fields.update(fields)
        shown = "  ".join(_format_fields(self.fields))
        self._bar.update(self._task, completed=self.completed, rate=f"{self._pace()[1]:.3g}/s", shown=shown)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._bar.stop()


def format_duration(seconds: float) -> str:
    """Seconds as `m:ss`, or as `h:mm:ss` from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format_fields(fields: dict[str, Any]) -> list[str]:
    items = fields.items()
    return [f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in items]


PACKAGES = ("fp8pipe", "calibration", "pipeline", "exporters", "validation", "serving")
_MARK = "_fp8pipe_handler"
_BARS_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_HIDE_BARS = {
    "huggingface_hub.utils": "disable_progress_bars", "datasets.utils": "disable_progress_bars",
    "transformers.utils.logging": "disable_progress_bar",
}  # fmt: skip


def setup_logging(json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Configure logging for a command; calling it again replaces the earlier configuration.

    Args:
        json: print plain lines also on a terminal, because the output is meant for a program.
        quiet: show only warnings and errors, and no progress.
        verbose: also show debug messages of fp8pipe and info messages of libraries.
    """
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if hasattr(handler, _MARK)]:
        root.removeHandler(earlier)
    handler: logging.Handler
    if json or not sys.stderr.isatty():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    else:
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    setattr(handler, _MARK, True)
    handler.addFilter(_is_not_printed_yet)
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    ours = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for package in PACKAGES:
        logging.getLogger(package).setLevel(ours)
    logging.captureWarnings(True)
    configure(quiet=quiet, plain=json)
    if quiet or json or not sys.stderr.isatty():
        _hide_library_bars()


def _is_not_printed_yet(record: logging.LogRecord) -> bool:
    """Logging filter: False if the record was already handled by a handler of a logger below the root logger."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return False
        logger = logger.parent if logger.propagate else None
    return True


def _hide_library_bars() -> None:
    """Hide the progress bars of libraries that load models and data, unless environment variables enable them."""
    for variable in _BARS_OFF:
        os.environ.setdefault(variable, "1")  # libraries read it when they are imported, also in child processes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn if the environment enables the bars
        for name, function in _HIDE_BARS.items():
            if (module := sys.modules.get(name)) is not None:
                getattr(module, function)()


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Format rows as plain text with aligned columns; every line begins with `indent`."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = range(max(map(len, cells), default=0))
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in columns]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)
