"""Every lint rule, met by a defect injected in an artifact; and that nothing is written when one fires."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ExportPlan
from exporters.vllm.warnings import plan_warnings
from fp8pipe.artifact import write_checked
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.core.errors import LintRefusedError

Q = "model.layers.0.self_attn.q_proj.weight"
FP8, BF16 = VllmExportOptions(), VllmExportOptions(format=ExportFormat.BF16)
Edit = Callable[[dict[str, Tensor]], None]


def setting(name: str, value: Tensor) -> Edit:
    return lambda tensors: tensors.__setitem__(name, value)


def flip_codes(byte: int) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[Q].view(torch.uint8)[3, 5] = byte

    return edit


def scale_by(factor: float) -> Edit:
    return lambda tensors: tensors.__setitem__(Q + "_scale", tensors[Q + "_scale"] * factor)


def reciprocal(tensors: dict[str, Tensor]) -> None:
    tensors[Q + "_scale"] = 1.0 / tensors[Q + "_scale"]


def dropping(name: str) -> Edit:
    return lambda tensors: tensors.__delitem__(name)


def quantized_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"] = torch.tensor(0.01)


def quantized_embedding(tensors: dict[str, Tensor]) -> None:
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale"] = torch.tensor(0.01)


def nan_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][7] = float("nan")


def e5m2(tensors: dict[str, Tensor]) -> None:
    tensors[Q] = tensors[Q].float().to(torch.float8_e5m2)


DEFECTS: dict[str, tuple[str, Edit]] = {
    "nan code 0x7F": ("nan-code", flip_codes(0x7F)),
    "nan code 0xFF": ("nan-code", flip_codes(0xFF)),
    "zero scale": ("scale-not-positive", setting(Q + "_scale", torch.tensor(0.0))),
    "negative scale": ("scale-not-positive", scale_by(-1.0)),
    "infinite scale": ("scale-not-finite", setting(Q + "_scale", torch.tensor(float("inf")))),
    "nan scale": ("scale-not-finite", setting(Q + "_scale", torch.tensor(float("nan")))),
    "reciprocal scale": ("scale-reciprocal", reciprocal),
    "scale of a wrong shape": ("scale-shape", setting(Q + "_scale", torch.ones(1, 64))),
    "scales of rows without their second axis": ("scale-shape", setting(Q + "_scale", torch.full((64,), 0.01))),
    "scale of a wrong dtype": ("scale-shape", setting(Q + "_scale", torch.ones((), dtype=torch.bfloat16))),
    "codes without a scale": ("missing-scale", dropping(Q + "_scale")),
    "scale without codes": ("orphan-scale", dropping(Q)),
    "scale of a plain weight": ("orphan-scale", setting("lm_head.weight_scale", torch.tensor(1.0))),
    "the other FP8 format": ("weight-format", e5m2),
    "quantized output head": ("engine-leaves-unquantized", quantized_head),
    "quantized embedding": ("not-linear", quantized_embedding),
    "nan in a norm": ("not-finite", nan_norm),
    "matrix of no module": ("unknown-matrix", setting("model.layers.0.extra.weight", torch.ones(16, 16))),
    "matrix that the model has nowhere": ("unknown-matrix", setting("tower.patches.weight", torch.ones(16, 16))),
    "wrong shape": ("weight-shape", setting("lm_head.weight", torch.ones(96, 32))),
    "missing weight": ("missing-weight", dropping("lm_head.weight")),
}


def rules(error: pytest.ExceptionInfo[LintFindingsError]) -> set[str]:
    return {finding.rule for finding in error.value.findings}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_is_named(defect: str, llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    rule, edit = DEFECTS[defect]
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(falqon(llama, edit=edit), tmp_path / "out" / "export", FP8)
    assert rule in rules(caught)
    finding = next(f for f in caught.value.findings if f.rule == rule)
    assert finding.where
    assert finding.fix
    assert not (tmp_path / "out").exists()  # neither the export nor a partial one


def test_a_layer_that_the_checkpoint_lacks_is_named_in_every_format(
    llama: Path, falqon: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(falqon(llama, edit=dropping("lm_head.weight")), tmp_path / "export", BF16)
    assert [(found.rule, found.where) for found in caught.value.findings] == [("missing-weight", "lm_head.weight")]


def test_all_findings_come_at_once(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    def several(tensors: dict[str, Tensor]) -> None:
        flip_codes(0x7F)(tensors)
        nan_norm(tensors)
        dropping("lm_head.weight")(tensors)

    with pytest.raises(LintRefusedError) as caught:
        export_vllm(falqon(llama, edit=several, adapter="buffered"), tmp_path / "export", FP8)
    assert caught.value.exit_code == 13
    for rule in ("nan-code", "not-finite", "missing-weight", "adapter-not-flushed"):
        assert rule in str(caught.value)


@pytest.mark.parametrize("state", [{"adapter": "buffered"}, {"lora_b": 1e-3}])
def test_an_adapter_that_still_holds_updates(
    state: dict[str, object], llama: Path, falqon: Callable[..., Path], tmp_path: Path
) -> None:
    for export_format in (ExportFormat.FP8, ExportFormat.BF16):
        with pytest.raises(LintFindingsError) as caught:
            export_vllm(falqon(llama, **state), tmp_path / "export", VllmExportOptions(format=export_format))
        assert rules(caught) == {"adapter-not-flushed"}


@pytest.mark.parametrize("skip", ["0.self_attn.k_proj", "1.mlp.up_proj"])
def test_half_a_fused_group(skip: str, llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    source = falqon(llama, skip=(skip,))
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, tmp_path / "export", FP8)
    assert rules(caught) == {"fused-group"}
    assert skip.rpartition(".")[2] in str(caught.value)
    export_vllm(
        source, tmp_path / "bf16", VllmExportOptions(format=ExportFormat.BF16)
    )  # the fix that the message names


def test_dimensions_that_kernels_refuse(
    make_model: Callable[..., Path], falqon: Callable[..., Path], tmp_path: Path
) -> None:
    source = falqon(make_model("llama", intermediate_size=120))
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, tmp_path / "export", FP8)
    assert rules(caught) == {"dimension-multiple"}
    assert len(caught.value.findings) == 6  # gate, up and down of two layers


def test_a_tied_head_with_other_values(qwen2: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    def differs(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(LintFindingsError) as caught:
        export_vllm(falqon(qwen2, edit=differs), tmp_path / "export", FP8)
    assert rules(caught) == {"tied-differs"}


def test_orientation_that_contradicts_the_model(gpt2: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    source = falqon(gpt2)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["details"]["transposed"] = manifest["details"]["transposed"][1:]
    write_checked(source / "manifest.json", json.dumps(manifest))
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(source, tmp_path / "export", FP8)
    assert rules(caught) == {"orientation"}


def test_one_row_of_values_is_a_vector(llama: Path, falqon: Callable[..., Path]) -> None:
    biases = setting("model.layers.0.router.biases", torch.ones(1, 16))  # as Ernie 4.5 has them
    assert lint(plan_export(falqon(llama, edit=biases), FP8)) == []


def test_models_that_vllm_gave_up_are_refused_or_told(llama: Path, falqon: Callable[..., Path]) -> None:
    def plan_of(kind: str) -> ExportPlan:
        plan = plan_export(falqon(llama), BF16)
        return replace(plan, structure=replace(plan.structure, architecture=kind))

    assert [finding.rule for finding in lint(plan_of("MllamaForConditionalGeneration"))] == ["engine-lacks-model"]
    assert lint(plan_of("MptForCausalLM")) == []
    assert any("implements MptForCausalLM no longer" in said for said in plan_warnings(plan_of("MptForCausalLM")))


def test_conv1d_that_no_loader_transposes(gpt2: Path, falqon: Callable[..., Path]) -> None:
    plan = plan_export(falqon(gpt2), FP8)
    plan = replace(plan, schema=replace(plan.schema, conv1d_model_types=frozenset()))
    findings = lint(plan)
    assert {finding.rule for finding in findings} == {"transposed-weight"}
    assert len(findings) == 8
    assert "bf16" in findings[0].fix


def test_the_ignore_list_is_checked_both_ways(llama: Path, falqon: Callable[..., Path]) -> None:
    plan = plan_export(falqon(llama), FP8)
    assert plan.ignore == ("lm_head",)
    assert not lint(plan)
    quantized = Q.removesuffix(".weight")
    tampered = {
        (): "ignore-incomplete",
        ("lm_head", "model.gone"): "ignore-stale",
        ("lm_head", quantized): "ignore-wrong",
    }
    for ignore, rule in tampered.items():
        assert {finding.rule for finding in lint(replace(plan, ignore=ignore))} == {rule}


def test_a_tied_head_with_the_same_values_is_left_out(qwen2: Path, falqon: Callable[..., Path]) -> None:
    def copied(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    plan = plan_export(falqon(qwen2, edit=copied), FP8)
    assert [unit.entry.name for unit in plan.dropped] == ["lm_head.weight"]
    assert lint(plan) == []


def test_codes_in_the_output_head_are_told_by_that_name(llama: Path, falqon: Callable[..., Path]) -> None:
    (found,) = lint(plan_export(falqon(llama, edit=quantized_head), FP8))
    assert found.why == "FP8 codes in the output head, which the engine loads without a scale"


def test_a_tied_head_is_in_the_ignore_list(qwen2: Path, falqon: Callable[..., Path]) -> None:
    """transformers has an lm_head module even when it shares its weight, and would quantize it otherwise."""
    assert plan_export(falqon(qwen2), FP8).ignore == ("lm_head",)


def test_a_plain_model_with_infinities_is_refused(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors[Q][0, 0] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for export_format in (ExportFormat.FP8, ExportFormat.BF16):
        with pytest.raises(LintFindingsError) as caught:
            export_vllm(base, tmp_path / "export", VllmExportOptions(format=export_format))
        assert rules(caught) == {"not-finite"}


def test_nothing_to_quantize(make_model: Callable[..., Path], tmp_path: Path) -> None:
    base = make_model("llama", hidden_size=40, intermediate_size=40, num_attention_heads=2)
    with pytest.raises(LintFindingsError) as caught:
        export_vllm(base, tmp_path / "export", FP8)
    assert rules(caught) == {"nothing-quantized"}
