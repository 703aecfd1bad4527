"""The whole export to TensorRT on a real builder: proved, wholly in low precision, or refused."""

from __future__ import annotations

import json
from collections import Counter

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from quantized_families import quantized_family, storable, write_vit_artifact

from exporters.tensorrt import export as export_module
from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.graph import INT4_BLOCK
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, GateFailedError, LintRefusedError
from fp8pipe.numerics.kinds import Kind
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit


def options(**changes: object) -> TrtExportOptions:
    return build_config(TrtExportOptions, {"compute_capabilities": ["8.9"], "batch": [1, 2, 4]} | changes)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    place = tmp_path_factory.mktemp("artifacts")
    made = {}
    for kind, bits in ((Kind.INT, 4), (Kind.E4M3, 8)):
        quantized = storable(quantized_family("timm-vit", bits=bits, kind=kind))
        made[kind] = write_vit_artifact(place / kind.value, quantized, images=4)
    made["other scales"] = write_vit_artifact(place / "other", quantized_family("timm-vit"), images=4)
    return made


@pytest.mark.parametrize(("kind", "precision"), [(Kind.INT, "int8"), (Kind.E4M3, "fp8")])
def test_every_product_is_in_the_precision_of_the_artifact(artifacts, tmp_path, kind, precision):
    export = export_tensorrt(artifacts[kind].root, tmp_path / "export", options())
    assert all(gate.passed for gate in export.manifest.gates)
    report = json.loads((export.root / "layers.json").read_text())["8.9"]
    assert list(report["precisions"]) == [precision]
    assert (export.root / report["engine"]).stat().st_size == report["stored_bytes"]
    assert report["stored_bytes"] < report["engine_bytes"] / 4
    names = {entry.path for entry in open_artifact(export.root).manifest.files}
    assert {"model.onnx", "layers.json", "preprocessing.json", "engines/rtx-8.9.engine.xz"} <= names


@pytest.mark.parametrize(("bits", "precision"), [("w8a8", "int8"), ("wfp8afp8", "fp8")])
def test_every_attention_of_the_digits_model_is_fused(artifacts, tmp_path, bits, precision):
    config = {"model": "sample:vit-digits", "bits": bits, "calibration": "gaussian", "images": 8}
    quantize_vit(build_config(QuantizeVitConfig, config | {"distill": {"steps": 0}}), tmp_path / "model")
    export = export_tensorrt(tmp_path / "model", tmp_path / "export", options())
    entry = export.manifest.details.engines["8.9"]
    assert entry.precisions == {precision: 38}
    assert entry.fused_attentions == 6


@pytest.mark.parametrize("format", ["int8-weight-only", "int4-weight-only"])
def test_weights_alone_are_stored_as_trained(artifacts, tmp_path, format):
    """Gates compare every code and scale with the artifact's."""
    export = export_tensorrt(artifacts[Kind.INT].root, tmp_path / "export", options(format=format))
    assert all(gate.passed for gate in export.manifest.gates)
    assert export.manifest.details.format == format
    graph = ir.load(export.root / "model.onnx").graph
    assert not [node for node in graph if node.op_type == "QuantizeLinear"]
    types = Counter(v.dtype.name for v in graph.initializers.values() if v.name.endswith(".weight") and v.dtype)
    assert types[format[:4].upper()] > 0
    assert export.manifest.details.engines["8.9"].engine_bytes > 0


def test_blocks_have_the_scale_of_their_channel(artifacts, tmp_path):
    config = options(format="int4-weight-only", builder="none", base="fp32")
    export = export_tensorrt(artifacts[Kind.INT].root, tmp_path / "export", config)
    blocked = [node for node in ir.load(export.root / "model.onnx").graph if node.attributes.get_int("block_size", 0)]
    assert blocked
    for node in blocked:
        codes, scale = (value.const_value.numpy() for value in node.inputs[:2])
        assert scale.shape == (codes.shape[0] // INT4_BLOCK, codes.shape[1])
        assert (scale == scale[:1]).all()


@pytest.mark.parametrize(
    ("kind", "format"),
    [(Kind.E4M3, "int8"), (Kind.E4M3, "int4-weight-only"), (Kind.INT, "fp8")],
)
def test_codes_are_never_rounded_a_second_time(artifacts, tmp_path, kind, format):
    with pytest.raises(LintRefusedError, match="would round them again"):
        export_tensorrt(artifacts[kind].root, tmp_path / "export", options(format=format))
    assert not (tmp_path / "export").exists()


def test_the_graph_alone_needs_no_builder(artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "build_rtx", None)
    export = export_tensorrt(artifacts[Kind.E4M3].root, tmp_path / "export", options(builder="none", base="fp32"))
    assert not (export.root / "engines").exists()
    assert export.manifest.details.engines == {}


def test_a_product_in_another_precision_fails_unless_it_is_waived(artifacts, tmp_path, monkeypatch):
    """Without its barrier the builder dequantizes the joint product of queries, keys and values, as it really does."""
    from exporters.graph.passes.editing import Change
    from exporters.tensorrt import graph

    monkeypatch.setattr(graph, "hold_queries", lambda model: Change("hold_queries", ()))
    with monkeypatch.context() as patched:
        patched.setattr(export_module, "build_rtx", None)  # it is not called
        with pytest.raises(LintRefusedError, match="moved-quantizers"):
            export_tensorrt(artifacts[Kind.E4M3].root, tmp_path / "export", options())
        assert not (tmp_path / "export").exists()
        patched.setattr(export_module, "build_rtx", build_rtx)
        patched.setattr(export_module, "check_file", lambda *args, **named: ())  # what the linter does not know
        with pytest.raises(GateFailedError, match=r"products not in fp8 for 8\.9"):
            export_tensorrt(artifacts[Kind.E4M3].root, tmp_path / "export", options())
    assert not (tmp_path / "export").exists()
    export = export_tensorrt(artifacts[Kind.E4M3].root, tmp_path / "waived", options(require=False))
    gate = next(gate for gate in export.manifest.gates if gate.name.startswith("products"))
    assert gate.value > 0
    assert any("moved-quantizers" in warning for warning in export.manifest.warnings)


def test_scales_that_fp16_does_not_hold_are_refused(artifacts, tmp_path):
    with pytest.raises(LintRefusedError, match="not-half"):
        export_tensorrt(artifacts["other scales"].root, tmp_path / "export", options())


@pytest.mark.parametrize("wrong", [{"compute_capabilities": ["9.0"]}, {"batch": [4, 2, 8]}, {"batch": [0, 1, 1]}])
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigurationError):
        options(**wrong)


def test_the_command_line_exports_and_names_foreign_options(artifacts, tmp_path):
    base = ["export", str(artifacts[Kind.E4M3].root), "--target", "trt", "--output", str(tmp_path / "out")]
    plan = CliRunner().invoke(main, [*base, "--dry-run"])
    assert plan.exit_code == 0
    assert "8.9, 12.0" in plan.output
    refused = CliRunner().invoke(main, [*base, "--max-shard-size", "1GB"])
    assert refused.exit_code == 10
    assert "--max-shard-size cannot be given for --target trt" in refused.output
    old = CliRunner().invoke(main, [*base, "--compute-capability", "8.0"])
    assert old.exit_code == 13
    assert "[fp8-capability]" in old.output
    done = CliRunner().invoke(main, [*base, "--compute-capability", "12.0", "--batch", "1", "2", "4", "--force"])
    assert done.exit_code == 0, done.output
    assert "products not in fp8 for 12.0" in done.output
