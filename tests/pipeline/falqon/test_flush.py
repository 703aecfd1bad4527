"""The flush: k rows, in place, equal to dequantize-add-requantize; what it reports; its variants."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.final_merge import held_moments
from pipeline.falqon.flush import (
    FlushReport,
    flush_report,
    flush_rows,
    preview,
    select_rows,
    stochastic_round,
    target_rows,
)
from pipeline.falqon.rules import RULES, update_rule


def brute_force(layer, rows):
    """Dequantize everything, add the whole update of the rows, requantize with the same scale."""
    w = layer.weight_codes.float() * layer.scale
    a = layer.adapter_codes.float() * layer.scale
    b = torch.zeros_like(layer.lora_B)
    b[rows] = layer.lora_B.data[rows]
    return layer.code_scale.quantize(w + b @ a, E4M3)


@pytest.mark.parametrize("measure", [True, False], ids=["in torch, measured", "compiled"])
@pytest.mark.parametrize("k", [0, 1, 7, 48, 100])
def test_flush_equals_dequantize_add_requantize_bit_for_bit(k, measure, make_layer):
    layer = make_layer(live=False, rank=16)
    layer.lora_B.data *= 20  # large enough that many codes change
    rows = select_rows(layer, k)
    expected = brute_force(layer, rows)
    before = layer.codes.clone()
    place = layer.codes.data_ptr()
    report = flush_rows(layer, rows, update_rule("accumulate"), measure=measure)
    assert layer.codes.data_ptr() == place
    assert torch.equal(layer.weight_codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(layer.adapter_codes.view(torch.uint8), before[48:].view(torch.uint8))
    changed = (layer.codes.view(torch.uint8) != before.view(torch.uint8)).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(rows.tolist())
    assert report.rows == (min(k, 48) if measure else 0)
    assert not layer.lora_B.data[rows].any()


def test_rows_are_the_largest_and_ties_go_to_the_lowest_index(make_layer):
    layer = make_layer()
    layer.lora_B.data.zero_()
    layer.lora_B.data[5] = 2.0
    layer.lora_B.data[[3, 9, 20]] = 1.0
    assert select_rows(layer, 3).tolist() == [3, 5, 9]


@pytest.mark.parametrize("seed", range(6))
def test_selection_is_that_of_a_plain_sort_whatever_ties_there_are(seed, make_layer):
    layer = make_layer()
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values: nearly every boundary is a tie.
    layer.lora_B.data[:] = torch.randint(0, 4, (48, 1), generator=generator).float()
    norms = layer.lora_B.data.abs().sum(1).tolist()
    ranked = sorted(range(48), key=lambda row: (-norms[row], row))
    for count in (0, 1, 5, 17, 47, 48, 60):
        assert select_rows(layer, count).tolist() == sorted(ranked[:count])


@pytest.mark.parametrize("seed", range(4))
def test_ties_of_the_released_rule_fall_as_in_the_published_code(seed, make_layer):
    """Which does `torch.topk(B.abs().sum(-1), k=rank)`, whose choice among equals is no order of indices."""
    layer = make_layer(out=96, rank=16, live=False, rule=update_rule("released").scale)
    generator = torch.Generator().manual_seed(seed)
    # As after AdamW's first step: every entry is the learning rate, but for its sign and a last bit here and there.
    signs = torch.randint(0, 2, (96, 16), generator=generator).float() * 2 - 1
    layer.lora_B.data = 0.05 * signs
    layer.lora_B.data[torch.randperm(96, generator=generator)[:8]] *= 1 + 1e-6
    published = torch.topk(torch.abs(layer.lora_B.data).sum(dim=-1), k=16).indices
    lowest = sorted(range(96), key=lambda row: (-float(layer.lora_B.data[row].abs().sum()), row))[:16]
    chosen = select_rows(layer, 16).tolist()
    assert chosen == sorted(published.tolist())
    assert chosen != sorted(lowest)


def test_only_layers_of_the_published_scale_take_the_published_ties():
    assert [name for name, rule in RULES.items() if rule.scale is ScaleRule.EXACT] == ["released"]


@pytest.mark.parametrize("name", RULES)
def test_what_a_flush_clears(name, make_layer):
    layer, rule = make_layer(live=False), RULES[name]
    rows = select_rows(layer, 4)
    others = [i for i in range(48) if i not in rows.tolist()]
    kept = layer.lora_B.data[others].clone()
    flush_rows(layer, rows, rule, torch.Generator().manual_seed(0))
    if rule.clear_all:
        assert not layer.lora_B.any()
    else:
        assert torch.equal(layer.lora_B.data[others], kept)
        assert rule.error_feedback or not layer.lora_B.data[rows].any()


def test_error_feedback_keeps_the_part_of_the_refused_update_that_a_can_express(make_layer):
    layer = make_layer(live=False, rank=16)
    rows = torch.arange(48)
    target = target_rows(layer, rows)
    flush_rows(layer, rows, update_rule("accumulate-feedback"))
    refused = target - layer.weight_codes.float()
    a = layer.adapter_codes.float().double()
    projection = refused.double() @ torch.linalg.pinv(a) @ a
    # fp32 least squares against fp64: the relative error is the condition number of A A^T (about 10) times 2^-24.
    torch.testing.assert_close((layer.lora_B.data.double() @ a), projection, rtol=1e-3, atol=1e-3)


def test_targets_beyond_the_grid_saturate_and_are_counted(make_layer):
    layer = make_layer(live=False)
    layer.lora_B.data.fill_(1e4)
    report = flush_rows(layer, torch.arange(48), update_rule("accumulate"), measure=True)
    assert not layer.codes.float().isnan().any()
    assert report.saturated > 0
    assert layer.weight_codes.float().abs().max() == 448


def test_report_counts_what_changed(make_layer):
    layer = make_layer(live=False)
    before = layer.weight_codes.float().clone()
    report = flush_rows(layer, torch.arange(48), update_rule("accumulate"), measure=True)
    assert report.changed == int((layer.weight_codes.float() != before).sum())
    assert report.codes == 48 * 32
    health = report.health()
    assert 0 < health["changed"] < 1
    assert -1 <= health["cosine"] <= 1


def test_preview_changes_nothing_and_agrees_with_the_flush(make_layer):
    layer = make_layer(live=False)
    codes, b = layer.codes.clone(), layer.lora_B.data.clone()
    predicted = preview(layer)
    assert torch.equal(codes.view(torch.uint8), layer.codes.view(torch.uint8))
    assert torch.equal(b, layer.lora_B.data)
    assert dataclasses.asdict(predicted) == dataclasses.asdict(
        flush_rows(layer, torch.arange(48), update_rule("accumulate"), measure=True)
    )


def test_stochastic_rounding_is_unbiased_and_stays_on_neighbours():
    values = torch.tensor([0.3, 1.01, -17.2, 447.0, 0.0005, -0.0011, 0.0, 416.0, 500.0])
    generator = torch.Generator().manual_seed(0)
    draws = 20000
    total = torch.zeros_like(values)
    neighbours = [set() for _ in values]
    for _ in range(draws):
        codes = stochastic_round(values, generator).float()
        total += codes
        for seen, code in zip(neighbours, codes.tolist(), strict=True):
            seen.add(code)
    clamped = values.clamp(-448, 448)
    gaps = torch.tensor([max(seen) - min(seen) for seen in neighbours])
    # The mean of `draws` Bernoulli draws over a gap has a standard error of at most gap / (2 sqrt(draws)).
    assert ((total / draws - clamped).abs() <= 4 * gaps / (2 * draws**0.5) + 1e-3 * clamped.abs()).all()
    assert all(len(seen) <= 2 for seen in neighbours)
    assert neighbours[6] == {0.0}
    assert neighbours[7] == {416.0}


def test_the_report_compares_what_was_meant_with_what_was_done():
    old, target = torch.tensor([[1.0, 2.0], [4.0, 500.0]]), torch.tensor([[1.5, 2.0], [3.0, 501.0]])
    new = torch.tensor([[2.0, 2.0], [4.0, 448.0]])
    report = flush_report(old, target, new)
    assert (report.rows, report.codes, report.changed, report.saturated) == (2, 4, 2, 1)
    assert (report.intended_square, report.applied_square) == (0.25 + 1 + 1, 1 + 52.0**2)
    assert report.inner == 0.5 - 52


def test_health_is_in_fractions_and_ratios():
    report = FlushReport(rows=2, codes=8, changed=2, saturated=1, intended_square=4.0, applied_square=9.0, inner=3.0)
    assert report.health() == {"changed": 0.25, "saturated": 0.125, "norm_ratio": 1.5, "cosine": 0.5}
    assert set(FlushReport().health().values()) == {0.0}


def test_second_moments_take_the_bytes_of_the_widest_group():
    assert held_moments([]) == 0
    assert held_moments([3, 5]) == 4 * (3**2 + 5**2)
