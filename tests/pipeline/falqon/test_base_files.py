"""The converted base in files: the bits of a conversion in memory, wherever it was cut; damaged files are refused."""

from __future__ import annotations

import json

import pytest
import torch

from fp8pipe.core import machine
from fp8pipe.core.errors import BadArtifactError, OutOfMemoryError
from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.grids import same_bits
from pipeline.falqon import base_files, convert, forms
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import base_sizes, convert_model, read_convertible
from pipeline.falqon.forms import Fp8Form
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.loss import answer_loss

LAYERS = 4 * 2  # FALQON layers of two decoder layers; here each gets a file of its own


class CutError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture
def run(make_base, monkeypatch):
    """Convert a model from its checkpoint; returns the codes and scales, and what was computed for them."""
    monkeypatch.setattr(base_files, "SHARD_BYTES", 1)
    quantize, sketch = forms.quantize_stacked, convert.gradient_sketches
    path = make_base("llama")

    def run(base=None, rule="live", cut_after=LAYERS):
        computed = []

        def counted(*arguments):
            if len([one for one in computed if one == "codes"]) == cut_after:
                raise CutError
            computed.append("codes")
            return quantize(*arguments)

        def sketched(*arguments):
            computed.append("gradients")
            return sketch(*arguments)

        monkeypatch.setattr(forms, "quantize_stacked", counted)
        monkeypatch.setattr(convert, "gradient_sketches", sketched)
        model = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

        def losses():
            ids = torch.randint(5, 272, (2, 24), generator=torch.Generator().manual_seed(0))
            yield answer_loss(model, {"input_ids": ids}, ids, 50.0)

        how = update_rule(rule).initialisation
        groups, _ = convert_model(model, update_rule(rule), 8, how, 0, base=base, losses=losses)
        return {group.name: (group.layer.codes, group.layer.scale) for group in groups}, computed

    return run


def equal(one, two):
    pairs = (pair for name in one for pair in zip(one[name], two[name], strict=True))
    return one.keys() == two.keys() and all(same_bits(*pair) for pair in pairs)


def test_a_cut_conversion_continues_after_the_last_file_with_the_same_bits(run, tmp_path):
    whole, _ = run()
    for cut_after in (0, 3):
        with pytest.raises(CutError):
            run(BaseFiles(tmp_path, "key"), cut_after=cut_after)
    torn = tmp_path / "base-0004-of-0008.safetensors"
    torn.write_bytes(b"half of a file")  # being written when the process died: it is not recorded
    found, computed = run(BaseFiles(tmp_path, "key"))
    assert equal(found, whole)
    assert computed == ["codes"] * (LAYERS - 3)  # the gradient's directions are in a file, too
    found, computed = run(BaseFiles(tmp_path, "key"))
    assert equal(found, whole)
    assert computed == []


def test_scales_of_the_released_rule_return_from_files(run, tmp_path):
    whole, _ = run(rule="released", cut_after=99)
    run(BaseFiles(tmp_path, "key"), rule="released", cut_after=99)
    found, computed = run(BaseFiles(tmp_path, "key"), rule="released")
    assert equal(found, whole)
    assert computed == []


def test_files_of_another_run_are_not_used(run, tmp_path):
    run(BaseFiles(tmp_path, "key"))
    (tmp_path / "base-0001-of-0002.safetensors").write_bytes(b"of another version")
    _, computed = run(BaseFiles(tmp_path, "another"))
    assert computed == ["gradients"] + ["codes"] * LAYERS
    assert len(list(tmp_path.glob("base*.safetensors"))) == LAYERS


def test_a_damaged_file_is_named_and_converted_again_once_deleted(run, tmp_path):
    whole, _ = run(BaseFiles(tmp_path, "key"))
    file = tmp_path / "base-0002-of-0008.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink()  # the codes above are mapped from it
    file.write_bytes(content)
    with pytest.raises(BadArtifactError, match=file.name) as error:
        run(BaseFiles(tmp_path, "key"))
    assert "delete it" in error.value.fix
    file.unlink()
    found, computed = run(BaseFiles(tmp_path, "key"))
    assert equal(found, whole)
    assert computed == ["codes"]


def test_what_training_changes_does_not_reach_the_files(run, tmp_path):
    found, _ = run(BaseFiles(tmp_path, "key"))
    for codes, _ in found.values():
        codes.view(torch.uint8).fill_(1)
    again, computed = run(BaseFiles(tmp_path, "key"))  # compares each file with its sha256
    assert computed == []
    assert not any(bool((codes.view(torch.uint8) == 1).all()) for codes, _ in again.values())


def test_a_disk_too_small_for_the_files_is_refused_before_anything_is_computed(run, make_base, tmp_path, monkeypatch):
    model = import_transformers().AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=torch.bfloat16)
    rule = update_rule("live")
    sizes, directions = base_sizes(Fp8Form(rule), read_convertible(model, 8), rule, 8, Initialisation.GRADIENT)
    need = sum(sizes.values()) + directions
    monkeypatch.setattr(machine, "free_bytes", lambda path: need - 1)
    with pytest.raises(OutOfMemoryError) as error:
        run(BaseFiles(tmp_path / "files", "key"), cut_after=0)
    assert f"needed {need} bytes, {need - 1} bytes are free" in error.value.why
    monkeypatch.undo()
    monkeypatch.setattr(base_files, "SHARD_BYTES", 1)
    run(BaseFiles(tmp_path / "files", "key"))
    written = sum(file.stat().st_size for file in (tmp_path / "files").glob("*.safetensors"))
    headers = 9 * 400  # bytes, for names and shapes
    assert need < written < need + headers
    record = json.loads((tmp_path / "files" / "base.json").read_text())
    assert len(record["files"]) == LAYERS + 1
