"""The registry of export targets: one that stands in one file is known to every command, and to none afterwards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy_target
from artifact_tree import rehash
from click.testing import CliRunner
from small_artifacts import write
from toy_target import LINES, TOY, ToyDetails

from exporters.target import call, choose, register, target_of, targets, unregister
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import ArtifactKind, Details, register_kind, targets_of
from fp8pipe.cli import main
from fp8pipe.core.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
PACKAGES = ("fp8pipe", "calibration", "pipeline", "exporters", "validation", "serving")


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def toy():
    register(TOY)
    yield TOY
    unregister(TOY.kind)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "tuned")


@pytest.fixture
def export(toy, source, tmp_path):
    ended = invoke("export", source.root, "--target", "toy", "--refrain", 2, "--output", tmp_path / "out put")
    assert ended.exit_code == 0, ended.output
    assert "sing it" in ended.output
    assert f"next: fp8pipe validate '{tmp_path / 'out put'}'" in ended.output  # can be pasted
    return tmp_path / "out put"


def test_help_and_schema_know_it_while_it_is_registered(toy):
    shown = " ".join(invoke("export", "--help").output.split())
    assert "toy: digests as lines of text" in shown
    assert "toy: how often every line is written." in shown.lower()
    stages = json.loads(invoke("schema", "--json").stdout)["properties"]["stages"]["additionalProperties"]["anyOf"]
    (stage,) = [stage for stage in stages if stage["title"].startswith("export toy")]
    assert set(stage["properties"]) >= {"artifact", "target", "refrain"}
    (validate,) = [stage for stage in stages if stage["title"] == "validate"]
    assert "toy-engine" in validate["properties"]["engine"]["enum"]
    unregister(TOY.kind)
    assert "toy" not in invoke("export", "--help").output
    assert "toy" not in invoke("schema").output
    register(TOY)


def test_it_is_written_and_typed(export, source):
    artifact = open_artifact(export, kind=TOY.kind)
    assert artifact.manifest.details_of(ToyDetails) == ToyDetails(refrain=2, lines=2)
    assert artifact.manifest.config == {"refrain": 2}
    assert (export / LINES).read_text() == toy_target.text_of(source.root, 2)
    assert invoke("export", source.root, "--target", "toy", "--output", export).exit_code == 10
    assert invoke("export", source.root, "--target", "toy", "--output", export, "--force").exit_code == 0
    assert open_artifact(export).manifest.details.refrain == 1


def test_a_dry_run_writes_nothing(toy, source, tmp_path):
    ended = invoke("export", source.root, "--target", "toy", "--output", tmp_path / "out", "--dry-run", "--json")
    document = json.loads(ended.stdout)
    assert (document["target"], document["refrain"]) == ("toy", 1)
    assert document["plan"]["writes"] == [str(tmp_path / "out")]
    assert not (tmp_path / "out").exists()


def test_verify_runs_its_check_and_finds_a_fault(export, source):
    whole = json.loads(invoke("verify", export, "--parents", source.root, "--json").stdout)
    assert whole["verified"]
    assert whole["compared"] == [{"artifact": "out put", "parent": str(source.root)}]
    text = (export / LINES).read_text()
    (export / LINES).write_text(text.replace("a", "b"))
    rehash(export)
    ended = invoke("verify", export)
    assert ended.exit_code == 12
    assert f"[parity] {LINES}: it is not what follows from the parent" in ended.stderr
    (export / LINES).write_text(text + "one more\n")
    rehash(export)
    assert f"[manifest] {LINES}: it has 3 lines, 2 are stated" in invoke("verify", export).stderr


def test_inspect_and_report_show_it(export, source, tmp_path):
    shown = invoke("inspect", export).output
    assert TOY.kind in shown
    assert "refrain" in shown
    assert "lines differing" in shown
    ended = invoke("report", export, "--output", tmp_path / "page.html")
    assert ended.exit_code == 0, ended.output
    page = (tmp_path / "page.html").read_text()
    assert f"artifact of kind {TOY.kind}" in page
    assert "lines differing" in page
    about = invoke("report", source.root, "--output", tmp_path / "source.html")
    assert about.exit_code == 0, about.output


def test_validate_runs_its_engine(export):
    planned = json.loads(invoke("validate", export, "--dry-run", "--json").stdout)
    assert planned["engine"] == "toy-engine"
    ended = invoke("validate", export, "--engine", "toy-engine")
    assert ended.exit_code == 0, ended.output
    assert "ACCEPT by toy-engine" in ended.output
    assert (export.parent / "out put.validation.json").is_file()
    assert invoke("verify", export).exit_code == 0
    assert invoke("validate", export, "--engine", "onnxruntime").exit_code == 10
    (export / LINES).write_text("no-digest\nnone-here\n")
    rehash(export)
    ended = invoke("validate", export)
    assert ended.exit_code == 14
    assert "lines without a digest: 2 (equal 0)" in ended.output


def test_serve_knows_it(export):
    planned = json.loads(invoke("serve", export, "--dry-run", "--json", "--unvalidated").stdout)
    assert (planned["kind"], planned["server"]) == (TOY.kind, "vision")
    assert invoke("serve", export).exit_code == 0
    unregister(TOY.kind)
    register(dataclasses.replace(TOY, service=dataclasses.replace(TOY.service, serve=None, refusal="it only sings")))
    ended = invoke("serve", export, "--dry-run")
    assert ended.exit_code == 10
    assert "it only sings" in ended.output
    assert "--target onnx" in ended.output
    assert "--target vllm" not in ended.output  # that one takes no pictures


def test_names_are_unique(toy):
    with pytest.raises(ConfigurationError, match=r"the export target 'toy-export' is registered twice") as twice:
        register(dataclasses.replace(TOY, name="other"))
    assert twice.value.exit_code == 10
    with pytest.raises(ConfigurationError, match="--target toy is ambiguous for falqon"):
        register(dataclasses.replace(TOY, kind="toy-two"))
    assert target_of("toy-two") is None
    with pytest.raises(ConfigurationError, match="the artifact kind 'falqon' is registered twice") as taken:
        register_kind(ArtifactKind("falqon", Details))
    assert taken.value.exit_code == 10
    with pytest.raises(ConfigurationError, match="the artifact kind 'vit' is registered twice"):
        register(dataclasses.replace(TOY, name="other", kind="vit"))
    assert target_of("vit") is None


def test_options_of_other_targets_are_refused(toy, source, tmp_path):
    output = tmp_path / "out"
    ended = invoke("export", source.root, "--target", "toy", "--max-shard-size", "1GB", "--output", output)
    assert ended.exit_code == 10
    assert "--max-shard-size cannot be given for --target toy" in ended.output
    ended = invoke("export", source.root, "--target", "vllm", "--refrain", 2, "--output", output)
    assert ended.exit_code == 10
    assert "--refrain cannot be given for --target vllm" in ended.output
    assert "made for --target toy" in ended.output
    settings = tmp_path / "settings.yaml"
    settings.write_text("chorus: 3\n")
    ended = invoke("export", source.root, "--target", "toy", "--config", settings, "--output", output)
    assert ended.exit_code == 10
    assert "unknown keys: chorus" in ended.output


def test_a_source_that_it_does_not_take_is_refused(toy):
    with pytest.raises(ConfigurationError, match="--target toy does not accept this source") as refused:
        choose("toy", "vit")
    assert "toy accepts falqon" in refused.value.why
    assert choose("toy", "falqon") is TOY


def test_a_target_needs_the_packages_of_no_other(tmp_path):
    """Without the extra `onnx`, in a process of its own, since a package once imported stays."""
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('onnx', 'onnx_ir', 'onnxruntime', 'onnxscript'))\n"
        "import exporters.vllm.export, exporters.vllm.verify\n"
        "import exporters.modelopt.checkpoint, exporters.modelopt.verify, exporters.verify.whole\n"
        "print('imported')\n"
        "from fp8pipe.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    vision = write(tmp_path / "vit", kind="vit")
    command = ["export", str(vision.root), "--target", "onnx", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr
    assert done.returncode == 11
    assert "pip install 'fp8pipe[onnx]'" in done.stderr


def test_a_wrong_reference_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError, match="no_such_target"):
        call("no_such_target.export:export")


def test_no_other_file_names_a_kind_of_export():
    """Each kind's name stands in its target's folder alone."""
    found = []
    for target in targets():
        assert isinstance(target.export, str)
        folder = ROOT / Path(*target.export.split(":")[0].split(".")[:2])
        for package in PACKAGES:
            for path in (ROOT / package).rglob("*.py"):
                if folder not in path.parents and target.kind in path.read_text(encoding="utf-8"):
                    found.append(f"{path.relative_to(ROOT)}: {target.kind}")
    assert found == []


def test_the_targets_of_a_kind_are_those_of_its_exports_the_usual_one_first():
    assert targets_of("vit") == list(dict.fromkeys(target.name for target in targets() if "vit" in target.takes))
    assert targets_of("vit")[0] == "onnx"
    assert targets_of("falqon")[0] == "vllm"
    assert targets_of("onnx-export") == []
