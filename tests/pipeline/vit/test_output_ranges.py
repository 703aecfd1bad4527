"""Ranges chosen by the error of outputs: what they gain, which sites they concern, and what the error ignores."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, random_pixels, vision_family

from fp8pipe.models.vision.quantized import activation_sites
from fp8pipe.models.vision.structure import read_structure
from pipeline.vit.initialise import choose_range, sample_sites
from pipeline.vit.output_ranges import refine_ranges, relative_error


def test_a_shift_and_a_common_factor_are_no_error():
    wanted = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert relative_error(3 * wanted + torch.arange(4), wanted) == pytest.approx(0, abs=1e-5)  # fp32
    assert relative_error(torch.ones(50, 4), wanted) == 1


def test_the_error_is_that_of_the_best_factor():
    random = torch.Generator().manual_seed(1)
    output, wanted = torch.randn(50, 4, generator=random), torch.randn(50, 4, generator=random)
    output, wanted = output - output.mean(0), wanted - wanted.mean(0)
    factor = torch.linalg.lstsq(output.reshape(-1, 1), wanted.reshape(-1, 1)).solution
    expected = float((factor * output - wanted).square().sum() / wanted.square().sum())
    assert relative_error(output, wanted) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin"])
def test_only_probabilities_and_hidden_activations_of_few_bits_change(name):
    vision, pixels = vision_family(family(name)), random_pixels(family(name), 4)
    structure = read_structure(vision.model, vision.architecture.image_size)
    for attention in structure.attentions:  # sharp attention, as trained models have: most probabilities are tiny
        for parameter in vision.model.get_submodule(attention.name).parameters():
            parameter.data.mul_(20)
    bits = dict.fromkeys(activation_sites(structure), 3)
    samples = sample_sites(vision, structure, [pixels], 0)
    chosen = {site: choose_range(values, 3) for site, values in samples.items()}
    refined = refine_ranges(vision, structure, chosen, bits, pixels)
    changed = {site for site in chosen if refined[site] != chosen[site]}
    probs = {f"{site.name}.probs" for site in structure.attentions}
    assert changed & probs
    assert changed <= probs | {site for site in chosen if "fc2" in site or ".output.dense.input" in site}
    assert refine_ranges(vision, structure, chosen, dict.fromkeys(chosen, 8), pixels) == chosen
