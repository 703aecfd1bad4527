"""What a command prints when another thread than its own ends the process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from fp8pipe.cli import main
from fp8pipe.core import launch

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


@pytest.mark.parametrize(("command", "refused"), [("export", True), ("quantize-vit", False)])
def test_torchrun_of_a_command_that_runs_in_one_process_is_refused(command, refused, monkeypatch, tmp_path):
    """That one of several processes prints an error is tested in `pipeline/vit/test_ranks.py`: none meet here."""
    monkeypatch.setattr(launch, "launched", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [command, "--output", str(tmp_path / "out")]
    words += [str(tmp_path), "--target", "onnx"] if refused else ["--model", str(tmp_path), "--bits", "w8a8"]
    ended = CliRunner().invoke(main, words)
    assert ended.exit_code != 0
    assert ("runs in one process only" in ended.stderr) == ("torchrun has started 2" in ended.stderr) == refused
