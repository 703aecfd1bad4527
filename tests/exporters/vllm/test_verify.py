"""What `verify` says of a vLLM export whose configuration or manifest was edited, in which words."""

from __future__ import annotations

import json
import shutil

import pytest
from artifact_tree import rehash, without_parents
from safetensors.torch import load_file, save_file

from exporters.verify import contents
from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact import open_artifact, write_checked
from fp8pipe.artifact.verify import find_tree


@pytest.fixture
def pair(language_artifact, tmp_path):
    """(export, parent)."""
    parent = language_artifact("llama", granularity="per-channel")
    return export_vllm(parent, tmp_path / "x", VllmExportOptions()).root, parent


def findings(export, *parents):
    checked, _ = verify_tree(find_tree(export), parents, strict=True)
    return [(found.where, found.why) for found in checked.findings]


def test_a_configuration_is_quoted_as_found_and_as_expected(pair):
    export, _ = pair
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8x"
    (export / "config.json").write_text(json.dumps(config))
    rehash(export)
    said = [why for where, why in findings(export) if where == "config.json"]
    assert any("quant_method is 'fp8x'; expected 'compressed-tensors'" in why for why in said), said


def test_a_layer_s_facts_that_only_the_parent_knows_are_held_against_it(pair):
    export, parent = pair
    manifest = json.loads((export / "manifest.json").read_text())
    layer = next(layer for layer in manifest["layers"] if layer.get("weight"))
    layer["weight"]["scale_rule"] = "power-of-two" if layer["weight"].get("scale_rule") != "power-of-two" else "amax"
    write_checked(export / "manifest.json", json.dumps(manifest))
    assert findings(without_parents(export)) == []
    ((where, why),) = findings(export, parent)
    assert layer["name"] in where + why
    assert "power-of-two; the files hold" in why


def test_a_tensor_of_another_shape_than_the_architecture_s_is_named_once(pair):
    export, _ = pair
    shutil.copy(export / "config.json", export / "kept")
    config = json.loads((export / "kept").read_text())
    (export / "kept").unlink()
    config["hidden_size"] *= 2
    (export / "config.json").write_text(json.dumps(config))
    rehash(export)
    assert any("config.json declares" in why for _, why in findings(export))


def test_a_file_that_should_hold_json_and_does_not_is_named(pair):
    export, _ = pair
    with (export / "config.json").open("ab") as stream:
        stream.write(b"\0")
    rehash(export)
    assert any(where == "config.json" and "it is not JSON" in why for where, why in findings(export))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.lora_A.weight", "model.norm.base_layer.weight"])
def test_an_adapter_s_tensor_is_named(pair, name):
    export, _ = pair
    (file,) = export.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {name: tensors["model.norm.weight"].clone()}, file, metadata={"format": "pt"})
    rehash(export)
    assert any(where == name and "adapter" in why for where, why in findings(export))


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError, TypeError, OSError])
def test_whatever_a_library_raises_on_reading_is_a_finding(pair, monkeypatch, error):
    def unreadable(*_):
        raise error("size mismatch")
        yield

    monkeypatch.setattr(contents, "_check_tuned", unreadable)
    (finding,) = contents.check_contents(open_artifact(pair[1]), None)[0]
    assert f"{error.__name__}: " in finding.why
    assert "size mismatch" in finding.why
