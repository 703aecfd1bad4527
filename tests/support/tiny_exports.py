"""ONNX exports of tiny models, as `fp8pipe export` writes them."""

from __future__ import annotations

from pathlib import Path

from quantized_families import quantized_family, write_vit_artifact

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions


def write_export(folder: Path, family: str) -> Path:
    """The export `folder/tiny` of a family's 8-bit member."""
    artifact = write_vit_artifact(folder / "vit", quantized_family(family, bits=8), images=4)
    return export_onnx(artifact.root, folder / "tiny", OnnxExportOptions()).root
