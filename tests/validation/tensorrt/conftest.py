"""An export to TensorRT with one engine, and a copy of it for each test."""

from __future__ import annotations

import shutil

import pytest
from quantized_families import quantized_family, storable, write_vit_artifact

from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.core.config import build_config
from fp8pipe.numerics.kinds import Kind


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path_factory.mktemp("exports")
    model = write_vit_artifact(place / "m", storable(quantized_family("timm-vit", bits=8, kind=Kind.E4M3)), images=4)
    options = {"compute_capabilities": ["8.9"], "batch": [1, 2, 4]}
    return export_tensorrt(model.root, place / "export", build_config(TrtExportOptions, options)).root


@pytest.fixture
def export(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(exported, tmp_path / "export")
