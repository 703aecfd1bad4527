"""`fp8pipe run` and `schema`: the shipped recipes are right, and a real run does what docs/recipes.md says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.runs import read_run
from fp8pipe.cli import main
from fp8pipe.cli.schema import recipe_schema
from fp8pipe.cli.stages import stage_commands
from pipeline.workflow import RunOptions, RunState, WorkflowRunner, load_recipe

VLLM_PYTHON = Path(os.environ.get("FP8PIPE_VLLM_PYTHON", Path(__file__).parents[3] / ".venv-vllm" / "bin" / "python"))
RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.yaml"))
# The sample ViT with the least of everything: half a minute to a proven export.
QUICK = """
name: quick
stages:
  model:
    {command: quantize-vit, model: "sample:vit-digits", bits: w4a4, calibration: gaussian, images: 8,
     distill: {steps: 1}}
  onnx: {command: export, artifact: "stage:model", target: onnx}
  proof: {command: validate, export: "stage:onnx", against: "stage:model"}
"""


@pytest.fixture
def quick(tmp_path):
    path = tmp_path / "quick.yaml"
    path.write_text(QUICK)
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_accepted_by_every_command(path, tmp_path):
    recipe = load_recipe(path)
    WorkflowRunner(RunState(recipe, stage_commands(), tmp_path / "run", RunOptions()), print).check(recipe.stages)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema_rs")
    validator = jsonschema.validator_for(recipe_schema())
    recipe = yaml.safe_load(path.read_text())
    assert [str(error) for error in validator.iter_errors(recipe)] == []
    first = next(iter(recipe["stages"].values()))
    first["lerning_rate"] = 1
    assert not validator.is_valid(recipe)


def test_schema_is_printed_as_json():
    assert json.loads(invoke("schema").output)["title"] == "recipe of fp8pipe run"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.bits=w9a9", "model: bits"),
        ("model.imagse=3", "did you mean 'images'"),
        ("onnx.target=vllm", "onnx: target: the output of quantize-vit can be exported to onnx or trt"),
        ("onnx.format=fp8", "onnx: format"),
        ("proof.engine=tensorflow", "proof: engine: choose from"),
        ("proof.export=stage:model", "it refers to a stage that runs quantize-vit, not export"),
    ],
)
def test_mistakes_are_named_before_anything_runs(quick, tmp_path, override, words):
    result = invoke("run", quick, "--output", tmp_path / "run", "--set", override)
    assert result.exit_code == 10
    assert words in result.output
    assert not (tmp_path / "run" / "model").exists()


def test_a_plan_writes_nothing(quick, tmp_path):
    result = invoke("run", quick, "--output", tmp_path / "run", "--dry-run", "--json")
    document = json.loads(result.stdout)
    assert [(stage["name"], stage["run"]) for stage in document["stages"]] == [
        ("model", True), ("onnx", True), ("proof", True)
    ]  # fmt: skip
    assert document["stages"][1]["why"] == "after model"
    assert document["stages"][0]["plan"]
    assert not (tmp_path / "run").exists()


def test_a_plan_with_a_refused_stage_ends_as_that_stage_does(quick, tmp_path):
    result = invoke(
        "run", quick, "--output", tmp_path / "run", "--dry-run", "--set", f"model.model={tmp_path / 'none'}"
    )
    assert result.exit_code == 10
    assert "refused: " in result.output


@pytest.mark.slow
def test_a_real_run_needs_no_network_and_the_second_does_nothing_and_needs_no_torch(quick, tmp_path):
    directory = tmp_path / "run"
    quick.write_text(QUICK + '  service: {command: serve-check, export: "stage:onnx", images: 2}\n')
    ended = run_alone(quick, directory, "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["verdict"] == "ACCEPT"
    record = read_run(directory)
    assert open_artifact(directory / "onnx").manifest.parents[0].content == record.stage("model").content
    code = (
        "import sys\nfrom fp8pipe.cli import main\n"
        f"main(['run', {str(quick)!r}, '--output', {str(directory)!r}, '--no-report'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("up to date") == 4
    stages = {stage.name: stage.started for stage in read_run(directory).stages}
    assert stages == {stage.name: stage.started for stage in record.stages}
    plan = invoke("run", quick, "--output", directory, "--set", "model.images=4", "--dry-run")
    assert "changed: images 8 -> 4" in plan.output
    assert "by what model holds now" in plan.output
    assert "refused" not in plan.output  # what is there would be replaced


def run_alone(recipe: Path, output: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
    """`fp8pipe run` where the loopback is the only network: no packet can leave, and whoever tries fails."""
    alone = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
        warnings.warn("this machine does not let a user make a network namespace: the run has a network", stacklevel=2)
    else:
        outside = [*alone, sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 80), 5)"]
        assert b"unreachable" in subprocess.run(outside, capture_output=True).stderr
    command = [sys.executable, "-P", "-m", "fp8pipe", "run", str(recipe), "--output", str(output), "--no-report", *more]
    return subprocess.run([*alone, *command], capture_output=True)


LANGUAGE = """
name: language
stages:
  model: {command: finetune, model: BASE, data: DATA, rank: 16, steps: 4, batch_size: 2, sequence_length: 64,
          learning_rate: 0.01}
  checkpoint: {command: export, artifact: "stage:model", target: vllm}
  proof: {command: validate, export: "stage:checkpoint", against: "stage:model"}
"""


FORM = {"dtype": "float16", "max_model_len": 64, "enforce_eager": False, "extra": ["--swap-space", "1"]}


@pytest.mark.parametrize("command", ["validate", "serve-check"])
def test_the_form_of_serving_stands_in_a_recipe(tmp_path, command):
    """Checked by the model that `serve` is checked by, and in the file that the command is given."""
    recipe = yaml.safe_load(LANGUAGE)
    recipe["stages"]["model"] |= {"model": "sample:smollm2", "data": "sample:chatterbot"}
    recipe["stages"]["proof"] = {"command": command, "export": "stage:checkpoint", **FORM}
    path = tmp_path / "form.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    state = RunState(load_recipe(path), stage_commands(), tmp_path / "run", RunOptions())
    WorkflowRunner(state, print).check(state.recipe.stages)
    proof = next(spec for spec in state.recipe.stages if spec.name == "proof")
    assert state.filed_settings(proof) == FORM
    arguments = stage_commands()[command].arguments(state.settings(proof), tmp_path, tmp_path / "proof.yaml")
    assert arguments[-2:] == ["--config", str(tmp_path / "proof.yaml")]
    jsonschema = pytest.importorskip("jsonschema_rs")
    validator = jsonschema.validator_for(recipe_schema())
    assert [str(error) for error in validator.iter_errors(recipe)] == []
    recipe["stages"]["proof"] |= {"dtype": "int3"}
    assert not validator.is_valid(recipe)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    refused = invoke("run", path, "--output", tmp_path / "run", "--dry-run")
    assert refused.exit_code == 10
    assert "dtype" in refused.stderr


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="make setup-vllm builds vLLM's environment")
def test_the_language_road_needs_no_network_either(make_base, pairs, tmp_path):
    """Tune, export and prove in a real vLLM with nothing but the loopback."""
    base = make_base(
        "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    recipe = tmp_path / "language.yaml"
    recipe.write_text(LANGUAGE.replace("BASE", str(base)).replace("DATA", str(pairs)))
    ended = run_alone(recipe, tmp_path / "run")
    record = read_run(tmp_path / "run")
    proof = {gate.name: gate.passed for gate in record.stage("proof").gates}
    assert proof["tensors-as-planned"], ended.stderr
    assert any(name.startswith("verdict of the record") for name in proof)
    said = json.loads((tmp_path / "run" / "checkpoint.validation.json").read_text())
    assert said["weights"]["reference"] == "source"
    assert said["weights"]["layers"] == 14
    assert said["weights"]["differing"] == said["weights"]["differing_codes"] == 0
    assert said["served"]["weights"]["differing"] == 0
    assert said["logprobs"]["max_abs_diff"] < 1e-3
    # A toy may have nothing to say, which alone is a reason to reject it; but it must say what torch says.
    assert {answer["verdict"] for answer in said["canary"]} <= {"ok", "empty", "degenerate"}
    assert record.stage("checkpoint").verdict == "ACCEPT"
