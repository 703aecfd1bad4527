"""The command line: exit codes, one JSON document, and nothing heavy imported before it is needed."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from small_artifacts import E4M3, details_of

import fp8pipe.cli
from fp8pipe.artifact import ArtifactWriter, Gate, LayerRecord, NumberFormat, Parent
from fp8pipe.cli import COMMANDS, main
from fp8pipe.cli.common import Console, common_options, format_bytes, table
from fp8pipe.core import errors
from fp8pipe.core.version import __version__

HEAVY = ("torch", "rich", "numpy", "transformers", "safetensors")  # the models of options take pydantic and yaml


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The installed command line in a process of its own."""
    code = "from fp8pipe.cli import main; main(prog_name='fp8pipe')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (writer.root / "model.safetensors").write_bytes(b"weights")
        writer.warn("one fallback")
        writer.gate(Gate(name="loss ratio", value=0.5, comparison="at most", threshold=1.0))
        writer.commit(
            details=details_of("falqon"),
            seed=3,
            parents=[Parent(kind="model", digest="feedface" * 8, path="/models/base")],
            number_format=NumberFormat(name="e4m3", granularity="per-channel"),
            layers=[
                LayerRecord(name="l.0", weight=E4M3, reason="linear", shape=(8, 4)),
                LayerRecord(name="l.1", weight=E4M3, reason="linear", shape=(8, 4)),
                LayerRecord(name="head", reason="output head"),
            ],
        )
    return tmp_path / "a"


@pytest.fixture
def probe(monkeypatch):
    """Add a command to the group whose body the test gives: `probe(function)`."""
    added: dict[str, click.Command] = {}
    monkeypatch.setitem(COMMANDS, "probe", "for tests")
    original = fp8pipe.cli.LazyGroup.get_command

    def get_command(self, ctx, name):
        return added.get(name) or original(self, ctx, name)

    monkeypatch.setattr(fp8pipe.cli.LazyGroup, "get_command", get_command)

    def install(body) -> None:
        @click.command("probe")
        @click.option("--count", type=int)
        @common_options(dry_run=True)
        def command(console: Console, dry_run: bool, count: int | None) -> None:
            body(console)

        added["probe"] = command

    return install


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from fp8pipe.cli import main\n"
        "try:\n"
        "    main(['--help'], prog_name='fp8pipe')\n"
        "finally:\n"
        "    print(sorted(n for n in sys.modules if n.startswith('fp8pipe.cli.')), file=sys.stderr)\n"
        f"    print([n for n in {(*HEAVY, 'pydantic', 'yaml')} if n in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for name, short in COMMANDS.items():
        assert name in done.stdout
        assert " ".join(short.split()) in " ".join(done.stdout.split())
    commands, heavy = done.stderr.splitlines()
    assert commands == "['fp8pipe.cli.common']"
    assert heavy == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists_and_its_help_imports_nothing_heavy(name):
    code = (
        "import sys\n"
        "from fp8pipe.cli import main\n"
        "try:\n"
        f"    main([{name!r}, '--help'], prog_name='fp8pipe')\n"
        "finally:\n"
        f"    print([n for n in {HEAVY} if n in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"Usage: fp8pipe {name} " in done.stdout
    assert "--json" in done.stdout
    assert done.stderr == "[]\n"


def test_the_installed_script_is_this_group():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"fp8pipe": "fp8pipe.cli:main"}
    assert project["project"]["version"] == __version__
    assert invoke("--version").stdout.startswith(f"fp8pipe {__version__}\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [("fp8pipe exp", {"plain,export"}), ("fp8pipe finetune --update", {"plain,--update-rule"})],
)
def test_the_shell_completes_commands_and_options(words, offered):
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_FP8PIPE_COMPLETE": "bash_complete"}
    done = CliRunner().invoke(main, [], prog_name="fp8pipe", env=asked)
    assert set(done.stdout.splitlines()) == offered


def test_a_misspelt_command_gets_a_suggestion():
    result = invoke("inspct")
    assert result.exit_code == 2
    assert "Did you mean 'inspect'?" in result.stderr


ERRORS = [
    (errors.ConfigurationError, 10),
    (errors.MissingCapabilityError, 11),
    (errors.BadArtifactError, 12),
    (errors.LintRefusedError, 13),
    (errors.GateFailedError, 14),
    (errors.OutOfMemoryError, 15),
    (errors.InterruptedRunError, 130),
]


@pytest.mark.parametrize(("cls", "code"), ERRORS)
def test_our_errors_map_to_their_exit_codes(probe, cls, code):
    def body(console):
        raise cls("it broke", why="a reason", fix="a way out")

    probe(body)
    result = invoke("probe")
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == "error: it broke\n  why: a reason\n  fix: a way out\n"
    result = invoke("probe", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {
        "error": {
            "type": cls.__name__,
            "exit_code": code,
            "what": "it broke",
            "why": "a reason",
            "fix": "a way out",
        }
    }


def torch_out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def cpu_out_of_memory():
    import torch

    try:
        torch.empty(2**50, dtype=torch.float64)
    except RuntimeError as error:
        return error
    raise AssertionError("petabytes were allocated")


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (KeyboardInterrupt, 130),
        (MemoryError, 15),
        (torch_out_of_memory, 15),
        (cpu_out_of_memory, 15),
        (lambda: OSError(28, "No space left on device"), 15),
        (lambda: RuntimeError("shapes differ"), 1),
        (lambda: OSError(2, "No such file"), 1),
        (lambda: OSError(2, "No such file", "/a/b"), 1),  # a file that is gone may be a fault of ours
        (lambda: PermissionError(13, "Permission denied", "/a/b"), 10),
        (lambda: PermissionError(13, "Permission denied"), 1),
    ],
)
def test_other_failures_map_too(probe, make, code):
    error = make()

    def body(console):
        raise error

    probe(body)
    assert invoke("probe").exit_code == code
    result = invoke("probe", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["exit_code"] == code
    # What nobody foresaw keeps its traceback, the rest does not show one.
    assert ("Traceback" in result.stderr) == (code == 1)


def test_usage_errors_are_documents_too(probe):
    probe(lambda console: None)
    result = invoke("probe", "--count", "many", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["exit_code"] == 2
    assert "--count" in result.stderr
    plain = invoke("probe", "--count", "many")
    assert (plain.exit_code, plain.stdout) == (2, "")


def test_a_failure_after_the_result_makes_one_document_of_both(probe):
    def body(console):
        console.emit({"record": {"loss": float("nan"), "path": Path("/x")}}, "text")
        raise errors.GateFailedError("refused")

    probe(body)
    result = invoke("probe", "--json")
    assert result.exit_code == 14
    document = json.loads(result.stdout)
    assert document["record"] == {"loss": "nan", "path": "/x"}
    assert document["error"]["what"] == "refused"


def test_text_json_and_quiet(probe):
    probe(lambda console: console.emit({"a": 1}, "text", quiet_text="short"))
    assert invoke("probe").stdout == "text\n"
    assert invoke("probe", "--quiet").stdout == "short\n"
    assert json.loads(invoke("probe", "--json").stdout) == {"a": 1}


def test_json_stdout_holds_one_document_whatever_prints(artifact):
    # Python's print, the descriptor itself, and a child process: each would spoil the document.
    code = f"""
import os, subprocess, sys, fp8pipe.artifact as a
real = a.open_artifact
def noisy(*args, **kwargs):
    print("from python")
    os.write(1, b"from the descriptor\\n")
    subprocess.run(["echo", "from a child"], check=True)
    return real(*args, **kwargs)
a.open_artifact = noisy
from fp8pipe.cli import main
main(["inspect", "--json", {str(artifact)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout)["manifest"]["kind"] == "falqon"
    for noise in ("from python", "from the descriptor", "from a child"):
        assert noise in done.stderr


def test_inspect(artifact):
    result = invoke("inspect", artifact)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "kind falqon" in lines
    assert "parent model feedfacefeed /models/base" in lines
    assert "number format e4m3, per-channel, dequantized = code * scale" in lines
    assert any("loss ratio 0.5" in line and "at most 1" in line for line in lines)
    assert "one fallback" in lines
    assert "2 converted 8-bit e4m3, per-channel; float inputs; linear" in lines
    assert "1 skipped output head" in lines
    listed = invoke("inspect", artifact, "--layers").stdout
    assert [name for name in ("l.0", "l.1", "head") if name in listed] == ["l.0", "l.1", "head"]
    document = json.loads(invoke("inspect", artifact, "--json").stdout)
    assert document["layer_counts"] == {"converted": 2, "skipped": 1}
    assert document["manifest"]["seed"] == 3


def test_verify(artifact):
    result = invoke("verify", "--quick", artifact)
    assert result.exit_code == 0
    assert "all as written (contents not looked at)" in result.stdout
    # Hashes cover the bytes; that they are no weights is what the contents tell.
    document = json.loads(invoke("verify", artifact, "--json").stdout)
    assert {finding["check"] for finding in document["findings"]} == {"reopen"}
    (artifact / "note.txt").write_text("mine")
    quick = invoke("verify", "--quick", artifact)
    assert quick.exit_code == 12
    assert "[manifest] note.txt: it is not listed in the manifest" in quick.stderr
    assert "note.txt is not listed" in invoke("inspect", artifact).stderr
    (artifact / "note.txt").unlink()
    (artifact / "model.safetensors").write_bytes(b"weighty")
    result = invoke("verify", artifact)
    assert result.exit_code == 12
    assert "model.safetensors has sha256" in result.stderr
    # Only hashing tells: inspect does not hash.
    assert invoke("inspect", artifact).exit_code == 0


def test_not_an_artifact_through_a_real_process(tmp_path):
    done = run("verify", tmp_path)
    assert (done.returncode, done.stdout) == (12, "")
    assert "manifest.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_export_lists_only_targets_that_exist(artifact, tmp_path):
    result = invoke("export", artifact, "--target", "abacus", "--output", tmp_path / "x")
    assert result.exit_code == 2
    assert "vllm" in result.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_export_and_validate_refuse_what_is_not_there(tmp_path, dry_run):
    result = invoke("export", tmp_path / "no", "--target", "vllm", "--output", tmp_path / "x", *dry_run)
    assert result.exit_code in (10, 12)
    assert str(tmp_path / "no") in result.stderr
    assert os.listdir(tmp_path) == []
    result = invoke("validate", tmp_path / "no")
    assert result.exit_code in (10, 12)
    assert str(tmp_path / "no") in result.stderr


def test_text_helpers():
    assert [format_bytes(n) for n in (0, 999, 1000, 1_234_000, 5 * 10**9, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "5 GB",
        "2 TB",
    ]
    assert table([("a", 1), ("bbb", 22, "c")]) == "  a    1\n  bbb  22  c"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_path_that_may_not_be_read_is_no_usage_error(name):
    """click would end with 2 before the command can say what is wrong, and other commands with 10."""
    kinds = [parameter.type for parameter in main.get_command(None, name).params]
    assert not any(kind.readable for kind in kinds if isinstance(kind, click.Path))
