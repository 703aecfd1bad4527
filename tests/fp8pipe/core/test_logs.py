"""Logging goes to stderr, at the level asked for, and is set up once however often it is asked for."""

import logging

import pytest

from fp8pipe.core import progress


@pytest.fixture(autouse=True)
def _restore():
    yield
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not hasattr(handler, progress._MARK)]
    root.setLevel(logging.WARNING)
    for room in progress.ROOMS:
        logging.getLogger(room).setLevel(logging.NOTSET)
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
