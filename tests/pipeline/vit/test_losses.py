"""What the student is taught: closed forms of both losses."""

from __future__ import annotations

import pytest
import torch

from pipeline.vit.distill import block_names
from pipeline.vit.losses import block_distance, distillation, feature_distance, head_structure


def _maps(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 401, 8, generator=torch.Generator().manual_seed(seed))


def test_equal_and_shifted_maps_cost_nothing():
    maps = _maps()
    assert float(head_structure(maps, maps, 1)) == pytest.approx(0.0, abs=1e-6)
    assert float(head_structure(maps + 3.0, maps, 1)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(2.0, 0.2), (-1.0, 2.0), (0.0, 1.0)])
def test_scaled_maps_cost_what_the_formula_says(factor, expected):
    """(2 f v) / ((1 + f^2) v): 0.8 for double, -1 for negated, 0 for nothing; C2 changes the third digit."""
    assert float(head_structure(_maps() * factor, _maps(), 1)) == pytest.approx(expected, abs=2e-3)


def test_independent_maps_cost_about_one():
    assert float(head_structure(_maps(0), _maps(1), 1)) == pytest.approx(1.0, abs=0.02)


def test_prefix_tokens_are_ignored_and_the_teacher_gets_no_gradient():
    student, teacher = _maps(0).requires_grad_(), _maps(1).requires_grad_()
    changed = student.detach().clone()
    changed[:, :, :2] = 50.0
    assert torch.equal(head_structure(changed, teacher, 2), head_structure(student, teacher, 2).detach())
    head_structure(student, teacher, 2).backward()
    assert teacher.grad is None
    assert not student.grad[:, :, :2].any()


def test_flat_maps_stay_finite():
    flat = torch.zeros(1, 2, 9, 4, requires_grad=True)
    head_structure(flat, torch.zeros(1, 2, 9, 4), 0).backward()
    assert torch.isfinite(flat.grad).all()


def test_equal_answers_cost_nothing_and_others_what_kl_says():
    teacher, student = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0]])
    assert float(distillation(teacher, teacher, 5.0)) == pytest.approx(0.0, abs=1e-6)
    p, q = torch.softmax(teacher / 5, 1).double(), torch.softmax(student / 5, 1).double()
    assert float(distillation(student, teacher, 5.0)) == pytest.approx(25 * float((p * (p / q).log()).sum()), rel=1e-4)


def test_features_are_compared_by_direction():
    a = torch.tensor([[3.0, 4.0]])
    assert float(feature_distance(a * 7, a)) == pytest.approx(0.0, abs=1e-6)
    assert float(feature_distance(-a, a)) == pytest.approx(2.0)


def test_a_block_is_compared_relative_to_the_variance_of_its_teacher():
    teacher = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert float(block_distance(teacher, teacher)) == 0
    assert float(block_distance(teacher.mean((0, 1)).expand(3, 5, 4), teacher)) == pytest.approx(1.0)
    variance = teacher.double().flatten(0, 1).var(0, correction=0).sum()
    assert float(block_distance(teacher + 0.5, teacher)) == pytest.approx(float(4 * 0.25 / variance), rel=1e-5)


def test_blocks_are_the_innermost_numbered_modules():
    names = ["layers.0.blocks.1.attn", "layers.0.blocks.1.cross", "blocks.2.attn", "pool.attention"]
    assert block_names(names) == ("layers.0.blocks.1", "blocks.2")
