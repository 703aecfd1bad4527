"""Transformed models compute what the original computed, in every family, and are easier to round."""

from __future__ import annotations

import copy

import pytest
import torch
from vit_families import NAMES, family, random_pixels, vision_family

from fp8pipe.core.config import build_config
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.structure import read_structure
from pipeline.vit.config import TransformsConfig
from pipeline.vit.transforms.apply import apply_transforms, centre
from pipeline.vit.transforms.rotate import (
    NotRotatable,
    ones_keeping_rotation,
    random_rotation,
    rotate_heads,
    rotate_residual,
)
from pipeline.vit.transforms.wiring import read_wiring

# Streams that end in features, are merged, or begin in a norm keep their basis; all others must be rotated.
KEPT = {
    "timm-vit-qk-norm", "timm-dinov2", "timm-siglip", "timm-swin", "timm-swin-wide", "hf-vit-backbone",
    "hf-dinov2-other-size", "hf-dinov3", "hf-swin", "hf-swin-wide", "hf-clip", "hf-clip-backbone", "hf-siglip",
    "hf-siglip-backbone",
}  # fmt: skip
DEFAULTS = build_config(TransformsConfig, {})


def parts(name: str) -> tuple:
    vision = vision_family(family(name))
    return vision, read_structure(vision.model, vision.architecture.image_size), random_pixels(family(name), 4)


def in_double(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vision_outputs(copy.deepcopy(model).double(), pixels.double())


@pytest.mark.parametrize("name", NAMES)
def test_a_transformed_model_computes_the_same(name):
    vision, structure, pixels = parts(name)
    before = {key: value.clone() for key, value in vision.model.state_dict().items()}
    done = apply_transforms(vision, structure, pixels, DEFAULTS, 0)
    assert all(torch.equal(value, before[key]) for key, value in vision.model.state_dict().items())
    # New images, not those it was measured on. In float64, so that only the weights' fp32 rounding is left:
    # each new weight is off by 2^-24 of itself, a few layers of them add up to far less than 1e-5.
    pixels = random_pixels(family(name), 3, seed=9)
    expected, found = in_double(vision.model, pixels), in_double(done.vision.model, pixels)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    steps = " ".join(done.steps)
    assert ("rotation of the residual stream" in steps) == (name not in KEPT)
    assert "rotation of heads" in steps
    assert "centring" in steps
    assert len(done.steps) + len(done.notes) == 3


def test_rotations_are_orthogonal_and_keep_what_they_must():
    generator = torch.Generator().manual_seed(0)
    for rotation in (random_rotation(24, generator), ones_keeping_rotation(24, generator)):
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-12)
    ones = torch.ones(24, dtype=torch.float64)
    torch.testing.assert_close(rotation @ ones, ones, rtol=0, atol=1e-12)
    assert float(rotation.abs().max()) < 0.95  # it mixes channels


def test_layer_norm_commutes_with_the_rotation():
    rotation = ones_keeping_rotation(16, torch.Generator().manual_seed(3))
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 2
    norm = torch.nn.functional.layer_norm
    torch.testing.assert_close(norm(x @ rotation.T, (16,)), norm(x, (16,)) @ rotation.T, rtol=0, atol=1e-9)


def test_wiring_finds_fused_and_separate_linears():
    vision, structure, _ = parts("timm-vit")
    fused = read_wiring(vision.model, structure).attentions[0]
    assert [(r.linear, r.start, r.width) for r in (fused.q, fused.k, fused.v)] == [
        ("blocks.0.attn.qkv", 0, 32), ("blocks.0.attn.qkv", 32, 32), ("blocks.0.attn.qkv", 64, 32)
    ]  # fmt: skip
    assert fused.projection == "blocks.0.attn.proj"
    vision, structure, _ = parts("hf-vit")
    separate = read_wiring(vision.model, structure).attentions[0]
    assert len({separate.q.linear, separate.k.linear, separate.v.linear}) == 3


def test_normed_and_rotary_queries_are_left_alone():
    for name in ("timm-vit-qk-norm", "timm-eva02-rope"):
        vision, structure, _ = parts(name)
        wiring = read_wiring(vision.model, structure)
        assert all(a.q is None and a.k is None and a.v is not None for a in wiring.attentions)
        assert rotate_heads(vision.model, wiring, torch.Generator().manual_seed(0)) == len(wiring.attentions)


def test_centred_tensors_have_no_mean():
    vision, structure, pixels = parts("timm-deit")
    wiring = read_wiring(vision.model, structure)
    model = copy.deepcopy(vision.model)
    assert centre(model, wiring, pixels.split(2)) == 2 * 2 + 2 * 2  # keys, values; two norms per block
    float_graph = QuantizedVit(model, vision.architecture, vision.preprocessing, structure, {}, {})
    taps = float_graph.taps(pixels)
    for site in structure.attentions:
        for what in ("k", "v"):
            mean = taps[site.name][what].mean((0, 2))
            assert float(mean.abs().max()) < 1e-5 * float(taps[site.name][what].abs().max())
    mean = taps["blocks.1.attn.qkv"]["input"].mean((0, 1))
    assert float(mean.abs().max()) < 1e-5


def test_the_rotation_levels_a_channel_that_stands_out():
    vision, structure, pixels = parts("timm-vit")
    with torch.no_grad():
        vision.model.get_submodule("blocks.1.norm1").get_parameter("weight")[5] = 40.0
        vision.model.get_submodule("blocks.1.attn.qkv").get_parameter("weight")[:, 5] /= 40.0
    levelled = apply_transforms(vision, structure, pixels, DEFAULTS, 0).vision

    def peak(one):
        taps = QuantizedVit(one.model, one.architecture, one.preprocessing, structure, {}, {}).taps(pixels)
        x = taps["blocks.1.attn.qkv"]["input"]
        return float(x.abs().max() / x.std())

    assert peak(levelled) < 0.5 * peak(vision)


def test_what_cannot_be_rotated_is_named():
    vision, structure, pixels = parts("hf-clip")
    with pytest.raises(NotRotatable, match="pre_layrnorm"):
        rotate_residual(copy.deepcopy(vision.model), structure, read_wiring(vision.model, structure), torch.Generator())
    notes = apply_transforms(vision, structure, pixels, DEFAULTS, 0).notes
    assert any("pre_layrnorm" in note for note in notes)


def test_a_step_that_would_change_answers_is_dropped(monkeypatch):
    import pipeline.vit.transforms.apply as apply

    def wrong(model, wiring, generator):
        model.get_parameter("blocks.0.attn.qkv.weight").data[70, 3] += 0.5
        return 1

    monkeypatch.setattr(apply, "rotate_heads", wrong)
    vision, structure, pixels = parts("timm-vit")
    done = apply_transforms(vision, structure, pixels, DEFAULTS, 0)
    assert any("rotation of heads: left out, it would change the outputs" in note for note in done.notes)
    expected, found = in_double(vision.model, pixels), in_double(done.vision.model, pixels)
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_steps_can_be_switched_off():
    vision, structure, pixels = parts("timm-vit")
    nothing = build_config(TransformsConfig, {"rotate_residual": False, "rotate_heads": False, "centre": False})
    done = apply_transforms(vision, structure, pixels, nothing, 0)
    assert done.vision.model is vision.model
    assert (done.steps, done.notes) == ((), ())
