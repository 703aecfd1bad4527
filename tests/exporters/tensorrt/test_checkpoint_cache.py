"""An FP8 key/value cache in ModelOpt's layout: names, configuration, and what `verify` says of a wrong scale."""

from __future__ import annotations

import json
import struct

import pytest
from artifact_tree import rehash
from safetensors.torch import load_file, save_file

from exporters.modelopt.checkpoint import export_checkpoint
from exporters.modelopt.target import ModeloptExportOptions
from exporters.verify.whole import verify_tree
from fp8pipe.artifact.kinds import KvAmax, KvCacheFacts
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.errors import ConfigurationError, GateFailedError

LAYERS = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
RANGES = {name: KvAmax(layer=layer, k=17.375, v=0.3125) for layer, name in enumerate(LAYERS)}
FACTS = KvCacheFacts(records=2, tokens=20, amax=RANGES, heldout_tokens=9, loss=2.0, fp8_loss=2.001)
FIRST = f"{LAYERS[0]}.k_proj.k_scale"


def export(source, output):
    return export_checkpoint(source, output, ModeloptExportOptions(kv_cache="fp8"))


@pytest.fixture(scope="module")
def source(language_artifact):
    return language_artifact("llama", edit=None, kv_cache=FACTS)  # scales per row: no text is needed


def test_scales_lie_beside_the_projections_and_both_configurations_declare_the_cache(source, tmp_path):
    written = export(source, tmp_path / "x")
    assert all(gate.passed for gate in written.manifest.gates)
    assert {"kv-cache-loss", "scales of the key/value cache differing"} <= {g.name for g in written.manifest.gates}
    tensors = load_file(written.root / "model.safetensors")
    for name in LAYERS:
        for which in ("k", "v"):
            scale = tensors[f"{name}.{which}_proj.{which}_scale"]
            assert scale.shape == ()
            assert scale.numpy().tobytes() == struct.pack("<f", getattr(RANGES[name], which) / 448)
    block = json.loads((written.root / "config.json").read_text())["quantization_config"]
    assert block["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    said = json.loads((written.root / "hf_quant_config.json").read_text())["quantization"]
    assert said["kv_cache_quant_algo"] == "FP8"
    found, _ = verify_tree(find_tree(written.root), [source], strict=True)
    assert found.findings == []


def test_verify_names_a_doubled_scale_in_the_files_and_in_the_manifest(source, tmp_path):
    written = export(source, tmp_path / "x").root

    def doubled(data):
        data["details"]["kv_cache"][LAYERS[1]]["v"] *= 2

    tensors = load_file(written / "model.safetensors")
    tensors[FIRST] *= 2
    save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
    rehash(written, doubled)
    found, _ = verify_tree(find_tree(written), [source], strict=True)
    told = [f"{one.where} {one.why}" for one in found.findings]
    assert any(FIRST in text for text in told), told
    assert any(f"{LAYERS[1]}.v is" in text for text in told), told


def test_what_has_no_such_cache_is_refused(language_artifact, language_text, tmp_path):
    with pytest.raises(ConfigurationError, match="no ranges"):
        export(language_artifact("llama", edit=None), tmp_path / "x")
    costly = FACTS.model_copy(update={"fp8_loss": 2.011})
    with pytest.raises(GateFailedError, match="kv-cache-loss"):
        export(language_artifact("llama", edit=None, kv_cache=costly), tmp_path / "x")
    fused = FACTS.model_copy(update={"amax": {"model.layers.0.mlp": RANGES[LAYERS[0]]}})
    with pytest.raises(ConfigurationError, match="has no k_proj"):
        export(language_artifact("llama", edit=None, kv_cache=fused), tmp_path / "x")
