"""The torch model of a validation, read a part at a time: the same bits as from the whole one, however it rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from held_weights import held_weights
from language_models import ARCHITECTURES, write
from tiny_checkpoints import FORMATS, make_model, write_fp8
from torch import Tensor

from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import load_torch_model
from fp8pipe.models.language.structure import build_model
from fp8pipe.models.language.unstacking import unstack_experts
from validation.vllm.expected import ExpectedWeights, plan_of
from validation.vllm.reference import Reference, Text, gaps

FORM = next(form for form in FORMATS if form.name == "ct-channel-dynamic")
TEXTS = [Text.of([5, 9, 33, 2, 77]), Text.of(range(40, 60), start=16)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    root = tmp_path_factory.mktemp("reference") / "model"
    return root, write_fp8(root, make_model(), FORM)


def references(root: Path, exact: dict[str, Tensor]) -> list[Reference]:
    """In parts of a module each, and whole."""
    return [Reference(root, held_weights(exact), part_bytes) for part_bytes in (1, 1 << 60)]


def test_in_fp32_it_is_the_model_of_transformers(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    model = build_model(checkpoint[0], checkpoint[1], torch.float32)
    for reference in references(*checkpoint):
        for text, found in zip(TEXTS, reference.logprobs(TEXTS), strict=True):
            with torch.inference_mode():
                logits = model(**text.inputs).logits[0]
            assert torch.equal(found, torch.log_softmax(logits, -1)[text.start :])


def test_in_bf16_it_is_the_model_of_transformers(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    model = build_model(*checkpoint, torch.bfloat16)
    for reference in references(*checkpoint):
        reference.take_form(torch.bfloat16)
        with torch.inference_mode():
            logits = model(**TEXTS[0].inputs).logits[0]
        assert torch.equal(reference.logprobs(TEXTS)[0], torch.log_softmax(logits.float(), -1))


@pytest.mark.parametrize("form", ["rounded", "wide"])
def test_a_form_is_taken_by_every_part(checkpoint: tuple[Path, dict[str, Tensor]], form: str) -> None:
    found = []
    for reference in references(*checkpoint):
        exact = reference.logprobs(TEXTS)
        names = [name for name, _ in reference.model.named_modules() if name.endswith("_proj")]
        reference.take_form(torch.bfloat16, names, names if form == "wide" else ())
        found.append(reference.logprobs(TEXTS))
        assert not any(torch.equal(one, other) for one, other in zip(exact, found[-1], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("family", "against"), [("gpt_oss", True), ("gpt_oss", False), ("llama4", True)])
def test_experts_that_an_export_holds_stacked_are_read_one_by_one(tmp_path: Path, family: str, against: bool) -> None:
    base = write(ARCHITECTURES[family], tmp_path / "base")
    export = export_vllm(base, tmp_path / "export", VllmExportOptions(format=ExportFormat.BF16))
    expected = ExpectedWeights(export, plan_of(export, base) if against else None)
    stack = f"model.layers.1.{'feed_forward' if family == 'llama4' else 'mlp'}.experts"
    assert f"{stack}.down_proj" in expected.names
    ends = ["weight"] if family == "llama4" else ["weight", "bias"]
    assert {f"{stack}.3.down_proj.{end}" for end in ends} <= expected.stored.headers.keys()
    model = load_torch_model(export.root, torch.float32)
    unstack_experts(model)
    with torch.inference_mode():
        logits = model(**TEXTS[0].inputs).logits[0]
    (found,) = Reference(export.root, expected.stored, part_bytes=1).logprobs(TEXTS[:1])
    assert torch.equal(found, torch.log_softmax(logits, -1))


def test_an_answer_is_as_far_behind_as_its_tokens_are() -> None:
    table = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [9.0, 9.0, 9.0]]), -1)
    assert gaps(table, [0, 2]) == pytest.approx([0.0, 2.0])
    assert gaps(table[:1], []) == []
