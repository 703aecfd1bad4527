"""Quantized members of the families, and artifacts of them, for the tests of exporters and serving."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save_file
from small_artifacts import details_of
from vit_families import family, vision_family

from fp8pipe.artifact import Artifact, ArtifactWriter
from fp8pipe.models.vision.quantized import QuantizedVit, activation_sites, of_type, save_quantized
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure, read_structure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes, BlockQuantizer, choose_block_scales
from fp8pipe.numerics.quantizers import ActivationQuantizer, WeightCodes, storable_scale


def quantized_family(name: str, bits: int = 4, kind: Kind = Kind.INT) -> QuantizedVit:
    """Every linear and every site quantized; ranges by guess, symmetric, asymmetric and of one sign."""
    vision = vision_family(family(name))
    structure = read_structure(vision.model, vision.architecture.image_size)
    if kind is Kind.NVFP4:
        return _block_family(vision, structure)
    weights = {}
    for site in structure.linears:
        weight = vision.model.get_submodule(site.name).weight.detach()
        largest = 448.0 if kind is Kind.E4M3 else 2 ** (bits - 1) - 1
        scale = weight.flatten(1).abs().amax(1).clamp(min=1e-6) / largest
        weights[site.name] = WeightCodes.of(weight, scale, bits, kind)
    activations = {}
    for index, site in enumerate(activation_sites(structure)):
        low, high = (
            (0, 2**bits - 1) if site.endswith(".probs") else (-(2 ** (bits - 1)) + index % 3, 2 ** (bits - 1) - 1)
        )
        # Not powers of two: products of codes and scales are then rounded.
        scale = float(torch.tensor(1.0 / high if site.endswith(".probs") else 3.1 / high, dtype=torch.float32))
        activations[site] = ActivationQuantizer(scale, low, min(high, 127), kind)
    return QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, weights, activations)


def _block_family(vision: VisionModel, structure: VitStructure) -> QuantizedVit:
    """NVFP4 wherever the inputs of a linear come in blocks of 16 and it is no end of the model; E4M3 elsewhere."""
    ends = {structure.patch_embed, *structure.heads}
    weights, activations = {}, {}
    for site in activation_sites(structure):
        activations[site] = ActivationQuantizer(2.0**-7, kind=Kind.E4M3)
    for index, site in enumerate(structure.linears):
        weight = vision.model.get_submodule(site.name).weight.detach()
        if site.shape[1] % BLOCK or site.name in ends:
            scale = storable_scale(weight.flatten(1).abs().amax(1).clamp(min=1e-6) / 448.0)
            weights[site.name] = WeightCodes.of(weight, scale, 8, Kind.E4M3)
            continue
        weights[site.name] = BlockCodes.of(weight, choose_block_scales(weight))
        # Smaller and larger than the activations need: some block scales saturate, some vanish.
        activations[f"{site.input_group}.input"] = BlockQuantizer(2.0 ** (-13 + 5 * (index % 3)))
    return QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, weights, activations)


def write_vit_artifact(folder: Path, quantized: QuantizedVit, images: int = 0) -> Artifact:
    """An artifact of kind `vit`, with random calibration images if asked for."""
    with ArtifactWriter(folder, kind="vit", stage="quantize-vit") as writer:
        save_quantized(writer.root, quantized)
        if images:
            (writer.root / "calibration").mkdir()
            random = torch.Generator().manual_seed(5)
            shape = (images, 3, *quantized.architecture.image_size)
            codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
            save_file({"images": codes}, writer.root / "calibration" / "images.safetensors")
        moments = quantized.preprocessing.model_dump(mode="json")
        return writer.commit(details=details_of("vit", images=images), preprocessing=moments, seed=0)


def storable(quantized: QuantizedVit) -> QuantizedVit:
    """The same with scales that FP16 holds; those of blocks of four-bit floats are so already."""
    weights = dict(quantized.weights)
    for name, weight in of_type(quantized.weights, WeightCodes).items():
        weights[name] = WeightCodes(weight.codes, storable_scale(weight.scale), weight.bits)
    activations = dict(quantized.activations)
    for site, q in of_type(quantized.activations, ActivationQuantizer).items():
        activations[site] = ActivationQuantizer(float(storable_scale(torch.tensor(q.scale))), q.low, q.high, q.kind)
    vision = (quantized.model, quantized.architecture, quantized.preprocessing, quantized.structure)
    return QuantizedVit(*vision, weights, activations)


def storable_graph(name: str, kind: Kind = Kind.INT) -> ir.Model:
    """A family's Q/DQ graph, readers sharing quantizers, with scales that FP16 holds."""
    from exporters.tensorrt.graph import choose_format, typed_graph

    quantized = storable(quantized_family(name, bits=8 if kind is Kind.E4M3 else 4, kind=kind))
    return typed_graph(quantized, choose_format(quantized, None, "test"), "test").model
