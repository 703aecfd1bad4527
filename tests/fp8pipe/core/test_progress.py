"""Progress: on stderr only, silent when asked, and telling the truth about where a run stands."""

import io
import os
import pty
import subprocess
import sys

import pytest

from fp8pipe.core import progress
from fp8pipe.core.progress import format_duration, track


@pytest.fixture(autouse=True)
def _default_settings():
    progress.configure()
    yield
    progress.configure()


def test_plain_lines_go_to_stderr_and_end_with_the_count(capsys):
    with track(3, "train", interval_s=0) as tracker:
        tracker.advance(1, loss=0.123456)
        tracker.advance(2, loss=0.1, note="x")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("train: 1/3 ")
    assert "loss=0.1235" in lines[0]
    assert "left" in lines[0]
    assert lines[-1].startswith("train: 3/3 ")
    assert "done after" in lines[-1]
    assert lines[-1].endswith("loss=0.1  note=x")


def test_lines_are_rare(capsys):
    with track(1000, "train", interval_s=3600) as tracker:
        for _ in range(1000):
            tracker.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def fail_midway() -> None:
    with track(5, "train") as tracker:
        tracker.advance(2)
        raise RuntimeError("midway")


def test_a_failure_is_shown_as_stopped_and_passes_on(capsys):
    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    error = capsys.readouterr().err
    assert "train: 2/5" in error
    assert "stopped after" in error
    assert "done" not in error


def test_nothing_to_do_shows_nothing(capsys):
    with track(0, "train"):
        pass
    assert capsys.readouterr().err == ""


def test_quiet_says_nothing(capsys):
    progress.configure(quiet=True)
    with track(2, "train", interval_s=0) as tracker:
        tracker.advance(2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_resumed_run_counts_on_but_rates_only_new_work(monkeypatch):
    clock = iter([100.0, 100.0, 100.0, 102.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 102.0))
    with track(100, "train", done=90, interval_s=3600) as tracker:
        tracker.advance(4)
        line = tracker.line()
    # 4 new units in 2 s, 6 to go: 2/s and 3 s, where counting the first 90 would give 47/s and 0 s.
    assert line == "train: 94/100  2/s  0:03 left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (-1, "0:00")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


SCRIPT = """
from fp8pipe.core.progress import track
with track(2, "train") as tracker:
    tracker.advance(2, loss=0.5)
print("result")
"""


def test_a_terminal_gets_a_bar_and_stdout_stays_clean():
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=slave, env=environment, check=True
    )
    os.close(slave)
    shown = io.BytesIO()
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux reports the other end's close so
            break
        if not chunk:
            break
        shown.write(chunk)
    os.close(master)
    assert done.stdout == b"result\n"
    text = shown.getvalue().decode()
    assert "━" in text
    assert "2/2" in text
    assert "loss=0.5" in text
