"""Classes and outputs of the whole net: bounds that the reference alone sets, and what is counted."""

from __future__ import annotations

import math

import pytest
import torch
from quantized_families import quantized_family
from vit_families import family, random_pixels

from exporters.graph.classes import ClassAgreement, class_gates, compare_classes, own_agreement

NAME = "hf-vit"


@pytest.fixture(scope="module")
def quantized():
    return quantized_family(NAME)


def agreement(images, agreeing, own, difference=0.01):
    return ClassAgreement(
        images=images, source="pictures", agreeing=agreeing, own=own, difference=difference,
        largest_difference=difference, disagreements=[],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("images", "agreeing", "own", "passes"),
    [
        (500, 498, 1.0, True), (500, 497, 1.0, False), (64, 62, 1.0, True), (64, 61, 1.0, False),
        (500, 475, 0.97, True), (500, 473, 0.97, False),  # three standard errors of a share of 0.97
        (500, 450, 0.93, True), (500, 449, 0.93, False), (500, 449, 0.5, False),  # never below nine of ten
        (500, 338, 0.734, False),  # 67.5 %, three standard errors below what that model keeps
    ],
)  # fmt: skip
def test_the_bound_on_classes_depends_on_the_model_alone_and_has_a_floor(images, agreeing, own, passes):
    found = agreement(images, agreeing, own)
    assert class_gates(found)[1].passed is passes
    assert bool(found.lowered) is (own < 1)


def test_outputs_have_a_bound_of_their_own():
    expected = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.05, 0.0], [5.0, 0.0, 0.0]])
    found = torch.tensor([[1.0, 2.0, 0.0], [1.1, 1.05, 0.0], [5.0, 0.0, 0.0]])
    compared = compare_classes(expected, found, 1.0, "here")
    assert (compared.images, compared.agreeing) == (3, 2)
    assert compared.disagreements[0].margin == pytest.approx(0.05)
    assert [gate.passed for gate in class_gates(compared)] == [True, True]
    assert [gate.passed for gate in class_gates(compare_classes(expected, 2 * found, 1.0, "here"))] == [False, True]
    assert [(tie.image, tie.expected_class, tie.engine_class) for tie in compared.disagreements] == [(1, 1, 0)]
    assert compared.largest_difference == pytest.approx(0.1 / math.hypot(1, 1.05))
    found[2, 0] = float("nan")
    assert not class_gates(compare_classes(expected, found, 1.0, "here"))[0].passed


def test_a_model_that_cannot_decide_between_two_classes_does_not_keep_them():
    undecided = quantized_family(NAME)
    head = undecided.model.get_submodule(undecided.structure.linear_names[-1])
    with torch.no_grad():
        head.weight.zero_()
        if head.bias is not None:
            head.bias.zero_()
            head.bias[:2] = 1
    pixels = random_pixels(family(NAME), 64)
    with torch.no_grad():
        expected = undecided(pixels)
    assert (expected[:, 0] == expected[:, 1]).all()
    assert 0.2 < own_agreement(undecided, pixels, expected) < 0.8  # a coin decides: 64 throws


def test_what_a_model_keeps_is_measured_on_itself(quantized):
    """Nothing of the disturbance is left behind."""
    pixels = random_pixels(family(NAME), 4)
    with torch.no_grad():
        expected = quantized(pixels)
        assert 0.5 <= own_agreement(quantized, pixels, expected) <= 1
        assert torch.equal(quantized(pixels), expected)


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_outputs_without_ranks_are_compared_as_outputs(activation):
    """Of one output the largest is always the same: an engine that knows no image must not pass."""
    expected = torch.linspace(9, 11, 8)[:, None]
    for found, passes in (
        (expected + 0.1, True),
        (torch.full_like(expected, 10.0), False),
        (expected * torch.nan, False),
    ):
        compared = compare_classes(expected, found, 1.0, "here", activation)
        assert not compared.ranked
        gate = class_gates(compared)[1]
        assert (gate.name, gate.passed) == ("agreement of outputs", passes)
    assert compared.disagreements[0].expected_class is None


def test_classes_that_are_not_finite_agree_with_nothing():
    expected = torch.full((4, 3), torch.nan)
    assert compare_classes(expected, expected.clone(), 1.0, "here").agreeing == 0
