"""Models of pictures and text: the decoder is tuned, towers stay byte for byte, and vLLM answers about a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tree import rehash
from breadth import only_long
from held_weights import held_weights
from picture_data import write_colours
from safetensors.torch import load_file, save_file
from tiny_pictures import PICTURED, write_pictured
from torch import Tensor

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.writer import PROCESSOR_FILES, auxiliary_warnings
from fp8pipe.artifact.record import ExportRejectedError
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.language.structure import build_model
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.stage import finetune
from validation.vllm.picture import picture_question
from validation.vllm.record import ValidationRecord
from validation.vllm.reference import Reference, Text, gaps
from validation.vllm.validate import validate_export

CHOSEN = [PICTURED[0], *(pytest.param(name, marks=only_long) for name in PICTURED[1:])]
TOWERS = {"qwen25vl": "visual.", "gemma3_mm": "vision_tower."}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made(NAME)`: a directory with the base model, the tuned one and its export in FP8; each made once."""
    root = tmp_path_factory.mktemp("pictured")
    rows = [{"prompt": f"double {n}", "completion": f"{2 * n}"} for n in range(16)]
    text = write_colours(root, 8)
    text.write_text(text.read_text() + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(name: str) -> Path:
        if not (root / name).exists():
            base = write_pictured(root / name / "base", name)
            settings = {"model": str(base), "data": str(text), "steps": 2, "batch_size": 4, "rank": 4, "device": "cpu"}
            finetune(build_config(FinetuneConfig, settings | {"sequence_length": 64}), root / name / "tuned")
            export_vllm(root / name / "tuned", root / name / "export", VllmExportOptions())
        return root / name

    return make


@pytest.mark.parametrize("name", PICTURED)
def test_the_decoder_is_tuned_and_exported_and_all_else_is_copied(made: Any, name: str) -> None:
    base, tuned, export = (load_file(made(name) / kind / "model.safetensors") for kind in ("base", "tuned", "export"))
    codes = {key for key, value in export.items() if value.dtype == torch.float8_e4m3fn}
    assert len(codes) == 14  # q, k, v, o, gate, up, down of two layers
    assert all(torch.equal(export[key].view(torch.uint8), tuned[key].view(torch.uint8)) for key in codes)
    tower = [key for key in base if key.startswith(TOWERS[name])]
    assert len(tower) > 20
    for key in base.keys() - codes:
        assert export[key].dtype == base[key].dtype, key
        assert torch.equal(export[key].view(torch.uint8), base[key].view(torch.uint8)), key


def test_a_model_of_pictures_without_an_image_processor_is_named_before_vllm_fails_to_start(tmp_path: Path) -> None:
    base = write_pictured(tmp_path / "base", PICTURED[0])
    assert auxiliary_warnings(base) == []
    for name in PROCESSOR_FILES:
        (base / name).unlink(missing_ok=True)
    assert any(PROCESSOR_FILES[0] in warning for warning in auxiliary_warnings(base))
    with pytest.raises(BadArtifactError, match="its image processor cannot be read") as refused:
        picture_question(base)
    assert PROCESSOR_FILES[0] in refused.value.fix


@pytest.mark.parametrize("name", PICTURED)
def test_an_answer_about_a_picture_is_the_models_own(made: Any, name: str) -> None:
    """The oracle is the whole model in transformers: no token that it generates is behind another choice."""
    base = made(name) / "base"
    question = picture_question(base)
    assert question is not None
    state = {key: value.float() for key, value in load_file(base / "model.safetensors").items()}
    whole: Any = build_model(base, state, torch.float32)
    reference = Reference(base, held_weights(state), part_bytes=1)  # towers, too, are in parts
    start = len(question.prompt_ids)
    with torch.inference_mode():
        tokens = whole.generate(**question.inputs, max_new_tokens=6, do_sample=False)[0, start:].tolist()
        logits = whole(**question.answered(tokens)).logits[0]
    assert len(tokens) == 6 or tokens[-1] == 257

    def table(inputs: dict[str, Tensor]) -> Tensor:
        return reference.logprobs([Text.of([70, 71]), Text(inputs, start - 1)])[1]

    found = table(question.answered(tokens))
    assert torch.equal(found, torch.log_softmax(logits, -1)[start - 1 :])
    assert max(gaps(found, tokens)) < 1e-4  # sums of one pass and of several differ
    other = {**question.inputs, "pixel_values": -question.inputs["pixel_values"]}
    changed = type(question)(question.prompt, question.content, other)
    assert not torch.equal(table(changed.answered(tokens)), found)  # the picture counts


def checked(export: Path, source: Path) -> ValidationRecord:
    return validate_export(export, against=source, prompts=["Hello"], max_tokens=4)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_vllm_holds_it_and_answers_about_a_picture(made: Any, name: str) -> None:
    record = checked(made(name) / "export", made(name) / "tuned")
    assert record.verdict == "ACCEPT"
    assert record.weights is not None
    assert record.served is not None
    assert record.weights.tensors == len(load_file(made(name) / "base" / "model.safetensors"))
    for answers in (record.canary, record.served.canary):
        assert answers[-1].prompt.startswith("(a picture)")
        assert answers[-1].agreeing_tokens == answers[-1].tokens == 4


@only_long
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURED)
def test_a_tower_that_was_changed_is_rejected_by_name(made: Any, name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made(name) / "export", tmp_path / "export"))
    found = load_file(copy / "model.safetensors")
    changed = next(key for key in sorted(found) if key.startswith(TOWERS[name]) and found[key].ndim == 2)
    found[changed].view(torch.int16).view(-1)[5] ^= 1
    save_file(found, copy / "model.safetensors", metadata={"format": "pt"})
    rehash(copy)
    with pytest.raises(ExportRejectedError) as caught:
        checked(copy, made(name) / "tuned")
    assert any(changed in reason for reason in caught.value.record.reasons), caught.value.record.reasons
