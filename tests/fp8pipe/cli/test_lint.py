"""`fp8pipe lint` on files: verdict, document and exit code."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from graph_edits import opset, store
from small_graphs import mlp

from fp8pipe.cli import main


def invoke(*args: object):
    return CliRunner().invoke(main, ["lint", *map(str, args)])


@pytest.fixture
def graph(tmp_path):
    def write(*edits):
        model = mlp("fp8", "fp8")
        for edit in edits:
            edit(model)
        ir.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return write


def test_a_good_graph_passes_for_the_gpus_that_have_its_types(graph):
    path = graph()
    assert invoke(path).exit_code == 0
    done = invoke(path, "--compute-capability", "8.9", "--compute-capability", "12.0")
    assert done.exit_code == 0
    assert "0 error(s), 0 warning(s)" in done.output
    old = invoke(path, "--compute-capability", "8.9", "--compute-capability", "8.6")
    assert old.exit_code == 13
    assert "[fp8-capability]" in old.output
    assert "which compute capability 8.6 does not support" in old.output


def test_the_document_holds_every_finding_with_its_effect(graph):
    path = graph(opset(18), store("up_x_s", lambda array: -array))
    done = invoke(path, "--json")
    assert done.exit_code == 13
    document = json.loads(done.stdout)
    assert {(found["rule"], found["effect"]) for found in document["findings"]} == {
        ("scale-value", "refused"), ("opset", "warning")
    }  # fmt: skip
    assert [found["rule"] for found in document["error"]["findings"]] == ["scale-value"]
    assert "cannot be built" in document["error"]["what"]


def test_warnings_alone_are_said_and_pass(graph):
    done = invoke(graph(opset(18)))
    assert done.exit_code == 0
    assert "0 error(s), 1 warning(s)" in done.output
    assert "opset 18" in done.output


def test_no_file_and_no_capability_have_exit_codes_of_their_own(tmp_path):
    assert invoke(tmp_path / "none.onnx").exit_code == 12
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert invoke(tmp_path / "bad.onnx").exit_code == 12
    assert invoke(tmp_path / "bad.onnx", "--compute-capability", "ada").exit_code == 2


def test_one_fault_at_many_nodes_is_told_once_and_whole_in_the_document():
    from fp8pipe.artifact.finding import Finding, LintFindingsError

    many = [Finding("zero-point", f"node_{index}", "zero point 3", "quantize symmetrically") for index in range(100)]
    error = LintFindingsError(many, "x.onnx", "built", "or give --no-require")
    assert str(error).count("zero point 3") == 4
    assert "and 96 more" in str(error)
    assert "nothing was written" not in str(error)
    assert str(error).rstrip().endswith("or give --no-require")
    assert len(error.findings) == 100


def test_a_directory_is_told_from_a_file(graph):
    ended = invoke(graph().parent)
    assert ended.exit_code == 12
    assert "it is a directory" in ended.output
    assert "model.onnx" in ended.output
