"""An FP8 key/value cache in a validation: its scales in the files, in a real engine, and in the torch model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifact_tree import rehash
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_model, write_plain
from trained_exports import checked, write_trained

from exporters.vllm.export import export_vllm
from exporters.vllm.form import ServingForm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.artifact.gate import none_of
from fp8pipe.artifact.kinds import KvAmax, KvCacheFacts
from fp8pipe.models.language.kv_cache import observe_ranges
from validation.vllm import comparison
from validation.vllm.kv_cache import NO_SCALES, cache_scales, without_fp8_cache
from validation.vllm.readback import _cache_scale

FIRST, SECOND = (f"model.layers.{layer}.self_attn" for layer in (0, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A falqon artifact with the ranges of its own keys and values."""
    root, model = tmp_path_factory.mktemp("kv"), make_model()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight.data *= 64  # so that values matter for the result
    ids = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    ranges = observe_ranges(model, [({"input_ids": ids}, (64,))])
    amax = {name: KvAmax(layer=seen.layer, k=seen.k, v=seen.v) for name, seen in ranges.items()}
    facts = KvCacheFacts(records=1, tokens=64, amax=amax, heldout_tokens=1, loss=1.0, fp8_loss=1.0)
    return write_trained(root / "trained", write_plain(root / "plain", model), kv_cache=facts)


def export_with(trained: Path, output: Path, edit: Any = None) -> Path:
    """An export with an FP8 cache, and edited scales under a manifest that agrees with the files' hashes."""
    export = export_vllm(trained, output, VllmExportOptions(kv_cache="fp8")).root
    if edit is not None:
        tensors = load_file(export / "model.safetensors")
        edit(tensors)
        save_file(tensors, export / "model.safetensors", metadata={"format": "pt"})
        rehash(export)
    return export


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{FIRST}.k_scale"], tensors[f"{FIRST}.v_scale"] = tensors[f"{FIRST}.v_scale"], tensors[f"{FIRST}.k_scale"]


EDITS = {
    "doubled": lambda tensors: tensors[f"{FIRST}.k_scale"].mul_(2),
    "missing": lambda tensors: tensors.pop(f"{FIRST}.k_scale"),
    "swapped": _swap,
    "unity": lambda tensors: tensors[f"{FIRST}.k_scale"].fill_(1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_wrong_scale_is_rejected_by_name_and_no_engine_starts(
    trained: Path, tmp_path: Path, edit: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_with(trained, tmp_path / "x", EDITS[edit])
    monkeypatch.setattr(comparison, "run_probe", None)
    record = checked(export, against=trained)
    assert record.verdict == "REJECT"
    assert any(f"{FIRST}.k_scale" in reason for reason in record.reasons), record.reasons


@pytest.mark.vllm
@pytest.mark.usefixtures("forked_engines")
def test_the_engine_rounds_keys_and_values_by_the_scales_that_are_read_back_from_it(
    trained: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the scale rounds nearly as well, so that only the comparison of scales can tell."""

    def doubled(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{SECOND}.v_scale"].mul_(2)

    export = export_with(trained, tmp_path / "x", doubled)
    # Else the files alone would tell.
    monkeypatch.setattr(comparison, "file_gates", lambda plan, root: [])
    monkeypatch.setattr(comparison, "contents_gate", lambda artifact, parent: (none_of("statements", 0), []))
    form = ServingForm(dtype="float32")  # nothing but the cache rounds
    record = checked(export, against=trained, vllm_python=str(python), form=form)
    assert record.verdict == "REJECT"
    wrong = [f"{SECOND}.v_scale"]
    assert record.weights is not None
    assert record.served is not None
    assert (record.weights.different, record.served.weights.different) == (wrong, wrong)
    assert len(record.reasons) == 2, record.reasons  # both engines; everything else is accepted
    assert "key/value cache in fp8" in record.served.form
    # The torch model rounds as the engine does: they are far closer to each other than to the model that does not.
    assert record.served.form_kl < record.served.engine_kl / 100


def test_the_engine_that_rounds_nothing_is_told_to_ignore_the_declared_cache(trained: Path, tmp_path: Path) -> None:
    export = export_with(trained, tmp_path / "x")
    option, value = without_fp8_cache(export)
    block = json.loads((export / "config.json").read_text())["quantization_config"]
    assert option == "--hf-overrides"
    assert block.pop("kv_cache_scheme")
    assert json.loads(value) == {"quantization_config": block}
    assert without_fp8_cache(export_vllm(trained, tmp_path / "plain", VllmExportOptions()).root) == []


def test_the_form_names_a_declared_cache_and_leaves_another_choice_alone(trained: Path, tmp_path: Path) -> None:
    export = export_with(trained, tmp_path / "x")
    for asked, expected in ((None, "fp8"), ("auto", "fp8"), ("bfloat16", "bfloat16")):
        form = ServingForm(kv_cache_dtype=asked).with_defaults(export, on_cpu=True)
        assert form.kv_cache_dtype == expected
        assert form.rounds_cache is (expected == "fp8")
        assert (cache_scales(form, {}) is None) is (expected != "fp8")


def test_an_fp8_cache_without_scales_is_said_to_be_unproved(tree: Path, engine: Any) -> None:
    record = checked(tree / "copied", form=ServingForm(kv_cache_dtype="fp8"), against=tree / "trained")
    assert NO_SCALES in record.not_proved


def test_a_scale_that_attention_and_its_kernels_see_differently_is_missing() -> None:
    layer = SimpleNamespace(_k_scale=torch.tensor([0.5]), _k_scale_float=0.5)
    found, how = _cache_scale(layer, "k_scale")
    assert (found.tolist(), how) == ([0.5], "stored")
    layer._k_scale_float = 1.0
    assert _cache_scale(layer, "k_scale") == (None, "")
