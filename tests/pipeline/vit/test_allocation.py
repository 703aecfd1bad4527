"""Bits by sensitivity: the best allocation where the search can be exhaustive, within the budget always."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from vit_families import NAMES, family, random_pixels, vision_family

from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.kinds import Precision
from pipeline.vit.allocation import allocate_bits, multiplications, spend
from pipeline.vit.initialise import activation_bits, choose_range, sample_sites


@pytest.mark.parametrize("seed", range(5))
def test_of_equal_sites_with_falling_gains_the_cheapest_allocation_is_found(seed):
    random = np.random.default_rng(seed)
    gains = -np.sort(-random.random((4, 3)), axis=1)  # of each further bit, falling: then greedy steps are optimal
    costs = {f"s{i}": {2 + n: float(3 - g[:n].sum()) for n in range(4)} for i, g in enumerate(gains)}
    chosen = spend(costs, dict.fromkeys(costs, 7), 7 * 12)
    total = lambda widths: sum(costs[site][width] for site, width in zip(costs, widths, strict=True))  # noqa: E731
    best = min(total(widths) for widths in product(range(2, 6), repeat=4) if sum(widths) <= 12)
    assert total(chosen.values()) == pytest.approx(best)


def test_large_sites_pay_more_and_a_step_may_be_of_several_bits():
    # One more bit gains nothing for `late`, two gain most; `large` gains as much as `small`, at ten times the price.
    costs = {"late": {2: 9.0, 3: 9.0, 4: 1.0}, "large": {2: 2.0, 3: 1.0}, "small": {2: 2.0, 3: 1.0}}
    sizes = {"late": 1, "large": 10, "small": 1}
    assert spend(costs, sizes, 24 + 3) == {"late": 4, "large": 2, "small": 3}
    assert spend(costs, sizes, 24 + 13) == {"late": 4, "large": 3, "small": 3}
    assert spend({"useless": {2: 1.0, 3: 1.5}}, {"useless": 1}, 100) == {"useless": 2}


@pytest.mark.parametrize("name", NAMES)
def test_multiplications_are_those_of_the_model(name):
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    model = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})
    groups = {linear.name: linear.input_group for linear in structure.linears if linear.kind == "linear"}
    found, taken = multiplications(structure), Counter()
    for layer, tensors in model.taps(random_pixels(family(name), 1)).items():
        if layer in groups:
            taken[f"{groups[layer]}.input"] += tensors["input"].numel() * tensors["output"].shape[-1]
        elif "logits" in tensors:  # a logit is a sum over the width of q, and an output over the keys
            taken[f"{layer}.q"] = taken[f"{layer}.k"] = tensors["logits"].numel() * tensors["q"].shape[-1]
            taken[f"{layer}.probs"] = taken[f"{layer}.v"] = tensors["logits"].numel() * tensors["v"].shape[-1]
    assert taken == {site: found[site] for site in taken}


@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov2"])
def test_the_mean_width_stays_and_the_sum_of_distances_falls(name):
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    pixels = random_pixels(family(name), 8)
    bits = activation_bits(structure, Precision.parse("w3a3"), "8bit")
    samples = sample_sites(vision, structure, pixels.split(4), 0)

    def ranges(widths):
        return {site: choose_range(values, widths[site]) for site, values in samples.items()}

    found = allocate_bits(vision, structure, bits, ranges, pixels)
    few = [site for site, width in bits.items() if width == 3]
    assert {site: found[site] for site in bits if site not in few} == dict.fromkeys(set(bits) - set(few), 8)
    assert {found[site] for site in few} <= {2, 3, 4, 5}
    assert len({found[site] for site in few}) > 1

    taken = multiplications(structure)
    assert sum(taken[site] * found[site] for site in few) <= 3 * sum(taken[site] for site in few)
    model = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})

    def distance(widths):
        total = 0.0
        for site in few:
            model.activations = {}
            exact = model(pixels)
            model.activations = {site: choose_range(samples[site], widths[site])}
            rounded = model(pixels)
            if structure.is_backbone:
                total += float((1 - torch.cosine_similarity(rounded, exact)).mean())
            else:
                total += float((exact.softmax(1) * (exact.log_softmax(1) - rounded.log_softmax(1))).sum(1).mean())
        return total

    with torch.no_grad():
        assert distance(found) < distance(bits)
