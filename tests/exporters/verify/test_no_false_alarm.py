"""What the exporters write in every form and family is found right, with its parent and without."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from artifact_tree import without_parents
from quantized_families import quantized_family, storable, write_vit_artifact

from exporters.graph.formats import OnnxFormat
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.target import TrtExportOptions
from exporters.verify.whole import verify_tree
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact.verify import find_tree
from fp8pipe.core.config import build_config
from fp8pipe.numerics.kinds import Kind


def verified(root: Path, *parents: Path) -> list[tuple[str, str]]:
    checked, compared = verify_tree(find_tree(root), parents, strict=True)
    assert checked.findings == []
    return compared


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_language_models_in_every_form(request, falqon, tmp_path, family, granularity):
    source = falqon(request.getfixturevalue(family), granularity=granularity, skip=("mlp.c_proj", "down_proj"))
    assert verified(source) == []
    # Sides of 64 are no whole blocks, and GPT-2's weights are stored (in, out).
    for form in (
        form
        for form in ExportFormat
        if form.block is None and not form.calibrated and not (form.packed and family == "gpt2")
    ):
        export = export_vllm(source, tmp_path / "run" / form.value, VllmExportOptions(format=form)).root
        assert verified(export) == [(export.name, str(source))]
        assert verified(without_parents(export)) == []
        assert verified(export, source) == [(export.name, str(source))]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plain_models_quantized_on_the_way(request, tmp_path, family):
    model = request.getfixturevalue(family)
    export = export_vllm(model, tmp_path / "export", VllmExportOptions()).root
    assert verified(without_parents(export)) == []
    assert verified(export, model) == [("export", str(model))]


def test_a_copied_tree_verifies_anywhere(falqon, llama, tmp_path):
    source = falqon(llama)
    (tmp_path / "run").mkdir()
    shutil.copytree(source, tmp_path / "run" / "model")
    export_vllm(tmp_path / "run" / "model", tmp_path / "run" / "vllm", VllmExportOptions())
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert verified(moved) == [("vllm", str(moved / "model"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits", "format"),
    [
        ("timm-vit", 4, OnnxFormat.QDQ), ("timm-vit", 8, OnnxFormat.QDQ_EXACT),
        ("timm-vit", 4, OnnxFormat.INT4_WEIGHT_ONLY),
    ],
)  # fmt: skip
def test_graphs_for_onnx_runtime(tmp_path, family, bits, format):
    vit = write_vit_artifact(tmp_path / "vit", quantized_family(family, bits=bits), images=4).root
    export = export_onnx(vit, tmp_path / "exports" / "onnx", OnnxExportOptions(format=format)).root
    assert verified(vit) == []
    assert verified(without_parents(export)) == []
    assert verified(export, vit) == [("onnx", str(vit))]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [(Kind.E4M3, "fp16"), (Kind.INT, "fp32"), (Kind.NVFP4, "fp16")])
def test_graphs_for_tensorrt(tmp_path, kind, base):
    quantized = storable(quantized_family("timm-vit", bits=8 if kind is Kind.E4M3 else 4, kind=kind))
    vit = write_vit_artifact(tmp_path / "vit", quantized, images=4).root
    options = build_config(TrtExportOptions, {"builder": "none", "base": base})
    export = export_tensorrt(vit, tmp_path / "trt", options).root
    assert verified(vit) == []
    assert verified(export, vit) == [("trt", str(vit))]
