"""Compensated weights of a model: what they gain, and which there are."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, random_pixels, vision_family

from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.quantizers import WeightCodes
from pipeline.vit.initialise import choose_step, compensate, compensate_model, second_moments
from pipeline.vit.student import WeightFormat


def problem(seed: int = 0, rows: int = 6, columns: int = 90) -> tuple:
    """A weight, its steps, and inputs whose channels are correlated and of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 2, columns)
    inputs = torch.randn(400, columns, generator=generator) @ mixing
    return weight, choose_step(weight, WeightFormat(4)), inputs


@pytest.mark.parametrize("seed", range(3))
def test_the_output_error_is_much_smaller_than_nearest_rounding_makes_it(seed):
    weight, step, inputs = problem(seed)
    better = compensate(weight, step, 4, inputs.T @ inputs / len(inputs))

    def error(latent):
        return float((inputs @ (WeightCodes.of(latent, step, 4).dequantize() - weight).T).square().mean())

    assert error(better) < 0.5 * error(weight)


def test_moments_of_a_model_are_those_of_its_inputs():
    vision = vision_family(family("hf-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    pixels, seen = random_pixels(family("hf-vit"), 4), []
    group = structure.linears[1].input_group
    handle = vision.model.get_submodule(group).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    found = second_moments(vision, structure, {}, pixels.split(2))
    handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(found[group], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert set(found) == {s.input_group for s in structure.linears if s.kind == "linear"}


def test_linears_of_eight_bits_are_left_alone():
    vision = vision_family(family("timm-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    moments = second_moments(vision, structure, {}, [random_pixels(family("timm-vit"), 4)])
    formats = {s.name: WeightFormat(8 if s.name == "head" else 4) for s in structure.linears}
    weights = {s.name: vision.model.get_submodule(s.name).get_parameter("weight").clone() for s in structure.linears}
    steps = {name: choose_step(weight, formats[name]) for name, weight in weights.items()}
    assert compensate_model(vision.model, structure, formats, steps, moments) == 8
    changed = {
        n for n, w in weights.items() if not torch.equal(w, vision.model.get_submodule(n).get_parameter("weight"))
    }
    assert changed == {s.name for s in structure.linears if s.kind == "linear"} - {"head"}
