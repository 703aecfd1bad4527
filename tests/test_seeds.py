"""Every test draws the same random numbers in every run, whichever tests ran before it, in whichever process."""

from __future__ import annotations

import pytest
import torch


def first_draw(seed: int) -> float:
    return torch.rand((), generator=torch.Generator().manual_seed(seed)).item()


@pytest.fixture(scope="module")
def drawn() -> float:
    return torch.rand(()).item()


@pytest.fixture
def drawn_for_a_test() -> float:
    return torch.rand(()).item()


def test_a_fixture_of_the_module_and_one_of_the_test_are_seeded(drawn: float, drawn_for_a_test: float) -> None:
    assert (drawn, drawn_for_a_test) == (first_draw(1), first_draw(0))


@pytest.mark.parametrize("number", range(2))
def test_each_test_begins_anew(number: int) -> None:
    assert torch.rand(()).item() == first_draw(0)
