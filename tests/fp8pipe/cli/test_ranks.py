"""What a command prints when another thread than its own ends the process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# The main thread waits, as in a collective operation, while stdout is captured twice: by the group and by the command.
ABORTED = """
import os, sys, threading, time
from fp8pipe.cli.common import Console
from fp8pipe.core.errors import InterruptedRunError

def end():
    console.abort(InterruptedRunError("cut off", why="no answer", fix="resume"))
    sys.stdout.flush()
    os._exit(130)

console = Console(json=sys.argv[1] == "json")
with console.capture_stdout(), console.capture_stdout():
    print("noise", flush=True)
    threading.Thread(target=end).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_error_of_another_thread_is_printed_as_that_of_a_command(form):
    ended = subprocess.run([sys.executable, "-c", ABORTED, form], capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert "error: cut off\n  why: no answer\n  fix: resume" in ended.stderr
    if form == "json":
        assert json.loads(ended.stdout)["error"]["exit_code"] == 130
        assert "noise" in ended.stderr
    else:
        assert ended.stdout == "noise\n"
