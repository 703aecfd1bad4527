"""The torch side of a validation reads its model a part at a time, in every form: the same bits as from the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import FORMATS, make_model, write_fp8
from torch import Tensor

from fp8pipe.models.language.parts import StoredWeights
from fp8pipe.models.language.structure import build_model
from validation.vllm.reference import Reference, Text, gaps

FORM = next(form for form in FORMATS if form.name == "ct-channel-dynamic")
TEXTS = [Text([5, 9, 33, 2, 77]), Text(range(40, 60), start=16)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    root = tmp_path_factory.mktemp("reference") / "model"
    return root, write_fp8(root, make_model(), FORM)


def references(root: Path, exact: dict[str, Tensor]) -> list[Reference]:
    """Layer by layer, and whole."""
    stored = StoredWeights({name: tuple(value.shape) for name, value in exact.items()}, exact.__getitem__)
    return [Reference(root, stored, part_bytes) for part_bytes in (1, 1 << 60)]


def test_in_fp32_it_is_the_model_of_transformers(checkpoint: tuple[Path, dict[str, Tensor]]) -> None:
    model = build_model(checkpoint[0], checkpoint[1], torch.float32)
    for reference in references(*checkpoint):
        for text, found in zip(TEXTS, reference.logprobs(TEXTS), strict=True):
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([list(text.ids)])).logits[0]
            assert torch.equal(found, torch.log_softmax(logits, -1)[text.start :])


@pytest.mark.parametrize("form", ["plain", "rounded", "wide"])
def test_a_form_is_taken_by_every_part(checkpoint: tuple[Path, dict[str, Tensor]], form: str) -> None:
    found = []
    for reference in references(*checkpoint):
        exact = reference.logprobs(TEXTS)
        names = [name for name, _ in reference.model.named_modules() if name.endswith("_proj")]
        reference.take_form(torch.bfloat16, names if form != "plain" else (), names if form == "wide" else ())
        found.append(reference.logprobs(TEXTS))
        assert not any(torch.equal(one, other) for one, other in zip(exact, found[-1], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_an_answer_is_as_far_behind_as_its_tokens_are() -> None:
    table = torch.log_softmax(torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [9.0, 9.0, 9.0]]), -1)
    assert gaps(table, [0, 2]) == pytest.approx([0.0, 2.0])
    assert gaps(table[:1], []) == []
