"""The format nvfp4: against blocks rounded by ml_dtypes, another reader, and its source; and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from artifact_tree import edited_copy, rehash, without_parents
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from export_contents import config_of, raw
from language_models import ARCHITECTURES
from language_models import write as write_architecture
from safetensors.torch import save_file
from torch import Tensor
from trained_exports import export_both

from exporters.verify.whole import verify_tree
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.nvfp4 import with_global_scales
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights, reopen
from exporters.vllm.verify import plan_itself
from exporters.vllm.writer import write_auxiliary, write_weights
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.finding import Finding, LintFindingsError
from fp8pipe.artifact.verify import find_tree
from fp8pipe.models.checkpoint import rows
from fp8pipe.numerics.grids import same_bits

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
OPTIONS = VllmExportOptions(format=ExportFormat.NVFP4)
LINEARS = 14
DOWN, GATE = (f"model.layers.1.mlp.{leaf}_proj.weight" for leaf in ("down", "gate"))
Q, K = (f"model.layers.1.self_attn.{leaf}_proj.weight" for leaf in ("q", "k"))
FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `trained` (FP8, one scale a tensor), and the exports of both, `quantized` and `again`."""
    return export_both(tmp_path_factory.mktemp("nvfp4"), OPTIONS)


def verified(export: Path, *parents: Path) -> list[Finding]:
    checked, compared = verify_tree(find_tree(export), parents, strict=True)
    assert bool(compared) is bool(parents)
    return checked.findings


def packed(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the weights in NVFP4."""
    return [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]


def test_the_layout_is_that_of_the_preset(family: Path) -> None:
    config = config_of(family / "quantized")
    assert (config["format"], config["ignore"]) == ("nvfp4-pack-quantized", ["lm_head"])
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    wanted = NVFP4A16["weights"]
    assert group.input_activations is None
    for name in ("num_bits", "type", "strategy", "symmetric", "dynamic", "group_size"):
        assert getattr(group.weights, name) == getattr(wanted, name), name


def by_hand(stored: dict[str, Tensor], name: str) -> np.ndarray:
    """`code * scale / divisor` in float64, decoded by ml_dtypes."""
    pairs = stored[name + "_packed"].numpy()
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(pairs.shape[0], -1).view(FP4).astype(np.float64)
    scales = stored[name + "_scale"].view(torch.uint8).numpy().view(FP8).astype(np.float64).repeat(16, axis=1)
    return codes * scales / float(stored[name + "_global_scale"])


def by_amax(stored: dict[str, Tensor], name: str, exact: np.ndarray) -> np.ndarray:
    """The weight rounded with the scale nearest to amax / 6 in each block, and the global scale that is stored."""
    blocks, unit = exact.reshape(-1, 16), 1 / float(stored[name + "_global_scale"])
    factor = np.maximum(np.abs(blocks).max(1, keepdims=True) / 6 / unit, 2.0**-6).astype(FP8).astype(np.float64) * unit
    rounded = np.clip(blocks / factor, -6, 6).astype(np.float32).astype(FP4).astype(np.float64) * factor
    return rounded.reshape(exact.shape)


@pytest.mark.parametrize(("source", "export"), [("plain", "quantized"), ("trained", "again")])
def test_each_code_is_the_nearest_and_each_global_scale_that_of_its_group(
    source: str, export: str, family: Path
) -> None:
    original, stored = raw(family / source), raw(family / export)
    names = packed(stored)
    assert len(names) == LINEARS
    read = dict(iter_weights(family / export))
    for name in names:
        exact = original[name].double().numpy() if source == "plain" else (
            original[name].double() * original[name + "_scale"].double()).numpy()  # fmt: skip
        found = by_hand(stored, name)
        assert np.array_equal(read[name].double().numpy(), found), name
        assert same_bits(read[name].bfloat16().float(), read[name]), name  # an engine in bf16 holds the same numbers
        factor = stored[name + "_scale"].double().numpy().repeat(16, axis=1) / float(stored[name + "_global_scale"])
        nearest = np.clip(exact / factor, -6, 6).astype(np.float32).astype(FP4).astype(np.float64) * factor
        assert np.array_equal(nearest, found), name
        assert float(stored[name + "_scale"].float().min()) >= 2.0**-6
        error, usual = (
            np.square(values - exact).reshape(-1, 16).sum(1) for values in (found, by_amax(stored, name, exact))
        )
        assert np.all(error <= usual * (1 + 2.0**-19))  # sums of 16 squares in fp32 are off by less than 2^-20
        assert error.sum() < 0.9 * usual.sum()
    for layer in ("model.layers.0", "model.layers.1"):
        for group in FUSED:
            weights = [f"{layer}.{leaf}.weight" for leaf in group]
            divisors = {float(stored[name + "_global_scale"]) for name in weights}
            amax = max(float((original[n].float() * original.get(n + "_scale", torch.tensor(1.0))).abs().max())
                       for n in weights)  # fmt: skip
            (divisor,) = divisors
            assert 1344 / divisor / 2 < amax <= 1344 / divisor
    others = original.keys() - {*names, *(name + "_scale" for name in names)}
    assert all(same_bits(stored[name], original[name]) for name in others)
    assert len(stored) == len(others) + 3 * LINEARS


def test_compressed_tensors_reads_the_same_numbers(family: Path) -> None:
    stored, read = raw(family / "quantized"), dict(iter_weights(family / "quantized"))
    scheme = QuantizationConfig.model_validate(config_of(family / "quantized")).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    for name in packed(stored):
        parts = {f"weight{suffix}": stored[name + suffix] for suffix in ("_packed", "_scale", "_global_scale")}
        assert same_bits(compressor.decompress(parts, scheme)["weight"].float(), read[name]), name


@pytest.mark.parametrize("source", ["plain", "trained"])
def test_blocks_of_rows_change_no_byte(
    source: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(rows, "_BLOCK_VALUES", 20_000)  # a few rows at a time
    torch.set_num_threads(2)
    try:
        parts = export_vllm(family / source, tmp_path / "parts", OPTIONS)
    finally:
        torch.set_num_threads(threads)
    whole = family / {"plain": "quantized", "trained": "again"}[source]
    assert (parts.root / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_what_the_manifest_says(family: Path) -> None:
    plain, again = (open_artifact(family / name).manifest for name in ("quantized", "again"))
    assert (plain.number_format.name, plain.number_format.granularity) == ("nvfp4", "per-block")
    layers = {layer.name: layer for layer in plain.layers}
    assert str(layers[DOWN.removesuffix(".weight")].weight) == "4-bit nvfp4, per-block, mse"
    assert layers[DOWN.removesuffix(".weight")].activation is None
    assert {gate.name for gate in plain.gates} >= {"weights-bit-exact", "global-scales", "nvfp4-rounding-error"}
    assert any("the best of five scales" in warning and "not trained in NVFP4" in warning for warning in plain.warnings)
    assert any("what is served is not what was trained" in warning for warning in again.warnings)
    assert plain.details.quantized_here
    assert again.details.quantized_here


def flip_one_code(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_packed"][200, 30] ^= 0x10


def next_scale(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_scale"].view(torch.uint8)[7, 3] += 1


def swap_halves(tensors: dict[str, Tensor]) -> None:
    codes = tensors[DOWN + "_packed"]
    tensors[DOWN + "_packed"] = (codes >> 4) | (codes << 4)


def double_one_divisor(tensors: dict[str, Tensor]) -> None:
    tensors[K + "_global_scale"] *= 2


def double_a_group(tensors: dict[str, Tensor]) -> None:
    """Weights stay the same within a group, at half the scale: of another size than in the source."""
    for name in (GATE, GATE.replace("gate", "up")):
        tensors[name + "_global_scale"] *= 2


def reciprocal(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_global_scale"] = 1 / tensors[DOWN + "_global_scale"]


def tiny_scale(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_scale"].view(torch.uint8)[7, 3] = 0x07


def nan_scale(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_scale"].view(torch.uint8)[7, 3] = 0x7F


def zero_scale(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN + "_scale"].view(torch.uint8)[7, 3] = 0


EDITS = {
    flip_one_code: ("weights-bit-exact", DOWN, None),
    next_scale: ("weights-bit-exact", DOWN, None),
    swap_halves: ("weights-bit-exact", DOWN, None),
    double_one_divisor: ("global-scales", K + "_global_scale", ("fused-scale", K)),
    double_a_group: ("global-scales", GATE + "_global_scale", None),
    reciprocal: ("global-scales", DOWN + "_global_scale", ("global-scale", DOWN)),
    tiny_scale: ("weights-bit-exact", DOWN, ("scale-subnormal", DOWN)),
    nan_scale: ("weights-bit-exact", DOWN, ("scale-not-finite", DOWN)),
    zero_scale: ("weights-bit-exact", DOWN, ("scale-not-positive", DOWN)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_difference_is_found_by_name(
    edit: Callable[[dict[str, Tensor]], None], family: Path, tmp_path: Path
) -> None:
    """By the comparison with the source; where it is wrong in itself, also without the source."""
    root = edited_copy(family / "quantized", tmp_path / "x", edit)
    gate, where, rule = EDITS[edit]
    plan = with_global_scales(plan_export(family / "plain", OPTIONS))
    failed = {found.name: found.detail for found in reopen(plan, root) if not found.passed}
    assert where in failed[gate]
    with_source = [str(found) for found in verified(root, family / "plain")]
    assert any(where in line for line in with_source), with_source
    alone = [(found.rule, found.where, found.why) for found in verified(without_parents(root))]
    if rule is None:
        assert alone == []
    else:
        assert any(found[0] == "lint" and rule[0] in found[2] and rule[1] in found[1] + found[2] for found in alone), (
            alone
        )


def test_an_intact_export_is_verified(family: Path) -> None:
    for name in ("quantized", "again"):
        source = family / {"quantized": "plain", "again": "trained"}[name]
        assert verified(family / name, source) == []
        plan = with_global_scales(plan_export(source, OPTIONS))
        assert all(gate.passed for gate in reopen(plan, family / name))


def test_weights_that_are_in_nvfp4_already_are_copied_byte_for_byte(family: Path, tmp_path: Path) -> None:
    """A source that holds such weights: here the export itself."""
    plan = plan_itself(open_artifact(family / "quantized"))
    assert with_global_scales(plan) is plan
    assert write_weights(plan, tmp_path) == []
    write_auxiliary(plan, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (family / "quantized" / "model.safetensors").read_bytes()
    assert all(gate.passed for gate in reopen(plan, tmp_path))
    for edit, (gate, where) in ((next_scale, ("weights-bit-exact", DOWN)), (double_a_group, ("global-scales", GATE))):
        tensors = raw(family / "quantized")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        failed = {found.name: found.detail for found in reopen(plan, tmp_path) if not found.passed}
        assert where in failed[gate]


def refusal(source: Path, output: Path) -> dict[str, list[str]]:
    """What was found, by rule; a dry run says the same of names and shapes."""
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, output, OPTIONS)
    found: dict[str, list[str]] = {}
    for finding in caught.value.findings:
        assert "--format" in finding.fix
        found.setdefault(finding.rule, []).append(str(finding))
    assert not output.exists()
    return found


def test_weights_stored_transposed_and_experts_are_refused(gpt2: Path, tmp_path: Path) -> None:
    assert all("stored (in, out)" in line for line in refusal(gpt2, tmp_path / "export")["block-scale"])
    experts = refusal(write_architecture(ARCHITECTURES["mixtral"], tmp_path / "base"), tmp_path / "export")
    assert all("an expert's weight" in line for line in experts["block-scale"])
    with pytest.raises(LintFindingsError, match="block-scale"):
        plan_vllm(gpt2, tmp_path / "export", OPTIONS)


def test_layers_whose_inputs_are_no_whole_blocks_stay_as_they_are(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("llama", intermediate_size=120)
    export = export_vllm(base, tmp_path / "export", OPTIONS)
    reasons = {layer.name: layer.reason for layer in export.manifest.layers if not layer.converted}
    assert "(64, 120) is not a multiple of 16" in reasons["model.layers.0.mlp.down_proj"]
    assert not any("mlp" in name for name in packed(raw(export.root)))


def test_weights_beyond_the_range_are_refused_by_name(make_model: Callable[..., Path], tmp_path: Path) -> None:
    base = make_model("llama")
    tensors = raw(base)
    tensors[Q][3, 4] = 4e5
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert Q in refusal(base, tmp_path / "export")["weight-range"][0]
    tensors[Q][3, 4] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LintFindingsError, match="not-finite"):
        export_vllm(base, tmp_path / "export", OPTIONS)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_value_that_is_not_finite_is_refused_by_name(
    value: float, place: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is among the blocks of rows, of which the others are finite, as in any large layer."""
    monkeypatch.setattr(rows, "_BLOCK_VALUES", 1_000)
    base = make_model("llama")
    tensors = raw(base)
    tensors[DOWN][0 if place == "first" else -1, 4] = value
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(base, tmp_path / "export", OPTIONS)
    assert [(found.rule, found.where) for found in caught.value.findings] == [("not-finite", DOWN)]
    assert not (tmp_path / "export").exists()


def test_a_scale_that_is_not_finite_is_refused_by_name(family: Path, tmp_path: Path) -> None:
    trained = Path(shutil.copytree(family / "trained", tmp_path / "trained"))
    tensors = raw(trained)
    tensors[DOWN + "_scale"].fill_(float("inf"))
    save_file(tensors, trained / "model.safetensors", metadata={"format": "pt"})
    rehash(trained)
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(trained, tmp_path / "export", OPTIONS)
    assert [(found.rule, found.where) for found in caught.value.findings] == [("scale-not-finite", DOWN + "_scale")]


def test_the_dry_run_names_the_format_and_the_size(family: Path, tmp_path: Path) -> None:
    document, shown = plan_vllm(family / "plain", tmp_path / "export", OPTIONS)
    size = sum(tensor.nbytes for tensor in raw(family / "quantized").values())
    assert document["need_bytes"] == size
    assert shown.facts["layers"] == f"{LINEARS} in NVFP4, 1 not"
