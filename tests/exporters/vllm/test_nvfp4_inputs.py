"""The format nvfp4-w4a4: scales of inputs against ranges seen in transformers, and every wrong one found by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tree import edited_copy, rehash, without_parents
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import NVFP4
from export_contents import raw
from tiny_checkpoints import make_model
from torch import Tensor
from trained_exports import calibrated_options, export_both

from exporters.verify.whole import verify_tree
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.inputs import read_calibration
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError

SCALE = ".input_global_scale"
K, DOWN = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"
QKV = [f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkv"]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `trained`, their exports `quantized` and `again`, and the text that both were calibrated on."""
    root = tmp_path_factory.mktemp("w4a4")
    return export_both(root, calibrated_options(root))


def options_of(root: Path) -> VllmExportOptions:
    return VllmExportOptions.model_validate(open_artifact(root / "quantized").manifest.config)


def test_the_layout_is_that_of_the_preset(family: Path) -> None:
    config = json.loads((family / "quantized" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "nvfp4-pack-quantized"
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    for part in ("weights", "input_activations"):
        for name in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size"):
            assert getattr(getattr(group, part), name) == getattr(NVFP4[part], name), (part, name)


def test_every_scale_follows_from_the_inputs_that_transformers_computes(family: Path) -> None:
    facts, sequences = read_calibration(plan_export(family / "plain", options_of(family)))
    assert (facts.records, len(sequences)) == (3, 3)
    model, seen = make_model(), {}
    model.load_state_dict(raw(family / "plain"))

    def note(name: str, x: Tensor) -> None:
        seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
    with torch.inference_mode():
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    stored = raw(family / "quantized")
    scales = {name: float(value) for name, value in stored.items() if name.endswith(SCALE)}
    assert scales.keys() == {name + SCALE for name in seen}
    for name, amax in seen.items():
        divisor = scales[name + SCALE]
        assert math.frexp(divisor)[0] == 0.5  # a power of two
        assert 1344 / divisor / 2 < amax <= 1344 / divisor, name  # 6 * 448 holds twice as much, and not four times
    for group in (QKV, [DOWN.replace("down", leaf) for leaf in ("gate", "up")]):
        assert len({scales[name + SCALE] for name in group}) == 1
    details = open_artifact(family / "quantized").manifest.details
    assert details.inputs == pytest.approx({f"{name}.weight": amax for name, amax in seen.items()}, rel=1e-5)
    assert details.calibration == facts


def test_the_weights_are_those_of_the_format_without_inputs(family: Path, tmp_path: Path) -> None:
    usual = raw(export_vllm(family / "plain", tmp_path / "x", VllmExportOptions(format=ExportFormat.NVFP4)).root)
    stored = raw(family / "quantized")
    assert all(torch.equal(stored[name].view(torch.uint8), usual[name].view(torch.uint8)) for name in usual)
    assert stored.keys() - usual.keys() == {name for name in stored if name.endswith(SCALE)}
    assert not any(name.endswith(SCALE) for name, _ in iter_weights(family / "quantized"))


def test_what_the_manifest_and_a_dry_run_say(family: Path, tmp_path: Path) -> None:
    manifest = open_artifact(family / "again").manifest
    (activation,) = {str(layer.activation) for layer in manifest.layers if layer.converted}
    assert activation == "4-bit nvfp4, per-block, amax, dynamic"
    assert "input-scales" in {gate.name for gate in manifest.gates}
    assert any("compute capability 10.0" in warning for warning in manifest.warnings)
    document, shown = plan_vllm(family / "plain", tmp_path / "x", options_of(family))
    assert document["need_bytes"] == sum(tensor.nbytes for tensor in raw(family / "quantized").values())
    assert any("3 record(s)" in note for note in shown.notes)


def double_one(tensors: dict[str, Tensor]) -> None:
    tensors[K + SCALE] *= 2


def double_one_alone(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + SCALE] *= 2


def reciprocal(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + SCALE] = 1 / tensors[DOWN + SCALE] * 0.3


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[DOWN + SCALE]


def negative(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + SCALE] *= -1


def not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + SCALE].fill_(float("inf"))


def of_no_layer(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head" + SCALE] = torch.ones(1)


EDITS = {
    double_one: (K, "fused-input-scale"),
    double_one_alone: (DOWN, "input-scales"),
    reciprocal: (DOWN, "not a power of two"),
    missing: (DOWN, "missing-input-scale"),
    negative: (DOWN, "not a power of two"),
    not_finite: (DOWN, "not a power of two"),
    of_no_layer: ("lm_head", "does not name"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_wrong_scale_is_found_by_name_without_the_source(
    edit: Callable[[dict[str, Tensor]], None], family: Path, tmp_path: Path
) -> None:
    root = edited_copy(family / "quantized", tmp_path / "x", edit)
    checked, _ = verify_tree(find_tree(without_parents(root)), (), strict=True)
    found = [f"{finding.where} {finding.why}" for finding in checked.findings]
    name, said = EDITS[edit]
    assert any(name + SCALE in line and said in line for line in found), found


def test_an_intact_export_is_verified_against_its_source(family: Path) -> None:
    for name, source in (("quantized", "plain"), ("again", "trained")):
        checked, compared = verify_tree(find_tree(family / name), (family / source,), strict=True)
        assert (checked.findings, bool(compared)) == ([], True)


def test_a_range_in_the_manifest_that_does_not_belong_to_its_scale_is_found(family: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(family / "quantized", tmp_path / "x"))
    rehash(root, lambda data: data["details"]["inputs"].update({f"{DOWN}.weight": 1e4}))
    checked, _ = verify_tree(find_tree(without_parents(root)), (), strict=True)
    assert any(DOWN + SCALE in f"{found.where} {found.why}" for found in checked.findings)


def test_a_tuned_artifact_is_calibrated_on_the_records_that_it_was_trained_on(family: Path, tmp_path: Path) -> None:
    """Not on those that were held out then: of four records with a half held out, two remain."""
    trained = Path(shutil.copytree(family / "trained", tmp_path / "trained"))
    text = str(family / "text.jsonl")
    rehash(trained, lambda data: data["config"].update(data=text, heldout_fraction=0.5, sequence_length=24))
    options = VllmExportOptions(format=ExportFormat.NVFP4_W4A4)
    facts, sequences = read_calibration(plan_export(trained, options, verify=False))
    assert (facts.data, facts.records) == (text, 2)
    assert [len(ids) for ids in sequences] == [24, 24]


def test_training_data_that_changed_since_training_is_refused(family: Path, tmp_path: Path) -> None:
    """Of four records, one was held out. With a fifth, the split is another one: other records would be used."""
    trained, text = Path(shutil.copytree(family / "trained", tmp_path / "trained")), tmp_path / "text.jsonl"
    lines = (family / "text.jsonl").read_text().splitlines(keepends=True)
    text.write_text("".join(lines))

    def note(data: Any) -> None:
        data["config"].update(data=str(text), heldout_fraction=0.25)
        data["details"]["data"] = {"records": 4, "train": 3, "heldout": 1}

    rehash(trained, note)
    options = VllmExportOptions(format=ExportFormat.NVFP4_W4A4)
    facts, _ = read_calibration(plan_export(trained, options, verify=False))
    assert facts.records == 3
    text.write_text("".join([*lines, lines[0].replace("scale", "fifth")]))
    with pytest.raises(ConfigurationError, match="no longer splits as it did in training") as caught:
        export_vllm(trained, tmp_path / "x", options)
    assert "then 3 records were trained on and 1 held out, now 3 and 2" in caught.value.why
    assert "--calibration-data" in caught.value.fix
    assert not (tmp_path / "x").exists()
    named = options.model_copy(update={"calibration_data": str(text)})
    assert read_calibration(plan_export(trained, named, verify=False))[0].records == 3


@pytest.mark.parametrize("plan", [False, True])
def test_without_a_text_it_is_refused_before_anything_is_read(family: Path, tmp_path: Path, plan: bool) -> None:
    run: Any = plan_vllm if plan else export_vllm
    with pytest.raises(ConfigurationError, match="records no text") as caught:
        run(family / "plain", tmp_path / "x", VllmExportOptions(format=ExportFormat.NVFP4_W4A4))
    assert "--calibration-data" in caught.value.fix
    assert not (tmp_path / "x").exists()


def test_a_text_for_a_format_without_such_scales_is_refused() -> None:
    for given in ({"calibration_data": "text.jsonl"}, {"calibration_records": 3}):
        with pytest.raises(ConfigurationError, match="no scales that follow from text"):
            build_config(VllmExportOptions, {"format": "nvfp4", **given})
