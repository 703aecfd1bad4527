"""The model that an export of a plain model was made from, where it is named: the same, another, or not to be told."""

from __future__ import annotations

import shutil

import pytest
from artifact_tree import rehash

from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.finding import Check
from fp8pipe.artifact.verify import find_tree


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
    assert any("said nothing of tokenizer and chat template: export it again" in note for note in checked.notes)
