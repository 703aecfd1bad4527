"""Compensated weights of a model: what they gain, and which there are."""

from __future__ import annotations

import pytest
import torch
from vit_families import family, random_pixels, vision_family

from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes
from pipeline.vit.initialise import choose_step
from pipeline.vit.rounding import InputMoments, compensate, compensate_model, input_moments, refit
from pipeline.vit.student import WeightFormat
from pipeline.vit.transforms.wiring import read_wiring


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
    found = input_moments(vision, structure, {}, pixels.split(2))
    vision.model.get_submodule(group).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    vision.model(pixels)
    rows = torch.cat(seen)
    torch.testing.assert_close(found[group].rounded, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert set(found) == {s.input_group for s in structure.linears if s.kind == "linear"}


def test_linears_of_eight_bits_are_left_alone():
    vision = vision_family(family("timm-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    moments = input_moments(vision, structure, {}, [random_pixels(family("timm-vit"), 4)])
    formats = {s.name: WeightFormat(8 if s.name == "head" else 4) for s in structure.linears}
    weights = {s.name: vision.model.get_submodule(s.name).get_parameter("weight").clone() for s in structure.linears}
    steps = {name: choose_step(weight, formats[name]) for name, weight in weights.items()}
    assert compensate_model(vision.model, structure, formats, steps, moments) == 8
    changed = {
        n for n, w in weights.items() if not torch.equal(w, vision.model.get_submodule(n).get_parameter("weight"))
    }
    assert changed == {s.name for s in structure.linears if s.kind == "linear"} - {"head"}


@pytest.mark.parametrize("bias", [True, False])
def test_a_refitted_layer_gives_nearly_the_outputs_of_inputs_that_were_not_rounded(bias):
    """Against least squares on the inputs themselves; the damping of 1 % is why the two are not equal."""
    weight, _, inputs = problem(columns=30)
    inputs = inputs + 0.5 * bias
    rounded = (inputs / 4 - 0.3).round().clamp(0, 3) * 4  # takes something away, on average
    layer = torch.nn.Linear(30, 6, bias=bias).requires_grad_(False)
    layer.weight.copy_(weight)
    wanted, before = layer(inputs), layer(rounded)
    count = len(inputs)
    moments = InputMoments(rounded.T @ rounded / count, inputs.T @ rounded / count, inputs.mean(0), rounded.mean(0))
    refit(layer, moments)
    known = torch.cat([rounded, torch.ones(count, 1)], 1) if bias else rounded
    known, goal = known.double(), wanted.double()
    least = (known @ torch.linalg.lstsq(known, goal, driver="gelsd").solution - goal).square().mean()
    error = (layer(rounded) - wanted).square().mean()
    assert least <= error < 1.05 * least
    assert error < 0.6 * (before - wanted).square().mean()


def test_inputs_that_are_not_rounded_leave_a_layer_as_it_is():
    weight, _, inputs = problem(columns=30)
    layer = torch.nn.Linear(30, 6).requires_grad_(False)
    layer.weight.copy_(weight)
    second, mean = inputs.T @ inputs / len(inputs), inputs.mean(0)
    bias = layer.bias.clone()
    refit(layer, InputMoments(second, second, mean, mean))
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, bias, rtol=0, atol=1e-6)  # two equal products are added and subtracted


def test_the_projection_of_an_attention_sees_rounded_operands():
    """Probabilities that are all rounded to zero leave the projection nothing; other inputs are not rounded here."""
    vision = vision_family(family("timm-vit"))
    structure = read_structure(vision.model, vision.architecture.image_size)
    nothing = ActivationQuantizer(1024.0, 0, 7)
    probs = {f"{site.name}.probs": nothing for site in structure.attentions}
    found = input_moments(vision, structure, probs, [random_pixels(family("timm-vit"), 4)])
    projections = {a.projection for a in read_wiring(vision.model, structure).attentions}
    assert projections <= set(found)
    for group, moments in found.items():
        assert moments.mean.any()
        assert moments.rounded.any() == (group not in projections)
