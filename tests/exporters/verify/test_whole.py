"""The parent of an export: named with --parents, at its recorded path, beside the export, changed, damaged or gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from artifact_tree import rehash

from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.finding import Check
from fp8pipe.artifact.verify import find_tree


def verified(export: Path, *, quick: bool = False) -> tuple[list[tuple[str, str]], str]:
    """Pairs that were compared, and the notes, of a tree in which nothing is wrong."""
    checked, compared = verify_tree(find_tree(export), quick=quick)
    assert checked.findings == []
    return compared, "\n".join(checked.notes)


@pytest.fixture
def exported(llama, tmp_path):
    """A plain model and its export."""
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model", export_vllm(tmp_path / "model", tmp_path / "export", VllmExportOptions()).root


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "generation_config.json"])
def test_a_model_whose_files_were_edited_is_another_one(exported, file):
    model, export = exported
    (model / file).write_text("{} \n")
    checked, compared = verify_tree(find_tree(export), [model], quick=True)
    assert [(found.check, found.where) for found in checked.findings] == [(Check.PARENT, "model")]
    assert compared == []


def test_a_former_digest_of_a_model_is_no_proof_and_says_why(exported):
    model, export = exported
    rehash(export, lambda data: data["parents"][0].update(digest="0" * 64, content=None))
    checked, compared = verify_tree(find_tree(export), [model], quick=True)
    assert (checked.findings, compared) == ([], [])
    assert any("did not cover tokenizer and chat template; export it again" in note for note in checked.notes)


def test_a_model_at_its_recorded_path_is_compared_with(exported):
    model, export = exported
    assert verified(export) == ([("export", str(model))], "")
    compared, notes = verified(export, quick=True)
    assert compared == []
    assert "models are not hashed with --quick" in notes


def test_a_fault_is_found_without_naming_the_parent(exported):
    """The export alone cannot tell: its own hashes are right."""
    _, export = exported
    (export / "tokenizer_config.json").write_text("{}")
    rehash(export)
    checked, _ = verify_tree(find_tree(export))
    assert "tokenizer_config.json" in [found.where for found in checked.findings]


def test_a_model_that_has_changed_at_its_path_is_not_compared_with_and_why_is_said(exported):
    model, export = exported
    (model / "chat_template.jinja").write_text("{} \n")
    compared, notes = verified(export)
    assert compared == []
    assert f"({model}): not compared: what is there has another digest; give its directory with --parents" in notes


def test_an_artifact_is_found_at_its_path_or_beside_and_is_hashed_before_it_is_compared_with(falqon, llama, tmp_path):
    parent = shutil.copytree(falqon(llama), tmp_path / "tuned")
    export = export_vllm(parent, tmp_path / "exports" / "vllm", VllmExportOptions()).root
    assert verified(export) == ([("vllm", str(parent))], "")
    moved = parent.rename(tmp_path / "exports" / "of-another-name")
    assert verified(export) == ([("vllm", str(moved))], "")
    (moved / "config.json").write_text("{}")
    compared, notes = verified(export)
    assert compared == []
    assert "config.json" in notes
    moved.rename(tmp_path / "away")
    compared, notes = verified(export)
    assert compared == []
    assert (
        f"({parent}): not compared: it is neither there nor beside the artifact; give its directory with --parents"
        in notes
    )


def test_a_parent_that_was_made_again_at_its_path_is_taken_by_its_content(falqon, llama, tmp_path):
    parent = shutil.copytree(falqon(llama), tmp_path / "tuned")
    export = export_vllm(parent, tmp_path / "exports" / "vllm", VllmExportOptions()).root
    rehash(parent, lambda data: data.update(created="2027-01-01T00:00:00+00:00"))
    compared, notes = verified(export)
    assert compared == [("vllm", str(parent))]
    assert "was made again with the same content" in notes


def test_a_trained_artifact_is_not_compared_with_its_base_model(falqon, llama):
    compared, notes = verified(falqon(llama))
    assert compared == []
    assert "--parents" not in notes
