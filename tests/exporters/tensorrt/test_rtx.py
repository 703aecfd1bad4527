"""The real builder of TensorRT for RTX: what it compiles, in which precision, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from quantized_families import storable_graph

from exporters.tensorrt import builder
from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.half import halve
from exporters.tensorrt.listing import read_precision
from fp8pipe.core.errors import ConfigurationError, GateFailedError, MissingCapabilityError
from fp8pipe.numerics.kinds import Kind


@pytest.fixture(scope="module", params=[Kind.INT, Kind.E4M3])
def graph(request, tmp_path_factory):
    pytest.importorskip("tensorrt_rtx")
    model = storable_graph("timm-vit", request.param)
    halve(model)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    ir.save(model, path)
    side = [int(side) for side in model.graph.inputs[0].shape[2:]]
    nodes = [node.name for node in model.graph if node.op_type in ("MatMul", "Conv")]
    return request.param, path, nodes, {"pixels": tuple((n, 3, *side) for n in (1, 2, 4))}


def test_engines_are_built_and_listed(graph, tmp_path):
    kind, path, nodes, profiles = graph
    built = build_rtx(path, tmp_path / "model.engine", ["8.9", "12.0"], profiles)
    assert (tmp_path / "model.engine").stat().st_size > 10_000
    assert built.version.startswith("1.")
    report = read_precision(nodes, built.layers)
    assert "unknown" not in report.counts()
    low = "fp8" if kind is Kind.E4M3 else "int8"
    assert sum(low in product.operands for product in report.products) >= 0.8 * len(nodes)


def test_what_an_architecture_lacks_is_refused_in_the_builder_s_words(graph, tmp_path):
    kind, path, _, profiles = graph
    if kind is Kind.E4M3:
        with pytest.raises(GateFailedError, match=r"(?s)builder.*fp8_e4m3"):
            build_rtx(path, tmp_path / "model.engine", ["8.0"], profiles)
    else:
        build_rtx(path, tmp_path / "model.engine", ["8.0"], profiles)


def test_a_graph_that_is_none_is_refused_by_the_parser(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(GateFailedError, match="parser"):
        build_rtx(tmp_path / "bad.onnx", tmp_path / "model.engine", ["8.9"], {})


def test_unknown_capabilities_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"9\.0"):
        build_rtx(tmp_path / "x.onnx", tmp_path / "x.engine", ["8.9", "9.0"], {})


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCapabilityError, match="trt-rtx"):
        build_rtx(tmp_path / "x.onnx", tmp_path / "x.engine", ["8.9"], {})


def test_a_builder_ends_with_the_process_that_started_it(tmp_path):
    """The worker refuses to begin for a parent that is gone: nobody would take its engine."""
    job = {"graph": "none.onnx", "engine": "e", "answer": str(tmp_path / "answer"), "parent": 1 << 22}
    (tmp_path / "job.json").write_text(json.dumps(job))
    worker = Path(builder.__file__).with_name("build_worker.py")
    ended = subprocess.run([sys.executable, "-P", str(worker), str(tmp_path / "job.json")], capture_output=True)
    assert ended.returncode == 1
    assert not (tmp_path / "answer").exists()
