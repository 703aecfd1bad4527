"""An export whose model's turns end with a token that its source names nowhere: told, written, verified, validated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from artifact_tree import rehash, without_parents

from exporters.verify.whole import verify_tree
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import file_gates
from exporters.vllm.reopen_files import changed_on_purpose
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.gate import failures
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from validation.vllm.expected import plan_of

NAME = "generation_config.json"


def ended(source: Path, root: Path, token: str) -> Path:
    """The model with a template whose turns end with `token`, t7 being a special token that it names nowhere else."""
    shutil.copytree(source, root)
    settings = json.loads((root / "tokenizer_config.json").read_text()) | {"additional_special_tokens": ["t7"]}
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} " + token + " {% endfor %}")
    return root


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """(source, its export)."""
    root = tmp_path_factory.mktemp("ending")
    source = ended(llama, root / "model", "t7")
    return source, export_vllm(source, root / "export", VllmExportOptions()).root


def verified(export, *sources):
    checked, compared = verify_tree(find_tree(export), sources, strict=True)
    assert len(compared) == len(sources)
    return [(found.where, found.why) for found in checked.findings]


def test_engines_read_both_tokens_and_the_manifest_says_so(exported):
    source, export = exported
    assert import_transformers().GenerationConfig.from_pretrained(export).eos_token_id == [2, 7]
    before, after = (json.loads((root / NAME).read_text()) for root in exported)
    assert after == before | {"eos_token_id": [2, 7]}
    manifest = open_artifact(export).manifest
    assert manifest.details.stop_token_added == 7
    assert any("t7 (7)" in warning for warning in manifest.warnings)
    assert any(gate.name == "generation-config-preserved" and gate.passed for gate in manifest.gates)
    document, plan = plan_vllm(source, export.parent / "dry", VllmExportOptions())
    assert any("t7 (7)" in note for note in (*plan.notes, *document["warnings"]))


def test_verify_and_validate_know_the_change_and_no_other(exported, tmp_path):
    source, export = exported
    assert verified(export, source) == []
    plan = plan_of(open_artifact(export), source)
    assert changed_on_purpose(plan) == ["quantization_config", f"{NAME}: eos_token_id"]
    assert not failures(file_gates(plan, export))
    for edit in ({"eos_token_id": [2]}, {"eos_token_id": [2, 7], "top_k": 1}):
        copy = shutil.copytree(export, tmp_path / str(len(edit)))
        (copy / NAME).write_text(json.dumps(json.loads((source / NAME).read_text()) | edit))
        rehash(copy)
        assert any(NAME in where + why for where, why in verified(copy, source))
        assert any(where == NAME for where, _ in verified(without_parents(copy))) == (edit == {"eos_token_id": [2]})
        assert any(NAME in reason for reason in failures(file_gates(plan_of(open_artifact(copy), source), copy)))


def test_an_export_from_before_is_judged_by_its_own_manifest(exported, tmp_path):
    source, export = exported
    copy = shutil.copytree(export, tmp_path / "old")
    shutil.copyfile(source / NAME, copy / NAME)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["details"]["stop_token_added"]
    manifest["gates"] = [gate for gate in manifest["gates"] if gate["name"] != "generation-config-preserved"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rehash(copy)
    assert not failures(file_gates(plan_of(open_artifact(copy), source), copy))


def test_a_file_is_made_where_there_is_none_and_an_end_that_is_known_changes_nothing(llama, tmp_path):
    source = ended(llama, tmp_path / "model", "t7")
    (source / NAME).unlink()
    export = export_vllm(source, tmp_path / "made", VllmExportOptions(format="bf16")).root
    assert json.loads((export / NAME).read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 7]}
    assert verified(export, source) == []
    known = ended(llama, tmp_path / "known", "t2")
    export = export_vllm(known, tmp_path / "same", VllmExportOptions(format="bf16")).root
    assert (export / NAME).read_bytes() == (known / NAME).read_bytes()
    manifest = json.loads((export / "manifest.json").read_text())
    assert "stop_token_added" not in manifest["details"]
    assert not any("generation" in text for text in (*manifest["warnings"], *(g["name"] for g in manifest["gates"])))


def test_a_template_without_an_end_is_warned_of(llama, tmp_path):
    source = ended(llama, tmp_path / "model", "")
    export = export_vllm(source, tmp_path / "export", VllmExportOptions(format="bf16"))
    assert any("no end-of-turn token after an answer" in warning for warning in export.manifest.warnings)


def test_a_chat_template_that_is_not_valid_is_refused(llama, tmp_path):
    source = ended(llama, tmp_path / "model", "t7")
    (source / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ConfigurationError, match=r"chat_template\.jinja is not valid") as error:
        export_vllm(source, tmp_path / "export", VllmExportOptions())
    assert error.value.exit_code == 10
    assert not (tmp_path / "export").exists()


def test_tokens_without_a_row_in_the_embedding_are_told(llama, tmp_path):
    source = ended(llama, tmp_path / "model", "t7")
    tokenizer = import_transformers().AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([f"<new{i}>" for i in range(2000)])
    tokenizer.save_pretrained(source)
    document, _ = plan_vllm(source, tmp_path / "export", VllmExportOptions())
    assert any("rows of the embedding, so that no prompt may hold them" in warning for warning in document["warnings"])
