"""Exports of tiny models, read back by two third parties: compressed-tensors and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from export_contents import raw
from language_models import ARCHITECTURES
from language_models import write as write_architecture
from safetensors.torch import load_file, save_file
from small_artifacts import details_of
from torch import Tensor

from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import file_gates, iter_weights, load_torch_model
from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.core.errors import ConfigurationError, GateFailedError, MissingCapabilityError
from fp8pipe.models.checkpoint.tensors import weight_entries
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.grids import FloatGrid, same_bits

FAMILIES = ["llama", "qwen2"]


def options(export_format: str, **changes: object) -> VllmExportOptions:
    return VllmExportOptions(format=export_format, **changes)  # type: ignore[arg-type]


def dequantized(directory: Path) -> dict[str, Tensor]:
    """A falqon artifact's weights by its contract: code * scale, in fp32 arithmetic of this test."""
    tensors = raw(directory)
    flipped = set(open_artifact(directory).manifest.details.transposed)
    result = {}
    for name, value in tensors.items():
        if name.endswith("weight_scale"):
            continue
        scale = tensors.get(name + "_scale")
        if scale is None:
            result[name] = value
        else:
            result[name] = value.float() * (scale.t() if name in flipped and scale.ndim else scale)
    return result


def decompressed(directory: Path) -> dict[str, Tensor]:
    """The export's quantized weights by compressed-tensors, driven by the export's own config.json."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = raw(directory)
    return {
        name: compressor.decompress({"weight": value, "weight_scale": tensors[name + "_scale"]}, scheme)["weight"]
        for name, value in tensors.items()
        if name + "_scale" in tensors
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
@pytest.mark.parametrize("export_format", ["fp8", "w8a16"])
def test_falqon_to_fp8_is_bit_exact_for_compressed_tensors(
    family: str,
    granularity: str,
    export_format: str,
    falqon: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source = falqon(request.getfixturevalue(family), granularity=granularity)
    artifact = export_vllm(source, tmp_path / "export", options(export_format))
    expected, theirs, stored = dequantized(source), decompressed(artifact.root), raw(artifact.root)
    assert len(theirs) == 14  # seven projections in each of two layers
    for name, value in expected.items():
        assert same_bits(theirs.get(name, stored[name]), value), name
        assert name not in theirs or stored[name + "_scale"].shape == (value.shape[0], 1)
    assert set(stored) == set(expected) | {name + "_scale" for name in theirs}
    assert all(gate.passed for gate in artifact.manifest.gates)
    assert not any((artifact.root / name).exists() for name in ("adapter.safetensors", "metrics.jsonl", "plot.png"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("export_format", ["fp8", "w8a16", "bf16"])
def test_transformers_reads_the_same_weights(
    family: str,
    export_format: str,
    falqon: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    transformers = import_transformers()
    export = export_vllm(falqon(request.getfixturevalue(family)), tmp_path / "export", options(export_format)).root
    dtype = torch.bfloat16 if export_format == "bf16" else torch.float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
    ids = torch.arange(3, 19).reshape(1, -1)
    theirs(ids)  # compressed-tensors decompresses at the first forward pass
    ours = load_torch_model(export, dtype)
    loaded = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert same_bits(loaded[name], value), name
    if export_format != "fp8":  # there transformers rounds activations as well
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_bf16_is_the_dequantized_weight_rounded_once(
    family: str, falqon: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = falqon(request.getfixturevalue(family), granularity="per-channel")
    export = export_vllm(source, tmp_path / "export", options("bf16"))
    stored = raw(export.root)
    for name, value in dequantized(source).items():
        assert same_bits(stored[name], value.to(torch.bfloat16)), name
    config = json.loads((export.root / "config.json").read_text())
    assert "quantization_config" not in config
    assert export.manifest.number_format is None
    assert "rounded once to bf16" in next(g for g in export.manifest.gates if g.name == "weights-bit-exact").detail


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_gpt2_keeps_its_orientation_and_its_numbers(
    granularity: str, gpt2: Path, falqon: Callable[..., Path], tmp_path: Path
) -> None:
    source = falqon(gpt2, granularity=granularity)
    export = export_vllm(source, tmp_path / "export", options("fp8"))
    stored, expected = raw(export.root), dequantized(source)
    fc = "transformer.h.0.mlp.c_fc.weight"
    assert stored[fc].shape == (64, 256)
    assert stored[fc + "_scale"].shape == (256, 1)  # one per output, which is the second axis
    for name, value in iter_weights(export.root):
        assert same_bits(value, expected[name].float()), name
    assert any("transformers" in warning for warning in export.manifest.warnings)
    reference = load_torch_model(export.root, torch.float32)
    by_hand = import_transformers().AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    by_hand.load_state_dict({k: v.float() for k, v in expected.items()}, strict=False)
    ids = torch.arange(3, 19).reshape(1, -1)
    assert torch.equal(reference(ids).logits, by_hand.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_plain_model_is_quantized_on_the_way(
    family: str, dtype: torch.dtype, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_model(family, dtype=dtype)
    export = export_vllm(base, tmp_path / "export", options("fp8"))
    manifest, original = export.manifest, raw(base)
    assert manifest.parents[0].kind == "model"
    assert len(manifest.parents[0].digest) == 64
    assert any("quantized by this export" in warning for warning in manifest.warnings)
    quantized = {name for name in raw(export.root) if name + "_scale" in raw(export.root)}
    assert len(quantized) == (8 if family == "gpt2" else 14)
    for name, value in iter_weights(export.root):
        reference = original[name].float()
        if name in quantized:
            # E4M3's worst case is 6.25 %; uniform weights of the initialization sit near 2.6 %.
            assert torch.linalg.vector_norm(value - reference) < 0.04 * torch.linalg.vector_norm(reference), name
        else:
            assert same_bits(value, reference), name


def test_merged_lora_is_a_source_too(qwen2: Path, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "merged", kind="lora-merged", stage="finetune") as writer:
        for path in qwen2.iterdir():
            (writer.root / path.name).write_bytes(path.read_bytes())
        merged = writer.commit(details=details_of("lora-merged"))
    plain = export_vllm(qwen2, tmp_path / "a", options("w8a16"))
    export = export_vllm(merged.root, tmp_path / "b", options("w8a16"))
    assert export.manifest.parents == [merged.as_parent()]
    first, second = raw(plain.root), raw(export.root)
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)


def test_tiny_shards_hold_the_same_tensors(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    source = falqon(llama)
    whole = export_vllm(source, tmp_path / "whole", options("fp8"))
    parts = export_vllm(source, tmp_path / "parts", options("fp8", max_shard_bytes=20_000))
    assert [p.name for p in whole.root.glob("*.safetensors")] == ["model.safetensors"]
    files = sorted(parts.root.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    first, second = raw(whole.root), raw(parts.root)
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)
    for file in files:
        tensors = load_file(file)
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 20_000
        assert all(name.removesuffix("_scale") in tensors for name in tensors)  # a weight and its scale stay together
    index = json.loads((parts.root / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in second.values())
    assert {name: entry.file.name for name, entry in weight_entries(parts.root).items()} == index["weight_map"]
    assert import_transformers().AutoModelForCausalLM.from_pretrained(parts.root) is not None


def test_auxiliary_files_are_copied_byte_for_byte(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    export = export_vllm(falqon(llama), tmp_path / "export", options("fp8"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (export.root / name).read_bytes() == (llama / name).read_bytes()
    assert b"\r\n" in (export.root / "chat_template.jinja").read_bytes()
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (export.root, llama))
    assert ours.pop("quantization_config")["ignore"] == ["lm_head"]
    assert ours == theirs


def test_unconverted_layers_are_ignored_by_name(llama: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    export = export_vllm(falqon(llama, skip=("o_proj", "1.mlp.down_proj")), tmp_path / "export", options("w8a16"))
    expected = {
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert set(export.manifest.details.ignore) == expected
    theirs = import_transformers().AutoModelForCausalLM.from_pretrained(export.root, dtype=torch.float32)
    theirs(torch.tensor([[1, 2, 3]]))
    ours = load_torch_model(export.root, torch.float32).state_dict()
    assert all(same_bits(value, ours[name]) for name, value in theirs.state_dict().items() if name in ours)


def test_small_layers_of_a_plain_model_stay_with_their_group(make_model: Callable[..., Path], tmp_path: Path) -> None:
    base = make_model("llama", num_attention_heads=8, num_key_value_heads=1)  # k and v are 8 rows high
    export = export_vllm(base, tmp_path / "export", options("fp8"))
    reasons = {layer.name: layer.reason for layer in export.manifest.layers if not layer.converted}
    assert "multiple of 16" in reasons["model.layers.0.self_attn.k_proj"]
    assert "fuses it with" in reasons["model.layers.0.self_attn.q_proj"]
    assert "output head" in reasons["lm_head"]
    assert any("stay unquantized" in warning for warning in export.manifest.warnings)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma3_mm", "qwen25vl"])
def test_a_plain_model_whose_tensors_are_renamed_at_load_keeps_its_names(name: str, tmp_path: Path) -> None:
    base = write_architecture(ARCHITECTURES[name], tmp_path / "base")
    form = "bf16" if ARCHITECTURES[name].refused else "fp8"
    export = export_vllm(base, tmp_path / "export", options(form))
    assert all(gate.passed for gate in export.manifest.gates)
    assert raw(base).keys() == {key for key in raw(export.root) if not key.endswith("_scale")}
    assert load_torch_model(export.root, torch.float32).state_dict()


def test_duplicate_of_a_tied_head_is_left_out(qwen2: Path, falqon: Callable[..., Path], tmp_path: Path) -> None:
    def duplicate(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    export = export_vllm(falqon(qwen2, edit=duplicate), tmp_path / "export", options("fp8"))
    assert "lm_head.weight" not in raw(export.root)
    assert any("lm_head.weight was left out" in warning for warning in export.manifest.warnings)


def test_headless_checkpoint_names_are_understood(gpt2: Path, tmp_path: Path) -> None:
    base = tmp_path / "headless"
    base.mkdir()
    for path in gpt2.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = {
        name.removeprefix("transformer."): value for name, value in load_file(gpt2 / "model.safetensors").items()
    }
    # Old GPT-2 checkpoints also carry the causal mask, which the engine drops.
    tensors["h.0.attn.bias"] = torch.tril(torch.ones(64, 64)).reshape(1, 1, 64, 64)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    export = export_vllm(base, tmp_path / "export", options("fp8"))
    assert "h.0.attn.c_attn.weight_scale" in raw(export.root)


@pytest.mark.parametrize(
    ("rule", "trained"),
    [
        ("live", "8-bit e4m3, per-token, power-of-two, dynamic"),
        ("released", "8-bit e4m3, per-tensor, amax, dynamic"),
    ],
)
def test_the_manifest_says_how_activations_were_trained(
    llama: Path, falqon: Callable[..., Path], tmp_path: Path, rule: str, trained: str
) -> None:
    source = falqon(llama, rule=rule)
    export = export_vllm(source, tmp_path / "fp8", options("fp8"))
    assert str(export.manifest.details.activations) == "8-bit e4m3, per-token, amax, dynamic"
    assert str(export.manifest.details.trained_activations) == trained
    export = export_vllm(source, tmp_path / "w8a16", options("w8a16"))
    assert export.manifest.details.activations is None
    assert str(export.manifest.details.trained_activations) == trained
    export = export_vllm(llama, tmp_path / "plain", options("fp8"))
    assert export.manifest.details.activations is not None
    assert export.manifest.details.trained_activations is None


def test_a_file_that_exists_goes_the_way_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "damaged.gguf"
    gguf.write_bytes(b"GGUF")
    read_as_gguf = r"cannot be converted|the package (gguf|accelerate)"  # the second where they are not installed
    with pytest.raises((ConfigurationError, MissingCapabilityError), match=read_as_gguf):
        export_vllm(gguf, tmp_path / "export", options("fp8"))
    other = tmp_path / "notes.txt"
    other.write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a model"):
        export_vllm(other, tmp_path / "export", options("fp8"))


def test_a_quantizer_that_rounds_wrong_does_not_prove_itself(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes are written and would be made again by the same wrong rule; the comparison knows its own."""

    def truncated(grid: FloatGrid, values: torch.Tensor) -> torch.Tensor:
        lower = (values.abs() * (1 - 2.0**-5)).clamp(max=grid.max)
        return (lower * values.sign()).to(grid.dtype)

    monkeypatch.setattr(FloatGrid, "cast", truncated)
    with pytest.raises(GateFailedError, match="weights-bit-exact"):
        export_vllm(llama, tmp_path / "export", options("fp8"))


@pytest.mark.parametrize("name", ["params.json", "consolidated.safetensors", "hf_quant_config.json"])
def test_a_file_that_nobody_planned_fails_the_comparison(llama: Path, tmp_path: Path, name: str) -> None:
    export = export_vllm(llama, tmp_path / "export", options("fp8"))
    plan = plan_export(llama, options("fp8"))
    assert all(gate.passed for gate in file_gates(plan, export.root))
    (export.root / name).write_text("{}", encoding="utf-8")
    assert [name in str(gate) for gate in file_gates(plan, export.root) if not gate.passed] == [True]
