"""The guard: exit codes and figures are passed on, signals too, and nothing of a command lives on."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from fp8pipe.core.guard import start_guarded

SLEEP = "import time; time.sleep(600)"
# Starts a process in a session of its own, says its number, and waits.
LEAVES = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "{SLEEP}"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def python(code: str, *arguments: object, **options):
    return start_guarded([sys.executable, "-I", "-S", "-c", code, *map(str, arguments)], **options)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def number_in(file: Path) -> int:
    until(lambda: file.is_file() and file.read_text())
    return int(file.read_text())


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + signal.SIGKILL)]
)
def test_the_exit_code_and_the_figures_are_the_command_s(tmp_path, code, expected):
    process, held = python(code, report=tmp_path / "ended.json")
    assert process.wait(60) == expected
    os.close(held)
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert ended["code"] == expected
    assert ended["seconds"] > 0
    assert ended["peak_rss_bytes"] > 1e6


def test_sigterm_reaches_the_command(tmp_path):
    file = tmp_path / "ready"
    code = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        "open(sys.argv[1], 'w').write('1'); time.sleep(600)"
    )
    process, held = python(code, file)
    number_in(file)
    process.terminate()
    assert process.wait(60) == 7
    os.close(held)


def test_closing_the_pipe_kills_what_the_command_left_in_other_sessions(tmp_path):
    process, held = python(LEAVES, tmp_path / "pid")
    left = number_in(tmp_path / "pid")
    os.close(held)
    assert process.wait(60) == 128 + signal.SIGKILL
    assert not alive(left)


def test_the_command_dies_with_its_guard(tmp_path):
    process, held = python(f"import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); {SLEEP}", tmp_path / "pid")
    command = number_in(tmp_path / "pid")
    process.kill()
    process.wait(60)
    until(lambda: not alive(command))
    os.close(held)
