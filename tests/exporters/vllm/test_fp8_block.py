"""The format fp8-block: against blocks rounded by hand, two other readers, and its source; and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.quant_scheme import FP8_BLOCK
from export_contents import config_of, raw
from language_models import ARCHITECTURES
from language_models import write as write_architecture
from safetensors.torch import save_file
from small_artifacts import details_of
from tiny_checkpoints import quantize
from torch import Tensor
from trained_exports import export_both

from exporters.vllm.dry_run import _some_rows, plan_vllm
from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.lint import lint_structure
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights, reopen
from fp8pipe.artifact import ArtifactWriter
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.models.checkpoint import rows
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.numerics.grids import same_bits

OPTIONS = VllmExportOptions(format=ExportFormat.FP8_BLOCK)
LINEARS = 14
LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `trained` (one scale a tensor), and the exports of both, `quantized` and `again`."""
    return export_both(tmp_path_factory.mktemp("blocks"), OPTIONS)


def test_the_layout_is_that_of_the_preset(family: Path) -> None:
    config = config_of(family / "quantized")
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert (config["format"], config["ignore"]) == ("float-quantized", ["lm_head"])
    for name, wanted in FP8_BLOCK.items():
        assert getattr(group, name) == wanted == QuantizationArgs.model_validate(wanted.model_dump())


def test_a_plain_model_is_rounded_block_by_block(family: Path) -> None:
    original, stored = raw(family / "plain"), raw(family / "quantized")
    coded = [name for name in stored if name + "_scale" in stored]
    assert len(coded) == LINEARS
    read = dict(iter_weights(family / "quantized"))
    for name in coded:
        codes, scale, exact = quantize(original[name].float(), "block")
        assert same_bits(stored[name], codes), name
        assert same_bits(stored[name + "_scale"], scale), name
        assert same_bits(read[name], exact), name
    assert all(same_bits(stored[name], original[name]) for name in original if name not in coded)


def test_other_readers_read_the_same_numbers(family: Path) -> None:
    """compressed-tensors, and this project's reader of FP8 bases, which rounds once to the model's bf16."""
    stored, read = raw(family / "quantized"), dict(iter_weights(family / "quantized"))
    scheme = QuantizationConfig.model_validate(config_of(family / "quantized")).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    base = base_entries(family / "quantized")
    for name, value in stored.items():
        if name + "_scale" in stored:
            pair = {"weight": value, "weight_scale": stored[name + "_scale"]}
            assert same_bits(compressor.decompress(pair, scheme)["weight"].float(), read[name]), name
            assert same_bits(base[name].read(), read[name].bfloat16()), name


def test_trained_codes_are_kept_with_their_scale(family: Path) -> None:
    trained, stored = raw(family / "trained"), raw(family / "again")
    coded = [name for name in trained if name + "_scale" in trained]
    assert len(coded) == LINEARS
    for name in coded:
        assert same_bits(stored[name], trained[name])
        grid = tuple(side // 128 for side in trained[name].shape)
        assert same_bits(stored[name + "_scale"], trained[name + "_scale"].expand(grid).contiguous())
    for name, value in iter_weights(family / "again"):
        scale = trained.get(name + "_scale", torch.tensor(1.0))
        assert same_bits(value, trained[name].float() * scale), name


def test_a_merged_model_is_rounded_like_a_plain_one(family: Path, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "merged", kind="lora-merged", stage="finetune") as writer:
        for path in (family / "plain").iterdir():
            shutil.copyfile(path, writer.root / path.name)
        merged = writer.commit(details=details_of("lora-merged"))
    assert export_vllm(merged.root, tmp_path / "export", OPTIONS).manifest.number_format is not None
    first, second = raw(tmp_path / "export"), raw(family / "quantized")
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("source", ["plain", "trained"])
def test_blocks_of_rows_change_no_byte(
    source: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(rows, "_BLOCK_VALUES", 200)  # as few rows as possible at a time: one row of blocks
    torch.set_num_threads(2)
    try:
        parts = export_vllm(family / source, tmp_path / "parts", OPTIONS)
    finally:
        torch.set_num_threads(threads)
    whole = family / {"plain": "quantized", "trained": "again"}[source]
    assert (parts.root / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def double_one_block(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER + "_scale"][1, 2] *= 2


def flip_one_code(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER].view(torch.uint8)[200, 300] ^= 1


def swap_two_blocks(tensors: dict[str, Tensor]) -> None:
    scale = tensors[LAYER + "_scale"]
    scale[0] = scale[0].flip(0)


@pytest.mark.parametrize(
    ("source", "export", "edit"),
    [
        ("plain", "quantized", double_one_block),
        ("plain", "quantized", flip_one_code),
        ("plain", "quantized", swap_two_blocks),
        ("trained", "again", double_one_block),
        ("trained", "again", flip_one_code),
    ],
)
def test_each_difference_fails_the_gate_that_names_the_weight(
    source: str, export: str, edit: Callable[[dict[str, Tensor]], None], family: Path, tmp_path: Path
) -> None:
    root, plan = Path(shutil.copytree(family / export, tmp_path / "x")), plan_export(family / source, OPTIONS)
    assert all(gate.passed for gate in reopen(plan, root))
    tensors = raw(root)
    edit(tensors)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    failed = {gate.name: gate.detail for gate in reopen(plan, root) if not gate.passed}
    assert failed.pop("weights-bit-exact").endswith(f"differing: {LAYER}")
    assert set(failed) == ({"e4m3-rounding-error"} if (source, edit) == ("plain", double_one_block) else set())


def refusal(source: Path, output: Path) -> dict[str, list[str]]:
    """What was found, by rule."""
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, output, OPTIONS)
    found: dict[str, list[str]] = {}
    for finding in caught.value.findings:
        assert "--format" in finding.fix
        found.setdefault(finding.rule, []).append(str(finding))
    assert not output.exists()
    return found


def test_sides_that_are_no_whole_blocks_are_refused_with_their_numbers(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model("llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
    found = refusal(base, tmp_path / "export")
    assert set(found) == {"block-size"}
    assert len(found["block-size"]) == 10  # of seven linear layers in each of two all but q_proj and o_proj
    assert any("k_proj" in line and "128 x 128 do not divide 64" in line for line in found["block-size"])
    assert any("down_proj" in line and "do not divide 192" in line for line in found["block-size"])
    with pytest.raises(LintFindingsError, match="block-size"):  # a dry run says the same
        plan_vllm(base, tmp_path / "export", OPTIONS)


WIDE = {"hidden_size": 256, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("phi3", {"num_key_value_heads": 1}, "its 384 rows; blocks of 128 do not divide parts of 64 (k), 64 (v)"),
        ("phi3", {"intermediate_size": 192}, "its 384 rows; blocks of 128 do not divide parts of 192 (gate), 192 (up)"),
        ("bloom", {"n_head": 4}, "its 768 rows; blocks of 128 do not divide parts of 64 (each head)"),
        ("falcon", {"num_attention_heads": 4}, "its 512 rows; blocks of 128 do not divide parts of 64 (each head)"),
        ("phi3", {"num_key_value_heads": 2, "num_attention_heads": 2}, None),
        ("bloom", {"n_head": 2}, None),
        ("falcon", {"num_attention_heads": 2}, None),
        ("gpt_neox", {}, None),
    ],
)
def test_parts_of_one_tensor_that_are_no_whole_blocks_are_refused_before_vllm_does(
    name: str, settings: dict[str, int], expected: str | None, tmp_path: Path
) -> None:
    one = ARCHITECTURES[name]
    base = write_architecture(replace(one, settings={**one.settings, **WIDE, **settings}), tmp_path / "base")
    plan = plan_export(base, OPTIONS)
    found = [(finding.rule, finding.why) for finding in lint_structure(plan)]
    assert {rule for rule, _ in found} <= {"block-size"}
    assert ({why.removeprefix("vLLM divides ") for _, why in found if "divides its" in why} or {None}) == {expected}
    if expected is not None:
        with pytest.raises(LintFindingsError, match="with --format fp8, which has one scale per row"):
            plan_vllm(base, tmp_path / "export", OPTIONS)


def test_parts_whose_sizes_cannot_be_told_are_refused(tmp_path: Path) -> None:
    one = ARCHITECTURES["bloom"]
    base = write_architecture(replace(one, settings={**one.settings, **WIDE, "n_head": 2}), tmp_path / "base")
    plan = plan_export(base, OPTIONS)
    for name in ("n_head", "num_attention_heads"):
        plan.source.config.pop(name, None)
    why = [finding.why for finding in lint_structure(plan)]
    assert why
    assert all("into parts whose sizes the checkpoint does not tell" in each for each in why)


def test_trained_scales_that_are_not_those_of_blocks_are_refused(
    llama: Path, gpt2: Path, falqon: Callable[..., Path], tmp_path: Path
) -> None:
    by_row = refusal(falqon(llama, granularity="per-channel"), tmp_path / "export")["block-scale"]
    assert len(by_row) == LINEARS
    assert "scales of shape (64, 1)" in by_row[0]
    assert "rounded again" in by_row[0]
    assert all("stored (in, out)" in line for line in refusal(gpt2, tmp_path / "export")["block-scale"])


def test_experts_are_refused(tmp_path: Path) -> None:
    base = write_architecture(ARCHITECTURES["mixtral"], tmp_path / "base")
    found = refusal(base, tmp_path / "export")["block-scale"]
    assert found
    assert all("experts" in line and "an expert's weight" in line for line in found)


def test_the_dry_run_cuts_scales_with_their_weight(family: Path) -> None:
    unit = next(unit for unit in plan_export(family / "plain", OPTIONS).units if unit.block is not None)
    shape = (1 << 16, 1024)
    tall = replace(
        unit, entry=replace(unit.entry, shape=shape),
        outputs=(replace(unit.outputs[0], shape=shape), replace(unit.outputs[1], shape=(512, 8))),
    )  # fmt: skip
    assert [output.shape for output in _some_rows(tall).outputs] == [(1 << 14, 1024), (128, 8)]
