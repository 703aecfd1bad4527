"""Figures of a validation by themselves: counts of differing elements, and the noise of a form."""

from __future__ import annotations

import pytest
import torch

from validation.vllm.expected import Expected, count_differences
from validation.vllm.reference import served_figures


def test_a_tensor_of_another_shape_differs_wholly() -> None:
    found = torch.zeros(3, 4)
    assert count_differences(Expected("codes", torch.zeros(4, 3), torch.ones(1), False), found) == (12, 12)
    assert count_differences(Expected("floats", torch.zeros(4, 3), None, False), found) == (12, 0)


def test_the_noise_of_a_form_does_not_depend_on_how_much_text_was_read() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.log_softmax(torch.randn(3, 40, generator=generator), -1)
    form = torch.log_softmax(exact + 0.01 * torch.randn(3, 40, generator=generator), -1)
    told = [{str(token): float(value) for token, value in enumerate(row)} for row in form[:-1]]
    once, often = (served_figures([exact] * n, [form] * n, [told] * n) for n in (1, 20))
    assert once["noise_kl"] == pytest.approx(often["noise_kl"])
    assert once["noise_kl"] > 0
