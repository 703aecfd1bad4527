"""`fp8pipe finetune` on the command line: its options, and what it says at the end."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter, Gate
from fp8pipe.artifact.gate import none_of
from fp8pipe.cli import main
from fp8pipe.cli.common import Console, show_artifact
from fp8pipe.cli.tune import finetuned_lines
from fp8pipe.core.errors import GateFailedError


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_unknown_choice_is_a_usage_error():
    result = invoke("finetune", "--model", "m", "--data", "d", "--output", "o", "--update-rule", "lve")
    assert result.exit_code == 2
    assert "accumulate-feedback" in result.stderr


def test_model_and_data_may_come_from_the_file(tmp_path):
    output = tmp_path / "out"
    bare = invoke("finetune", "--output", output)
    assert bare.exit_code == 2
    assert "--model" in bare.stderr
    assert "--data" in bare.stderr
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {tmp_path / 'absent'}\ndata: sample:chatterbot\n")
    result = invoke("finetune", "--config", settings, "--output", output)
    assert result.exit_code == 10
    assert str(tmp_path / "absent") in result.stderr  # it went as far as looking for the model
    settings.write_text("data: sample:chatterbot\n")
    result = invoke("finetune", "--config", settings, "--output", output)
    assert result.exit_code == 10
    assert "model: required and not given" in result.stderr
    assert invoke("finetune", "--config", settings).exit_code == 2  # --output stays required
    settings.write_text("{model: m, data: d, settle_batches: 3}")
    result = invoke("finetune", "--config", settings, "--output", output)
    assert result.exit_code == 10
    assert "settle_batches: unknown key, it is called 'final_merge_batches' now" in result.stderr


@pytest.fixture
def finished(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (writer.root / "model.safetensors").write_bytes(b"weights")
        writer.warn("one fallback")
        writer.gate(Gate(name="learned", value=2.5, comparison="at most", threshold=2.0, detail="nats"))
        writer.gate(none_of("bytes", 0))
        losses = {"untuned": 2.0, "deployed": 2.5}
        health = {"changed": 0.03125, "saturated": 0.0, "norm_ratio": 1.0, "cosine": 0.9}
        return writer.commit(details=details_of("falqon", heldout_loss=losses, final_merge=health, rule="live"))


def test_a_finished_run_shows_what_is_wrong(finished):
    text = "\n".join(finetuned_lines(finished))
    assert "warning: one fallback" in text
    assert "failed gate: learned" in text
    assert "2.5 (at most 2)" in text
    assert "failed gate: bytes" not in text


def test_a_failed_gate_is_exit_code_14_and_no_next_step_is_named(finished, capsys):
    console = Console()
    with pytest.raises(GateFailedError, match="not every gate passed") as caught:
        show_artifact(console, finished, ["done"], "fp8pipe export", remedy="train longer")
    assert (caught.value.exit_code, caught.value.fix) == (14, "train longer")
    assert "learned: 2.5 (at most 2)" in caught.value.why
    assert "bytes" not in caught.value.why
    assert capsys.readouterr().out == "done\n"
    assert [gate["passed"] for gate in console.document["gates"]] == [False, True]


def test_inspect_shows_losses_and_the_final_merge(finished):
    lines = [" ".join(line.split()) for line in invoke("inspect", finished.root).stdout.splitlines()]
    assert "held-out loss untuned 2, deployed 2.5 nats per answer token" in lines
    merged = next(line for line in lines if line.startswith("final merge"))
    assert "changed 0.03125" in merged
    assert "cosine 0.9" in merged
    document = json.loads(invoke("inspect", finished.root, "--json").stdout)
    assert document["manifest"]["details"]["final_merge"]["cosine"] == 0.9
