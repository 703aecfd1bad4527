"""The shell lines with curl in README.md and in docs/, as they stand there, against a live server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from doc_commands import run_command, shell_commands
from PIL import Image
from running_server import running

from serving.http.admission import hash_key, new_key

_ROOT = Path(__file__).resolve().parents[3]
_ADDRESS = "http://localhost:8000"
_DOCUMENTS = ("README.md", "docs/start.md", "docs/serving.md")
_LINES = [
    pytest.param(command, id=f"{name}:{command.line}")
    for name in _DOCUMENTS
    for command in shell_commands(_ROOT / name)
    if "curl " in command.text
]
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def keyed(export, tmp_path_factory):
    """(address, key) of a server that asks for keys."""
    path, key = tmp_path_factory.mktemp("keys") / "keys", new_key()
    path.write_text(hash_key(key, "alice") + "\n")
    with running(export, "--api-key-file", str(path), "--max-batch", "2", "--threads", "1") as server:
        yield server.url, key


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("cat.jpg", "dog.png", "seven.png"):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / name)
    return folder


def test_the_documents_show_what_is_tested():
    assert sum("README" in param.id for param in _LINES) >= 1
    assert sum("start" in param.id for param in _LINES) >= 1
    assert sum("serving" in param.id for param in _LINES) >= 9
    # Lines outside fences would not be found.
    for name in _DOCUMENTS:
        shown = sum(line.lstrip(" $").startswith("curl ") for line in (_ROOT / name).read_text().splitlines())
        assert shown == sum(c.text.startswith("curl ") for c in shell_commands(_ROOT / name)), name


@pytest.mark.parametrize("command", _LINES)
def test_a_line_works(command, server, keyed, pictures):
    assert _ADDRESS in command.text
    url, key = keyed if "$KEY" in command.text else (server.url, "")
    # What a reader sees: the answer, and no error of curl's or the server's.
    done = run_command(command, pictures, {_ADDRESS: url, "curl ": "curl -sS --fail-with-body "}, KEY=key)
    assert done.returncode == 0, done.stdout + done.stderr
    if "/v1/classify" in command.text:
        results = json.loads(done.stdout)["results"]
        assert len(results) == max(1, command.text.count("image=@"))
        assert len(results[0]["classes"]) == (3 if "top_k=3" in command.text else 5)
    elif "/v1/artifact" in command.text:
        assert json.loads(done.stdout)["task"] == "classify"
    else:
        assert done.stdout


def test_a_wrong_line_fails(server, pictures):
    """The check itself: without the picture, or without the key, a line does not pass."""
    (command,) = (param.values[0] for param in _LINES if "README" in param.id)
    replaced = {_ADDRESS: server.url, "curl ": "curl -sS --fail-with-body "}
    assert run_command(command, pictures, replaced | {"seven.png": "none.png"}).returncode != 0
    assert run_command(command, pictures, replaced | {"/v1/classify": "/v1/embed"}).returncode != 0
