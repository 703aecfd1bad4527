"""Logging: everything for people goes to stderr, so that stdout holds nothing but results.

Modules call `logging.getLogger(__name__)`; only a command calls `setup`. Rich is for a terminal only.
"""

from __future__ import annotations

import logging
import sys

from fp8pipe.core import progress

__all__ = ["setup"]

ROOMS = ("fp8pipe", "calibration", "pipeline", "exporters", "validation", "serving")
_MARK = "_fp8pipe_handler"


def setup(json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
    """Configure logging for one command; calling it again replaces the earlier set-up.

    Args:
        json: plain lines even on a terminal, since a program is reading.
        quiet: warnings and errors only, and no progress.
        verbose: our debug messages and the libraries' information.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if hasattr(handler, _MARK)]:
        root.removeHandler(handler)
    handler = _handler(plain=json or not sys.stderr.isatty())
    setattr(handler, _MARK, True)
    root.addHandler(handler)
    root.setLevel(logging.INFO if verbose else logging.WARNING)
    ours = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    for room in ROOMS:
        logging.getLogger(room).setLevel(ours)
    logging.captureWarnings(True)
    progress.configure(quiet=quiet, plain=json)


def _handler(plain: bool) -> logging.Handler:
    if plain:
        handler: logging.Handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        return handler
    from rich.console import Console
    from rich.logging import RichHandler

    return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
