"""Exact arithmetic: equal to a plain integer reference, in any batch and with any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantized_families import quantized_family
from vit_families import family, random_pixels

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.exact import _FP32_INTEGERS, ExactVit, _sum, inexact_sites
from fp8pipe.numerics.kinds import Kind


def test_results_do_not_depend_on_threads_or_batch():
    """In fp32 they do: sums are then taken in another order."""
    exact, pixels = ExactVit(quantized_family("timm-vit", bits=8)), random_pixels(family("timm-vit"), 5)
    whole = exact(pixels)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(exact(pixels), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([exact(one[None]) for one in pixels]), whole)


@pytest.mark.parametrize("bits", [2, 8])
def test_close_to_the_model_in_fp32(bits):
    """One image of a tiny net: codes may differ near borders, answers by little more than rounding."""
    quantized, pixels = quantized_family("timm-vit", bits=bits), random_pixels(family("timm-vit"), 1)
    with torch.no_grad():
        expected = quantized(pixels)
    torch.testing.assert_close(ExactVit(quantized)(pixels), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("inner", [16, 2048])
def test_sums_are_those_of_integers(inner):
    """Short sums are taken in fp32, long ones in float64: below and above the largest run of fp32 integers."""
    random = np.random.default_rng(0)
    left, right = (random.integers(-127, 128, shape, np.int8) for shape in ((3, inner), (inner, 4)))
    left[0], right[:, 0] = 127, 127  # the largest sum there is
    assert (127 * 127 * inner > _FP32_INTEGERS) == (inner == 2048)
    found = _sum(torch.from_numpy(left), torch.from_numpy(right))
    np.testing.assert_array_equal(found.double().numpy(), (left.astype(np.int64) @ right.astype(np.int64)))


def test_codes_are_told_site_by_site():
    quantized, pixels = quantized_family("timm-vit"), random_pixels(family("timm-vit"), 2)
    seen: dict[str, torch.Tensor] = {}
    ExactVit(quantized)(pixels, on_codes=seen.__setitem__)
    assert set(seen) == set(quantized.activations)
    first = quantized.structure.patch_embed
    assert torch.equal(seen[f"{first}.input"], quantized.activations[f"{first}.input"].codes(pixels))
    for site, codes in seen.items():
        grid = quantized.activations[site]
        assert grid.low <= int(codes.min()) <= int(codes.max()) <= grid.high, site


def test_products_without_an_exact_sum_are_named():
    quantized = quantized_family("timm-vit", bits=8, kind=Kind.E4M3)
    assert len(inexact_sites(quantized)) == len(quantized.structure.linears) + len(quantized.structure.attentions)
    with pytest.raises(ConfigurationError, match=r"no exact result.*patch_embed"):
        ExactVit(quantized)
