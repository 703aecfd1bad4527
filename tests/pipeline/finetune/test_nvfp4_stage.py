"""Fine-tuning in NVFP4 end to end: the trained codes are those of the artifact, and the export holds the same bytes."""

from __future__ import annotations

import json

import pytest
import torch
from breadth import only_long
from click.testing import CliRunner
from safetensors.torch import load_file
from tuning_config import config

from exporters.verify.contents import check_contents
from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.artifact import NumberFormat, open_artifact
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.artifact.kinds import TunedDetails
from fp8pipe.artifact.verify import find_tree
from fp8pipe.cli import main
from fp8pipe.cli.tune import next_export
from fp8pipe.core.errors import ConfigurationError
from pipeline.finetune.config import check_processes
from pipeline.finetune.loss import heldout_loss
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.stage import finetune
from pipeline.finetune.text import load_text


def raw(root):
    return {
        name: tensor.reshape(-1).view(torch.uint8) for name, tensor in load_file(root / "model.safetensors").items()
    }


@pytest.mark.parametrize("method", ["falqon", "lora", pytest.param("qlora", marks=only_long)])
def test_what_was_trained_is_what_is_exported(method, make_base, pairs, tmp_path):
    settings = config(make_base(), pairs, method=method, precision="nvfp4", steps=20, learning_rate=1e-2)
    plan = plan_finetune(settings, tmp_path / "tuned")
    tuned = finetune(settings, tmp_path / "tuned")
    manifest = open_artifact(tuned.root, kind="falqon").manifest
    assert manifest.number_format == NumberFormat(name="nvfp4", granularity="per-block")
    records = [layer for layer in manifest.layers if layer.converted]
    assert {(str(layer.weight), layer.activation) for layer in records} == {
        ("4-bit nvfp4, per-block, calibrated", None)
    }
    losses = manifest.details_of(TunedDetails).heldout_loss
    assert losses.deployed < losses.untuned
    written = sum(file.stat().st_size for file in tuned.root.iterdir())
    assert abs(plan.output_bytes - written) < 0.2 * written

    assert "--target vllm --format nvfp4 --output" in next_export(tuned)
    export = export_vllm(tuned.root, tmp_path / "export", VllmExportOptions(format=ExportFormat.NVFP4))
    assert all(gate.passed for gate in export.manifest.gates)
    assert not any("quantized by this export" in warning for warning in export.manifest.warnings)
    before, after = raw(tuned.root), raw(export.root)
    assert sum(name.endswith("_packed") for name in after) == len(records) == 14
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert check_contents(tuned, None) == ([], [])
    checked, compared = verify_tree(find_tree(export.root), (tuned.root,), strict=True)
    assert (checked.findings, bool(compared)) == ([], True)
    # The loss in the manifest is that of these codes: another reader of the export, in bf16, gets the same.
    text = load_text(settings, _source(settings))
    batches = [text.heldout.at(i) for i in range(len(text.heldout))]
    again = heldout_loss(load_torch_model(export.root, torch.bfloat16), batches, "cpu")
    assert abs(again - losses.deployed) < 0.01  # attention and products of other shapes round bf16 sums differently


def _source(settings):
    from fp8pipe.models.language.sources import resolve_model

    return resolve_model(settings.model)


def test_other_formats_refuse_the_codes_and_name_the_one_that_takes_them(make_base, pairs, tmp_path):
    tuned = finetune(config(make_base(num_hidden_layers=1), pairs, precision="nvfp4", steps=1), tmp_path / "tuned")
    for form in (ExportFormat.FP8, ExportFormat.W8A16, ExportFormat.FP8_BLOCK, ExportFormat.BF16):
        with pytest.raises(LintFindingsError, match="--target vllm --format nvfp4") as refusal:
            export_vllm(tuned.root, tmp_path / "export", VllmExportOptions(format=form))
        assert "trained-in-nvfp4" in {finding.rule for finding in refusal.value.findings}
    assert not (tmp_path / "export").exists()


def test_models_that_it_cannot_hold_are_refused_before_they_are_loaded(make_base, pairs, tmp_path):
    base = make_base("gpt2")
    arguments = ["finetune", "--model", str(base), "--data", str(pairs), "--precision", "nvfp4", "--rank", "4"]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "out"), *more])
        assert result.exit_code == ConfigurationError.exit_code
        assert "stored as (in, out)" in result.output
        assert "--precision fp8" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "lora", "precision": "fp8"}, ["lora", "only nvfp4"]),
        ({"update_rule": "released"}, ["released", "NVFP4"]),
        ({"update_rule": "live-flush"}, ["live-flush", "NVFP4"]),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(given, words):
    with pytest.raises(ConfigurationError) as refusal:
        config("m", "d", **{"precision": "nvfp4", **given})
    assert all(word in str(refusal.value) for word in words)


def test_it_is_recorded_and_several_processes_are_refused():
    given = config("m", "d", precision="nvfp4", gradient_accumulation=2)
    assert json.loads(given.model_dump_json())["precision"] == "nvfp4"
    assert config("m", "d").precision == "fp8"
    check_processes(given, 1)
    with pytest.raises(ConfigurationError, match="--precision fp8"):
        check_processes(given, 2)
