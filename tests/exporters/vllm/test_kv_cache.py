"""Scales of an FP8 key/value cache in an export: where they are, what they are, and what a wrong one is told."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from artifact_tree import rehash, without_parents
from compressed_tensors.quantization import QuantizationArgs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters.verify.whole import verify_tree
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.kinds import KvAmax, KvCacheFacts
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, GateFailedError
from fp8pipe.models.compat import import_transformers

ATTENTION = "model.layers.{}.self_attn"
# 1/448 is no fp32 number, so every scale is rounded.
RANGES = {ATTENTION.format(layer): KvAmax(layer=layer, k=17.375 + layer, v=0.3125 * (layer + 1)) for layer in (0, 1)}
FACTS = KvCacheFacts(records=2, tokens=20, amax=RANGES, heldout_tokens=9, loss=2.0, fp8_loss=2.01, error=0.001)
FIRST = ATTENTION.format(0) + ".k_scale"


@pytest.fixture(scope="module")
def source(language_artifact):
    return language_artifact("llama", kv_cache=FACTS)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    return export_vllm(source, tmp_path_factory.mktemp("kv") / "x", VllmExportOptions(kv_cache="fp8"))


def test_every_layer_has_two_scales_that_vllm_reads(exported):
    tensors = load_file(exported.root / "model.safetensors")
    for name, seen in RANGES.items():
        for which in ("k", "v"):
            scale = tensors[f"{name}.{which}_scale"]
            # Python divides in double precision, and fp32 is less than half as long: rounding twice changes nothing.
            assert scale.numpy().tobytes() == struct.pack("<f", getattr(seen, which) / 448)
            assert (scale.dtype, scale.shape) == (torch.float32, (1,))
    assert sum(name.endswith((".k_scale", ".v_scale")) for name in tensors) == 4


def test_the_configuration_declares_the_cache_and_compressed_tensors_understands_it(exported):
    scheme = json.loads((exported.root / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    args = QuantizationArgs.model_validate(scheme)
    assert (args.num_bits, args.type, args.strategy, args.dynamic) == (8, "float", "tensor", False)
    assert exported.manifest.details.kv_cache[ATTENTION.format(1)].layer == 1


def test_gates_hold_the_scales_and_what_the_cache_costs(exported):
    gates = {gate.name: gate for gate in exported.manifest.gates}
    assert gates["kv-cache-scales"].passed
    assert gates["kv-cache-loss"].value == pytest.approx(0.004)
    assert gates["payload-bytes"].passed


def test_scales_lie_in_the_last_shard_and_in_the_index(source, tmp_path):
    export = export_vllm(source, tmp_path / "x", VllmExportOptions(kv_cache="fp8", max_shard_bytes=30_000)).root
    files = sorted(export.glob("*.safetensors"))
    index = json.loads((export / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 1
    assert index[FIRST] == files[-1].name
    with safe_open(files[-1], "pt") as shard:
        assert FIRST in shard.keys()  # noqa: SIM118 - it is no dictionary


def test_a_cache_that_costs_too_much_is_refused(language_artifact, tmp_path):
    source = language_artifact("llama", kv_cache=FACTS.model_copy(update={"fp8_loss": 2.0122}))
    with pytest.raises(GateFailedError, match="kv-cache-loss"):
        export_vllm(source, tmp_path / "x", VllmExportOptions(kv_cache="fp8"))
    assert not (tmp_path / "x").exists()
    export_vllm(source, tmp_path / "x", VllmExportOptions())  # without the cache it is as good as any


def test_a_source_without_ranges_is_refused_with_the_way_out(llama, language_artifact, tmp_path):
    for source in (llama, language_artifact("llama")):
        for run in (export_vllm, plan_vllm):
            with pytest.raises(ConfigurationError, match="--kv-cache fp8") as caught:
                run(source, tmp_path / "x", VllmExportOptions(kv_cache="fp8"))
            assert "tune the model" in caught.value.fix


def test_the_cache_is_declared_beside_fp8_weights_only():
    with pytest.raises(ConfigurationError, match="kv_cache"):
        build_config(VllmExportOptions, {"kv_cache": "fp8", "format": "bf16"})
    build_config(VllmExportOptions, {"kv_cache": "fp8", "format": "w8a16"})


def _swap(tensors):
    other = FIRST.replace("k_scale", "v_scale")
    tensors[FIRST], tensors[other] = tensors[other], tensors[FIRST]


EDITS = {
    "doubled": lambda tensors: tensors.update({FIRST: tensors[FIRST] * 2}),
    "missing": lambda tensors: tensors.pop(FIRST),
    "swapped": _swap,
    "unity": lambda tensors: tensors.update({FIRST: torch.ones(1)}),
    "no scalar": lambda tensors: tensors.update({FIRST: tensors[FIRST].reshape(())}),
}


@pytest.mark.parametrize("with_parent", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_verify_names_a_scale_that_is_not_the_one_of_the_manifest(source, tmp_path, edit, with_parent):
    export = export_vllm(source, tmp_path / "x", VllmExportOptions(kv_cache="fp8")).root
    tensors = load_file(export / "model.safetensors")
    EDITS[edit](tensors)
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
    rehash(export)
    checked = find_tree(export if with_parent else without_parents(export))
    found, _ = verify_tree(checked, [source] if with_parent else [], strict=True)
    assert any(FIRST in f"{one.where} {one.why}" for one in found.findings), found.findings


def test_verify_holds_the_manifest_s_scales_against_the_parent_s_ranges(source, tmp_path):
    export = export_vllm(source, tmp_path / "x", VllmExportOptions(kv_cache="fp8")).root
    tensors = load_file(export / "model.safetensors")
    tensors[FIRST] *= 2
    save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})

    def doubled(data):
        data["details"]["kv_cache"][ATTENTION.format(0)]["k"] *= 2

    rehash(export, doubled)
    found, _ = verify_tree(find_tree(export), [source], strict=True)
    assert any(f"{ATTENTION.format(0)}.k is" in one.why for one in found.findings), found.findings


def test_transformers_finds_the_scales_by_these_names(exported):
    """It keeps them in the model's dtype, so they are rounded to bf16 there."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(exported.root)
    tensors = load_file(exported.root / "model.safetensors")
    for name in RANGES:
        for which in ("k_scale", "v_scale"):
            assert torch.equal(getattr(model.get_submodule(name), which), tensors[f"{name}.{which}"].bfloat16())
