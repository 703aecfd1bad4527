"""Logging goes to stderr, at the level asked for, and is set up once however often it is asked for."""

import logging
import os
import pty
import subprocess
import sys

import pytest

from fp8pipe.core import progress


@pytest.fixture(autouse=True)
def _restore():
    yield
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not hasattr(handler, progress._MARK)]
    root.setLevel(logging.WARNING)
    for package in progress.PACKAGES:
        logging.getLogger(package).setLevel(logging.NOTSET)
    logging.captureWarnings(False)
    progress.configure()


def say() -> None:
    for name in ("pipeline.falqon", "somebody.else"):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger(name).log(level, "%s", logging.getLevelName(level))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["INFO pipeline.falqon", "WARNING pipeline.falqon", "WARNING somebody.else"]),
        ({"quiet": True}, ["WARNING pipeline.falqon", "WARNING somebody.else"]),
        (
            {"verbose": True},
            [
                "DEBUG pipeline.falqon",
                "INFO pipeline.falqon",
                "WARNING pipeline.falqon",
                "INFO somebody.else",
                "WARNING somebody.else",
            ],
        ),
    ],
)
def test_levels(options, expected, capsys):
    progress.setup_logging(json=True)
    progress.setup_logging(**options)
    say()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.rpartition(":")[0] for line in captured.err.splitlines()] == expected


def test_what_a_library_prints_itself_is_not_printed_again(capsys):
    progress.setup_logging(json=True)
    library = logging.getLogger("a_library")
    handler = logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    library.addHandler(logging.NullHandler())
    try:
        logging.getLogger("a_library.part").warning("once")
        logging.getLogger("another").warning("by us")
        library.removeHandler(handler)
        library.warning("now by us")
    finally:
        library.handlers.clear()
    assert capsys.readouterr().err.splitlines() == [
        "once",
        "WARNING another: by us",
        "WARNING a_library: now by us",
    ]


BARS = """
import sys
if sys.argv[1] == "before":
    import huggingface_hub, transformers, datasets
from fp8pipe.core.progress import setup_logging
setup_logging(quiet=sys.argv[2] == "quiet")
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils.logging import is_progress_bar_enabled
import datasets
print(are_progress_bars_disabled(), not is_progress_bar_enabled(), datasets.are_progress_bars_disabled())
"""


@pytest.mark.parametrize(
    ("when", "asked", "terminal", "hidden"),
    [("before", "quiet", True, True), ("after", "", False, True), ("after", "", True, False)],
)
def test_libraries_draw_bars_where_ours_are_drawn(when, asked, terminal, hidden):
    environment = {k: v for k, v in os.environ.items() if "PROGRESS_BARS" not in k}
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", BARS, when, asked], stdout=subprocess.PIPE,
        stderr=slave if terminal else subprocess.PIPE, env=environment, check=True, text=True,
    )  # fmt: skip
    os.close(slave)
    os.close(master)
    assert done.stdout.split() == [str(hidden)] * 3
