"""The last flush: compensated rounding beats nearest where it counts, and leaves alone what needs no change."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics.grids import E4M3
from pipeline.falqon import final_merge as settle_module
from pipeline.falqon.convert import convert_model
from pipeline.falqon.final_merge import compensated_round, settle
from pipeline.falqon.rules import FinalMerge, Initialisation, update_rule


def correlated_inputs(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(width // 4, width, generator=generator)
    return torch.randn(tokens, width // 4, generator=generator) @ factors + 0.1 * torch.randn(
        tokens, width, generator=generator
    )


def plain_compensated_round(target, moments):
    """The same solver as its paper states it: one column at a time, the inverse updated explicitly, fp64."""
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    h = moments[order][:, order].double().clone()
    h.diagonal().add_(0.001 * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    work = target[:, order].double().clone()
    codes = torch.zeros_like(work)
    for i in range(work.shape[1]):
        codes[:, i] = E4M3.cast(work[:, i].float()).double()
        error = (work[:, i] - codes[:, i]) / inverse[i, i]
        work -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def test_compensated_rounding_equals_the_plain_solver():
    x = correlated_inputs(400, 48)
    target = 60 * torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    got = compensated_round(target, x.t() @ x).float()
    # fp32 blocks against fp64 columns: a value on a rounding boundary may go the other way and move its successors.
    assert (got.double() != plain_compensated_round(target, x.t() @ x)).float().mean() < 0.02


def test_blocks_do_not_change_the_result(monkeypatch):
    x = correlated_inputs(400, 48)
    target = 60 * torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    whole = compensated_round(target, x.t() @ x).float()
    monkeypatch.setattr(settle_module, "_BLOCK", 16)
    assert (compensated_round(target, x.t() @ x).float() != whole).float().mean() < 0.02


def test_compensated_rounding_halves_the_output_error_of_nearest():
    x = correlated_inputs(800, 64)
    target = 60 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    fresh = correlated_inputs(800, 64, seed=0)[400:]
    error = lambda codes: ((codes.float() - target) @ fresh.t()).square().sum()  # noqa: E731
    assert error(compensated_round(target, x[:400].t() @ x[:400])) < 0.5 * error(E4M3.cast(target))


def test_a_target_on_the_grid_keeps_every_code():
    codes = E4M3.cast(100 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    x = correlated_inputs(100, 32)
    assert torch.equal(compensated_round(codes.float(), x.t() @ x).view(torch.uint8), codes.view(torch.uint8))


def test_inputs_that_never_vary_do_not_break_the_solver():
    target = 60 * torch.randn(8, 16)
    moments = torch.zeros(16, 16)
    assert torch.isfinite(compensated_round(target, moments).float()).all()
    moments[0, 0] = 1e6  # one column alone was ever non-zero
    assert torch.isfinite(compensated_round(target, moments).float()).all()


@pytest.fixture
def tuned(make_base):
    """A converted tiny model with a sizeable B, and inputs for it."""
    path = make_base("llama")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    groups, _ = convert_model(model, update_rule("live"), rank=8, initialisation=Initialisation.RANDOMIZED_SVD, seed=0)
    torch.manual_seed(0)
    for group in groups:
        group.layer.lora_B.data.normal_(0, 0.02)
    batches = [{"input_ids": torch.randint(0, 272, (2, 32))} for _ in range(4)]
    return model, {g.name: g.layer for g in groups}, batches


def test_settling_leaves_the_function_nearly_alone_and_clears_b(tuned):
    model, layers, batches = tuned
    state = {name: (layer.codes.clone(), layer.lora_B.data.clone()) for name, layer in layers.items()}
    with torch.no_grad():
        before = model(**batches[0], use_cache=False).logits
    drift = {}
    for how in FinalMerge:
        for name, layer in layers.items():
            layer.codes.copy_(state[name][0])
            layer.lora_B.data.copy_(state[name][1])
        reports = settle(model, layers, how, lambda: batches)
        assert not any(layer.lora_B.any() for layer in layers.values())
        assert {name: report.codes for name, report in reports.items()} == {
            name: layer.weight_codes.numel() for name, layer in layers.items()
        }
        changed = {
            name: int((layer.codes.float() != state[name][0].float())[: layer.out_features].sum())
            for name, layer in layers.items()
        }
        assert {name: report.changed for name, report in reports.items()} == changed
        with torch.no_grad():
            drift[how] = (model(**batches[0], use_cache=False).logits - before).float().norm()
    assert drift[FinalMerge.COMPENSATED] < drift[FinalMerge.NEAREST]


def test_a_small_memory_budget_gives_the_same_codes_up_to_order_of_settling(tuned, monkeypatch):
    model, layers, batches = tuned
    monkeypatch.setattr(settle_module, "_MOMENT_BYTES", 1)  # one layer at a time
    passes = []
    reports = settle(model, layers, FinalMerge.COMPENSATED, lambda: passes.append(1) or batches)
    assert len(passes) == len(layers)
    assert [report.rows for report in reports.values()] == [layer.out_features for layer in layers.values()]
