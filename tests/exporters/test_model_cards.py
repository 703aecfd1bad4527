"""Every export carries a model card: the hub's own reader takes it, a rerun writes the same, no path leaks."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from huggingface_hub import ModelCard, ModelCardData
from quantized_families import quantized_family, write_vit_artifact
from small_artifacts import E4M3, details_of

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.target import targets
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact import ArtifactWriter, LayerRecord, Parent, open_artifact
from fp8pipe.artifact.gate import none_of
from fp8pipe.report.card import CARD_FILE, write_card

# The module of each target's export, which holds its `_CARD`.
FACTS = {target.kind: target.export.partition(":")[0] for target in targets()}


def read(export):
    card = ModelCard.load(export.root / CARD_FILE)
    assert isinstance(card.data, ModelCardData)
    assert "`{" not in card.text
    assert "None" not in card.text
    return card


def test_the_card_of_a_vllm_export_is_the_hub_s_and_the_same_again(falqon, llama, tmp_path):
    source = falqon(llama)
    first, second = (export_vllm(source, tmp_path / name / "served", VllmExportOptions()) for name in "ab")
    card = read(first)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.get("quantization")["quantized_layers"] == sum(x.converted for x in first.manifest.layers)
    assert {"fp8pipe", "fp8"} <= set(card.data.tags)
    assert (first.root / CARD_FILE).read_bytes() == (second.root / CARD_FILE).read_bytes()
    assert first.content == second.content
    assert str(tmp_path) not in card.content
    assert open_artifact(source).content in card.content
    assert "weights-bit-exact: 0" in card.text
    assert "vllm serve" in card.text
    assert next(entry for entry in first.manifest.files if entry.path == CARD_FILE).volatile


def test_the_card_of_an_onnx_export(tmp_path):
    source = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit", bits=8), images=4)
    card = read(export_onnx(source.root, tmp_path / "tiny", OnnxExportOptions()))
    assert (card.data.library_name, card.data.pipeline_tag) == ("onnx", "image-classification")
    assert "weight codes differing: 0 of" in card.text
    assert "fp8pipe serve ." in card.text


def commit(tmp_path, origin, source_files=None, kind="modelopt-export", own_files=None, **details):
    """A card for a source with those files, made from `origin`."""
    with ArtifactWriter(tmp_path / "source", kind="falqon", stage="finetune") as writer:
        for name, text in (source_files or {}).items():
            (writer.root / name).write_text(text, encoding="utf-8")
        base = Parent(kind="model", digest="cd" * 32, path=origin)
        config = {"method": "falqon", "rank": 8}
        source = writer.commit(parents=[base], config=config, details=details_of("falqon", **details))
    with ArtifactWriter(tmp_path / "export", kind=kind, stage="export") as writer:
        for name, text in (own_files or {}).items():
            (writer.root / name).write_text(text, encoding="utf-8")
        writer.gate(none_of("weight codes differing", 0, "of 12 in 3 layers"))
        layers = [LayerRecord(name="a", weight=E4M3), LayerRecord(name="b")]
        facts = import_module(FACTS[kind])._CARD
        write_card(writer, facts, source=source.root, parent=source.as_parent(), format="fp8", layers=layers)
        return ModelCard.load(writer.commit(details=details_of(kind)).root / CARD_FILE)


@pytest.mark.parametrize(
    ("origin", "base"),
    [("org/name", "org/name"), ("org/name@main", "org/name"), ("timm:vit_tiny.in1k", "timm/vit_tiny.in1k"),
     ("sample:smollm2", None), ("/home/somebody/secret/base", None)],
)  # fmt: skip
def test_the_base_model_is_named_where_the_hub_knows_it(tmp_path, origin, base):
    card = commit(tmp_path, origin)
    assert card.data.base_model == base
    assert card.data.get("base_model_relation") == ("quantized" if base else None)
    assert "somebody" not in card.content


def test_the_licence_comes_from_the_source(tmp_path):
    front = "---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n"
    assert commit(tmp_path / "card", "org/name", {"README.md": front}).data.license == "apache-2.0"
    config = json.dumps({"license": "mit"})
    assert commit(tmp_path / "config", "org/name", {"config.json": config}).data.license == "mit"
    travelled = commit(tmp_path / "file", "org/name", own_files={"LICENSE.txt": "Be kind."}).data
    assert (travelled.license, travelled.get("license_link")) == ("other", "LICENSE.txt")
    assert commit(tmp_path / "none", "org/name").data.license is None


@pytest.mark.parametrize("kind", FACTS)
def test_every_kind_has_all_parts_and_the_manifest_s_numbers(tmp_path, kind):
    card = commit(tmp_path, "org/name", kind=kind, heldout_loss={"untuned": 2.25, "deployed": 1.51234})
    titles = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert titles == [f"## {name}" for name in ("How it was made", "Numbers", "Serve it", "What was proved", "Limits",
                                                "Digests")]  # fmt: skip
    assert "| 1.5123 |" in card.text
    assert "weight codes differing: 0 of 12 in 3 layers" in card.text
    assert "cd" * 32 in card.text
