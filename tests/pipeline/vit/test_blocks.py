"""NVFP4 while training: gradients, formats by policy, deployment bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from vit_families import family, random_pixels, vision_family

from fp8pipe.artifact import open_artifact
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.quantized import load_quantized, of_type, save_quantized
from fp8pipe.models.vision.sources import save_vision_model
from fp8pipe.models.vision.structure import VitStructure, read_structure
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.initialise import activation_kinds, choose_quantizer, weight_formats
from pipeline.vit.stage import begin_student
from pipeline.vit.student import fake_blocks

NVFP4 = Precision.parse("wnvfp4anvfp4")


def configuration(**changes: object) -> QuantizeVitConfig:
    values = {"model": "m", "bits": "wnvfp4anvfp4", "distill": {"steps": 3, "batch_size": 4, "save_every": 0}}
    return build_config(QuantizeVitConfig, values | changes)


def structure_of(name: str) -> VitStructure:
    vision = vision_family(family(name))
    return read_structure(vision.model, vision.architecture.image_size)


def test_gradients_pass_where_codes_do_not_saturate():
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([0.3, -6.0, 6.9, -7.1, 40.0, 0.0])
    x = (x * 0.5).requires_grad_()
    rounded = fake_blocks(x, torch.tensor([[0.5, 0.0]]))
    expected = np.array([0.3, -6, 6, -6, 6, 0], np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * 0.5
    assert rounded[0, :6].tolist() == expected.tolist()
    rounded.sum().backward()
    assert x.grad[0, :6].tolist() == [1, 1, 1, 0, 0, 1]
    assert (rounded[0, 16:] == 0).all()  # a block without a scale


@pytest.mark.parametrize("name", ["timm-vit", "hf-swin", "timm-deit-distilled", "hf-clip-backbone"])
def test_both_ends_attention_and_odd_inputs_stay_fp8(name):
    structure = structure_of(name)
    formats, kinds = weight_formats(structure, NVFP4, "8bit"), activation_kinds(structure, NVFP4)
    ends = {structure.patch_embed, *structure.heads}
    for site in structure.linears:
        blocks = site.name not in ends and site.shape[1] % BLOCK == 0
        assert formats[site.name].kind is (Kind.NVFP4 if blocks else Kind.E4M3), site.name
        assert kinds[f"{site.input_group}.input"] is formats[site.name].kind
    assert any(form.kind is Kind.NVFP4 for form in formats.values())
    products = [kind for site, kind in kinds.items() if not site.endswith(".input")]
    assert set(products) == {Kind.E4M3}


def test_the_tensor_scale_of_an_activation_reaches_its_largest_value():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    quantizer = choose_quantizer(values, 4, Kind.NVFP4)
    assert isinstance(quantizer, BlockQuantizer)
    largest = float(values.abs().max())
    assert largest <= 6 * 448 * quantizer.tensor_scale < 2 * largest


@pytest.mark.parametrize("name", ["timm-vit", "hf-vit", "timm-swin", "hf-clip-backbone"])
def test_what_is_deployed_and_read_again_is_what_was_trained(name, tmp_path):
    vision, config = vision_family(family(name)), configuration()
    structure, pixels = read_structure(vision.model, vision.architecture.image_size), random_pixels(family(name), 8)
    student = begin_student(config, vision, structure, pixels)
    before = student.deploy()
    history = Distiller(student, vision, structure, pixels, config.distill, 0).run()
    assert len(history) == 3
    with torch.no_grad():
        deployed = student.deploy()
        assert torch.equal(student(pixels), deployed(pixels))
        save_quantized(tmp_path / "model", deployed)
        assert torch.equal(load_quantized(tmp_path / "model")(pixels), deployed(pixels))
    weights = of_type(deployed.weights, BlockCodes)
    assert weights
    # Training moves codes; the scales stay.
    assert any(not torch.equal(weights[n].codes, before.weights[n].codes) for n in weights)
    assert all(torch.equal(weights[n].scale, before.weights[n].scale) for n in weights)


def test_the_command_makes_an_artifact_that_rebuilds_in_a_fresh_process(tmp_path):
    save_vision_model(vision_family(family("timm-vit")), tmp_path / "model")
    command = ["quantize-vit", "--model", str(tmp_path / "model"), "--bits", "wnvfp4anvfp4"]
    command += ["--calibration", "gaussian", "--images", "8", "--distill-steps", "2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "--target trt" in done.output
    manifest = open_artifact(tmp_path / "out", kind="vit").manifest
    gates = {gate.name: gate.value for gate in manifest.gates}
    assert gates["logits differing after a fresh process"] == 0
    assert gates["weights with too many codes"] == 0
    assert (manifest.number_format.name, manifest.number_format.granularity) == ("wnvfp4anvfp4", "per-block")
    assert {(layer.weight.bits, layer.weight.format) for layer in manifest.layers} == {(4, "nvfp4"), (8, "e4m3")}


def test_ends_in_four_bits_are_refused():
    with pytest.raises(ConfigurationError, match="edges"):
        configuration(edges="same")
