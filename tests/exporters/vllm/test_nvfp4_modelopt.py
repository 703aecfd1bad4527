"""The formats nvfp4 and nvfp4-w4a4 in ModelOpt's layout: the numbers of the other layout, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from artifact_tree import edited_copy, without_parents
from export_contents import config_of, raw
from tiny_checkpoints import make_model, write_plain
from torch import Tensor
from trained_exports import calibrated_options, write_packed

from exporters.verify.whole import verify_tree
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.lint import lint_structure
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights
from exporters.vllm.target import KvScale
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.packed import COMPRESSED_TENSORS, MODELOPT
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.numerics.grids import same_bits

OPTIONS = VllmExportOptions(format=ExportFormat.NVFP4)
PAIRS = {"weight_packed": "weight", "weight_scale": "weight_scale"}
K, DOWN = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"
LINEARS = 14


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain`; in both layouts, `nvfp4` and `w4a4` made from it, and `trained`, an artifact that holds such codes.

    Exports in ModelOpt's layout have names that end in `-mo`; that of `trained` is `copied-mo`.
    """
    root = tmp_path_factory.mktemp("modelopt")
    plain, four = write_plain(root / "plain", make_model()), calibrated_options(root)
    trained = {}
    for name, options in (("nvfp4", OPTIONS), ("w4a4", four)):
        trained[name] = export_vllm(plain, root / name, options).root
        export_vllm(plain, root / f"{name}-mo", in_modelopt(options))
    export_vllm(write_packed(root / "trained", trained["nvfp4"]), root / "copied-mo", in_modelopt(OPTIONS))
    return root


def in_modelopt(options: VllmExportOptions) -> VllmExportOptions:
    return options.model_copy(update={"layout": "modelopt"})


def found_in(export: Path, *parents: Path) -> list[str]:
    checked, compared = verify_tree(find_tree(export), parents, strict=True)
    assert bool(compared) is bool(parents)
    return [f"{finding.where} {finding.why}" for finding in checked.findings]


def test_every_power_of_two_has_an_exact_reciprocal() -> None:
    """All global scales that an export writes: the number in one layout is the reciprocal of that in the other."""
    for power in range(-18, 9):
        stored = [
            torch.tensor(layout.stored(2.0**power), dtype=torch.float32) for layout in (COMPRESSED_TENSORS, MODELOPT)
        ]
        assert float(stored[0]) == 2.0**-power
        assert float(stored[1]) == 2.0**power
        assert float(stored[0] * stored[1]) == 1.0


@pytest.mark.parametrize(("theirs", "ours"), [("nvfp4", "nvfp4-mo"), ("w4a4", "w4a4-mo"), ("nvfp4", "copied-mo")])
def test_codes_and_scales_are_those_of_the_other_layout(family: Path, theirs: str, ours: str) -> None:
    """Byte for byte, rounded here or copied from a trained artifact; global scales are reciprocals."""
    before, after = raw(family / theirs), raw(family / ours)
    layers = [name.removesuffix(".weight_packed") for name in before if name.endswith(".weight_packed")]
    assert len(layers) == LINEARS
    read, known = dict(iter_weights(family / ours)), dict(iter_weights(family / theirs))
    for layer in layers:
        for name, other in PAIRS.items():
            assert same_bits(after.pop(f"{layer}.{other}"), before.pop(f"{layer}.{name}")), layer
        pairs = [("weight_global_scale", "weight_scale_2")]
        pairs += [("input_global_scale", "input_scale")] if theirs == "w4a4" else []
        for name, other in pairs:
            divisor, factor = before.pop(f"{layer}.{name}"), after.pop(f"{layer}.{other}")
            assert (factor.dtype, factor.shape) == (torch.float32, ())
            assert float(factor) == 1 / float(divisor)
        assert same_bits(read[f"{layer}.weight"], known[f"{layer}.weight"])
    assert before.keys() == after.keys() == known.keys() - {f"{layer}.weight" for layer in layers}
    assert all(same_bits(after[name], before[name]) for name in before)


def test_another_reader_decodes_the_same_numbers(family: Path) -> None:
    """By ml_dtypes, `code * (weight_scale * weight_scale_2)`, as ModelOpt defines it; and as a base model."""
    stored, read = raw(family / "nvfp4-mo"), dict(iter_weights(family / "nvfp4-mo"))
    base = read_base(family / "nvfp4-mo")
    for name in (name for name, tensor in stored.items() if tensor.dtype == torch.uint8):
        pairs = stored[name].numpy()
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(pairs), -1).view(ml_dtypes.float4_e2m1fn)
        scales = stored[f"{name}_scale"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        factor = scales * np.float32(stored[f"{name}_scale_2"])
        assert np.array_equal(codes.astype(np.float32) * factor.repeat(16, axis=1), read[name].numpy()), name
        assert same_bits(base.entries[name].read().float(), read[name])
    assert base.stored is not None
    assert base.stored.weights == LINEARS


def test_both_files_of_settings_are_those_of_modelopt(family: Path) -> None:
    form = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    for name, algorithm in (("nvfp4-mo", "W4A16_NVFP4"), ("w4a4-mo", "NVFP4")):
        assert json.loads((family / name / "hf_quant_config.json").read_text()) == {
            "producer": {"name": "fp8pipe"},
            "quantization": {
                "quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"],
            },
        }  # fmt: skip
        group = {"weights": form, "targets": ["Linear"]} | ({"input_activations": form} if name == "w4a4-mo" else {})
        assert config_of(family / name) == {
            "config_groups": {"group_0": group}, "ignore": ["lm_head"], "quant_algo": algorithm,
            "producer": {"name": "fp8pipe"}, "quant_method": "modelopt",
        }  # fmt: skip


def test_intact_exports_are_verified_and_say_what_they_are(family: Path) -> None:
    for name, source in (("nvfp4-mo", "plain"), ("w4a4-mo", "plain"), ("copied-mo", "trained")):
        assert found_in(family / name, family / source) == []
    manifest = open_artifact(family / "copied-mo").manifest
    assert manifest.config["layout"] == "modelopt"
    assert not manifest.details.quantized_here
    assert any("TensorRT-LLM" in warning for warning in manifest.warnings)
    assert {gate.name for gate in manifest.gates} >= {"weights-bit-exact", "global-scales", "config-preserved"}


def flip_one_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight"][20, 3] ^= 0x10


def next_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"].view(torch.uint8)[7, 3] += 1


def double_one_factor(tensors: dict[str, Tensor]) -> None:
    tensors[f"{K}.weight_scale_2"] *= 2


def divisor(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale_2"] = 1 / tensors[f"{DOWN}.weight_scale_2"]


def double_one_input(tensors: dict[str, Tensor]) -> None:
    tensors[f"{K}.input_scale"] *= 2


def missing_input(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{DOWN}.input_scale"]


# What `verify` says with the source, and what without; both name the tensor.
EDITS: dict[Callable[[dict[str, Tensor]], None], tuple[str, str, str]] = {
    flip_one_code: (DOWN, "weights-bit-exact", ""),
    next_scale: (DOWN, "weights-bit-exact", ""),
    double_one_factor: (f"{K}.weight_scale_2", "global-scales", "fused-scale"),
    divisor: (f"{DOWN}.weight_scale_2", "global-scales", "the stored number is the global scale itself"),
    double_one_input: (f"{K}.input_scale", "input-scales", "fused-input-scale"),
    missing_input: (f"{DOWN}.input_scale", "tensors-as-planned", "missing-input-scale"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_difference_is_found_by_name(
    edit: Callable[[dict[str, Tensor]], None], family: Path, tmp_path: Path
) -> None:
    where, gate, alone = EDITS[edit]
    root = edited_copy(family / "w4a4-mo", tmp_path / "x", edit)
    assert any(where in line and gate in line for line in found_in(root, family / "plain"))
    without = found_in(without_parents(root))
    assert any(where in line and alone in line for line in without) if alone else without == []


def of_file(data: dict[str, Any]) -> None:
    data["quantization"]["group_size"] = 32


def of_config(data: dict[str, Any]) -> None:
    data["quantization_config"]["ignore"] = []


@pytest.mark.parametrize(("file", "edit"), [("hf_quant_config.json", of_file), ("config.json", of_config)])
def test_settings_that_do_not_fit_the_weights_are_found(
    file: str, edit: Callable[[dict[str, Any]], None], family: Path, tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        path = tmp_path / "x" / file
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data))

    root = without_parents(edited_copy(family / "nvfp4-mo", tmp_path / "x", change))
    assert any(file in line for line in found_in(root))


def test_the_dry_run_names_the_size(family: Path, tmp_path: Path) -> None:
    document, _ = plan_vllm(family / "plain", tmp_path / "x", in_modelopt(OPTIONS))
    assert document["need_bytes"] == sum(tensor.nbytes for tensor in raw(family / "nvfp4-mo").values())


def test_a_layer_that_the_ignore_list_covers_is_refused_by_name(family: Path) -> None:
    """vLLM matches ModelOpt's names anywhere in the name of a layer; in the other layout it does not."""
    for layout in ("modelopt", "compressed-tensors"):
        options = OPTIONS.model_copy(update={"layout": layout})
        plan = plan_export(family / "plain", options, verify=False)
        plan = replace(plan, ignore=(*plan.ignore, DOWN.removesuffix("_proj")))
        rules = {(finding.rule, finding.where) for finding in lint_structure(plan)}
        assert (("ignore-covers", f"{DOWN}.weight") in rules) is (layout == "modelopt")


def test_scales_of_the_cache_are_beside_the_projections(family: Path) -> None:
    options = in_modelopt(OPTIONS).model_copy(update={"kv_cache": "fp8"})
    source = plan_export(family / "plain", in_modelopt(OPTIONS), verify=False)
    scales = {"model.layers.0.self_attn": KvScale(layer=0, k=0.5, v=0.25)}
    plan = replace(source, options=options, kv_cache=scales)
    attention = "model.layers.0.self_attn"
    assert plan.kv_tensors == {f"{attention}.k_proj.k_scale": 0.5, f"{attention}.v_proj.v_scale": 0.25}


def test_other_formats_have_no_such_layout() -> None:
    for given in ({}, {"format": "fp8-block"}, {"format": "bf16"}):
        with pytest.raises(ConfigurationError, match="layout modelopt"):
            build_config(VllmExportOptions, {"layout": "modelopt", **given})


def test_what_nvfp4_refuses_is_refused_in_this_layout(gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(LintFindingsError, match="block-scale"):
        export_vllm(gpt2, tmp_path / "export", in_modelopt(OPTIONS))
