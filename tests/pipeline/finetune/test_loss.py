"""The answer loss against torch's own cross-entropy; padding, packing and selection must not move it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.models.compat import import_transformers
from pipeline.finetune import loss as loss_module
from pipeline.finetune.loss import IGNORED, _SummedCrossEntropy, answer_count, answer_loss


@pytest.fixture
def model(make_base):
    return import_transformers().AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=torch.float32)


def batch(seed=0, rows=3, length=20):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 272, (rows, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(rows, length, generator=generator) < 0.6] = IGNORED
    return {"input_ids": ids}, labels


def reference(model, inputs, labels):
    logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum"
    )


def test_loss_and_gradient_equal_torchs(model):
    inputs, labels = batch()
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = reference(model, inputs, labels) / 7.0
    (wanted,) = torch.autograd.grad(expected, weight)
    got = answer_loss(model, inputs, labels, 7.0)
    (grad,) = torch.autograd.grad(got, weight)
    # fp32 softmax against fp64: a few units of 2^-24 over sums of some 30 tokens.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_extra_padding_leaves_the_loss_unchanged(model):
    inputs, labels = batch()
    plain = answer_loss(model, inputs, labels)
    padded = torch.nn.functional.pad(inputs["input_ids"], (0, 12))
    extra = answer_loss(model, {"input_ids": padded}, torch.nn.functional.pad(labels, (0, 12), value=IGNORED))
    torch.testing.assert_close(extra, plain, rtol=1e-6, atol=0)  # the same sums in differently shaped GEMMs
    assert answer_count(torch.nn.functional.pad(labels, (0, 12), value=IGNORED)) == answer_count(labels)


def test_the_first_token_has_no_predictor_and_counts_nothing():
    labels = torch.tensor([[5, IGNORED, 6], [7, 8, IGNORED]])
    assert answer_count(labels) == 2


def test_the_head_is_restored_after_an_error(model):
    inputs, labels = batch()
    before = model(**inputs, use_cache=False).logits.shape
    with pytest.raises(ValueError, match="input_ids"):
        answer_loss(model, {"input_ids": None}, labels)
    assert model(**inputs, use_cache=False).logits.shape == before


@given(st.integers(0, 10_000), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_chunks_do_not_change_loss_or_gradient(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, 33, generator=generator)).requires_grad_()
    targets = torch.randint(0, 33, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < 0.3] = IGNORED
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    (wanted,) = torch.autograd.grad(expected, logits) if rows else (None,)
    saved, loss_module._CHUNK_VALUES = loss_module._CHUNK_VALUES, 33 * 4
    try:
        got = _SummedCrossEntropy.apply(logits, targets, 1.0)
        (grad,) = torch.autograd.grad(got, logits)
    finally:
        loss_module._CHUNK_VALUES = saved
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
