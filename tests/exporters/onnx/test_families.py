"""Every family: all its products found, its numbers in the file, its layers on integers, its results those of torch."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
from breadth import only_long
from family_table import PAGE, page
from quantized_families import quantized_family
from rebuilt_here import rebuild_here
from vit_families import NAMES, REFUSED, TO_TENSORRT, family, random_pixels, vision_family

from exporters.graph.formats import OnnxFormat
from exporters.graph.gates import check_kernels
from exporters.graph.layers import read_layers
from exporters.graph.parity import compare_layers, inputs_of, outputs_of
from exporters.graph.produce import quantize_graph
from exporters.graph.reopen import reopen_gates
from exporters.graph.runtime import open_session, run
from exporters.graph.trace import ProductKind
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.artifact import Verdict
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.architecture import build
from fp8pipe.models.vision.sources import save_vision_model
from fp8pipe.models.vision.structure import read_structure
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit
from validation.onnx.validate import validate_onnx

# Tracing takes seconds a model. These have every kind of product, mask, window, pooling and sharing.
FIRST = {
    "timm-vit", "timm-beit", "timm-eva02-split", "timm-siglip", "timm-swin", "hf-vit", "hf-dinov2-other-size",
    "hf-deit-distilled", "hf-swin-wide",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FIRST))
def test_the_exported_graph_computes_what_the_quantized_model_computes(name, tmp_path):
    quantized = quantized_family(name)
    path = tmp_path / "model.onnx"
    ir.save(quantize_graph(quantized, OnnxFormat.QDQ, name).model, path)
    model = ir.load(path)
    layers = read_layers(model)
    structure = quantized.structure
    assert {x.name for x in layers if x.kind in (ProductKind.LINEAR, ProductKind.PATCH)} == set(structure.linear_names)
    for kind in (ProductKind.QK, ProductKind.AV):
        assert [x.name for x in layers if x.kind is kind] == list(structure.attention_names)
    assert not any(node.op_type == "Gemm" for node in model.graph)
    assert [gate for gate in reopen_gates(model, layers, quantized, OnnxFormat.QDQ) if not gate.passed] == []
    _check_layers(quantized, model, layers, random_pixels(family(name), 3))
    kernels = check_kernels(path, layers)
    assert kernels.float_layers == []
    assert kernels.integer == len(layers) - 1  # all but the patch embedding, a convolution
    _check_batches(quantized, path, name)


def _check_layers(quantized, model, layers, pixels):
    taps = quantized.taps(pixels)
    report = compare_layers(model, layers, inputs_of(quantized, layers, taps), outputs_of(layers, taps))
    assert all(layer.codes for layer in report)
    assert sum(layer.differing_codes for layer in report) == 0
    for layer in report:
        assert layer.error <= layer.tolerance, layer
        assert layer.torch_error <= 1e-5, layer


def _check_batches(quantized, path, name):
    """One image and five, in a graph that was traced with two."""
    session = open_session(path)
    for count in (1, 5):
        pixels = random_pixels(family(name), count, seed=count)
        with torch.no_grad():
            expected = quantized(pixels)
        found = torch.from_numpy(run(session, {"pixels": pixels.numpy()})["logits"])
        assert found.shape == expected.shape
        # Equal up to rounding, unless that moves a code across a border (two levels of 4 bits are far apart).
        assert (found - expected).norm() <= 0.2 * expected.norm()


@pytest.fixture
def _rebuilt_here(monkeypatch):
    """A fresh process costs seconds a model; the stage's own tests start it."""
    rebuild_here(monkeypatch)


# Seconds each, and everything they are made of is in another that always runs: timm-swin, a distilled DeiT's two prefix
# tokens and heads, DINOv2 with registers, ViT and CLIP with a head and other models without one.
ONLY_LONG = {
    "timm-swin-wide", "hf-swin", "hf-swin-wide", "timm-deit", "hf-deit", "timm-dinov2", "hf-vit-backbone",
    "hf-clip-backbone",
}  # fmt: skip


def _cost(name):
    return only_long if name in ONLY_LONG else ()


@pytest.mark.parametrize("name", [pytest.param(n, marks=_cost(n)) for n in NAMES])
@pytest.mark.usefixtures("_rebuilt_here")
def test_every_family_goes_all_the_way(name, tmp_path):
    """The rows of docs/families.md: a model's directory, quantized, exported and validated as users do it."""
    save_vision_model(vision_family(family(name)), tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "bits": "w8a8", "calibration": "gaussian", "images": 8}
    config = build_config(QuantizeVitConfig, settings | {"distill": {"steps": 0}})
    artifact = quantize_vit(config, tmp_path / "vit")
    constants = [warning for warning in artifact.manifest.warnings if "does not depend on the picture" in warning]
    assert len(constants) == (1 if family(name).constants else 0)
    export = export_onnx(artifact.root, tmp_path / "onnx", OnnxExportOptions())
    assert all(gate.passed for gate in export.manifest.gates)
    assert validate_onnx(export.root, against=artifact.root).verdict == Verdict.ACCEPT
    if name in TO_TENSORRT:
        options = build_config(TrtExportOptions, {"builder": "none"})
        graph = export_tensorrt(artifact.root, tmp_path / "trt", options)
        assert all(gate.passed for gate in graph.manifest.gates)


@pytest.mark.parametrize("name", REFUSED)
def test_other_architectures_are_refused_in_words(name):
    with pytest.raises(ConfigurationError) as caught:
        read_structure(build(REFUSED[name].architecture), REFUSED[name].architecture.image_size)
    assert REFUSED[name].says in caught.value.why
    assert caught.value.fix


def test_the_page_of_families_is_that_of_the_registry():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/support/family_table.py"
