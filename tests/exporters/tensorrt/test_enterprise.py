"""TensorRT 10 and 11 without a GPU: what is missing is said first; jobs and flags by version, API names, layers."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner
from quantized_families import quantized_family, storable, storable_graph, write_vit_artifact
from small_artifacts import write

from exporters.tensorrt import build_worker, builder
from exporters.tensorrt.builder import (
    EnterpriseMachine,
    build_enterprise,
    check_enterprise,
    job,
    trtexec_command,
)
from exporters.tensorrt.half import halve
from exporters.tensorrt.listing import parse_inspector, read_precision
from exporters.tensorrt.target import EnterpriseSettings
from fp8pipe.artifact import open_artifact
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError, GateFailedError, MissingCapabilityError
from fp8pipe.core.machine import Gpu
from fp8pipe.numerics.kinds import Kind

PROFILES = {"pixels": ((1, 3, 24, 24), (8, 3, 24, 24), (32, 3, 24, 24))}


# --- what is missing


def fake_tensorrt(tmp_path, monkeypatch, body):
    """A package `tensorrt` that a fresh Python finds: what a broken or an old installation looks like."""
    (tmp_path / "tensorrt.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: object())


def test_a_missing_package_names_the_ways_out(monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCapabilityError) as caught:
        check_enterprise()
    assert all(word in caught.value.fix for word in ("pip install tensorrt", "trtexec", "--builder rtx"))


def test_missing_libraries_an_old_version_and_a_missing_gpu_are_told_apart(tmp_path, monkeypatch):
    fake_tensorrt(tmp_path, monkeypatch, "raise ImportError('libnvonnxparser.so.11: cannot open shared object file')")
    with pytest.raises(MissingCapabilityError, match=r"(?s)libraries are missing.*libnvonnxparser\.so\.11"):
        check_enterprise()
    fake_tensorrt(tmp_path, monkeypatch, "__version__ = '10.3.0'")
    with pytest.raises(MissingCapabilityError, match=r"10\.3\.0 is too old"):
        check_enterprise()
    fake_tensorrt(tmp_path, monkeypatch, "__version__ = '11.4.0.106'")
    monkeypatch.setattr(builder, "gpus", list)
    with pytest.raises(MissingCapabilityError, match=r"11\.4\.0\.106 needs a GPU"):
        check_enterprise()
    monkeypatch.setattr(builder, "gpus", lambda: [Gpu("H100", (9, 0), 80 << 30)])
    assert check_enterprise() == EnterpriseMachine("11.4.0.106", "9.0")


@pytest.mark.skipif("tensorrt" in sys.modules, reason="TensorRT is loaded")
def test_the_command_line_ends_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    source = write(tmp_path / "vit", kind="vit").root
    arguments = ["export", str(source), "--target", "trt", "--output", str(tmp_path / "out")]
    ended = CliRunner().invoke(main, [*arguments, "--builder", "enterprise"])
    assert ended.exit_code == 11
    assert "TensorRT is not installed" in ended.output
    assert list(tmp_path.iterdir()) == [source]


# --- jobs, flags, command lines


@pytest.mark.parametrize(("version", "flags"), [("10.13.3.9", ["STRONGLY_TYPED"]), ("11.4.0.106", [])])
def test_only_version_10_is_asked_for_strong_typing(tmp_path, monkeypatch, version, flags):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    settings = EnterpriseSettings(workspace_mib=100, version_compatible=True)
    told = job(EnterpriseMachine(version, "9.0"), PROFILES, settings)
    assert told["network_flags"] == flags
    assert told["builder_flags"] == ["VERSION_COMPATIBLE"]
    assert told["workspace_bytes"] == 100 * 1024 * 1024
    assert told["timing_cache"] == str(tmp_path / "engines" / f"timing-{version}-9.0.cache")
    assert json.loads(json.dumps(told))["profiles"]["pixels"][2] == [32, 3, 24, 24]
    assert EnterpriseSettings().builder_flags() == ()


def test_the_trtexec_line_has_the_profile_and_no_precision():
    words = shlex.split(trtexec_command("a b/model.onnx", PROFILES, workspace_mib=512))
    assert words[:2] == ["trtexec", "--onnx=a b/model.onnx"]
    assert "--minShapes=pixels:1x3x24x24" in words
    assert "--optShapes=pixels:8x3x24x24" in words
    assert "--maxShapes=pixels:32x3x24x24" in words
    assert {"--stronglyTyped", "--memPoolSize=workspace:512", "--profilingVerbosity=detailed"} <= set(words)
    assert not [word for word in words if re.match(r"--(fp16|int8|fp8|bf16|int4|best|precision)", word)]
    assert "--versionCompatible" not in words
    assert "--versionCompatible" in trtexec_command("m", {}, workspace_mib=1, version_compatible=True)


def test_every_export_holds_and_prints_the_line(tmp_path):
    pytest.importorskip("onnxruntime")
    model = write_vit_artifact(tmp_path / "m", storable(quantized_family("timm-vit", bits=8, kind=Kind.E4M3)), images=4)
    arguments = ["export", str(model.root), "--target", "trt", "--builder", "none", "--output", str(tmp_path / "out")]
    ended = CliRunner().invoke(main, [*arguments, "--batch", "1", "2", "4", "--workspace", "64"])
    assert ended.exit_code == 0, ended.output
    stored = open_artifact(tmp_path / "out").manifest.details.trtexec
    assert "--onnx=model.onnx" in stored
    assert "--memPoolSize=workspace:64" in stored
    assert re.search(r"--optShapes=pixels:2x3x\d+x\d+", stored)
    assert stored in ended.output


# --- names of the API

# What the worker calls, by class. Looked up in the bindings of 10.13.3 and 11.4.0; held to TensorRT for RTX below.
API = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "desc"),
    "IBuilderConfig": (
        "profiling_verbosity", "builder_optimization_level", "set_memory_pool_limit", "set_flag",
        "add_optimization_profile", "create_timing_cache", "set_timing_cache", "get_timing_cache",
    ),
    "ITimingCache": ("serialize",),
    "IOptimizationProfile": ("set_shape",),
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context", "create_engine_inspector"),
    "IExecutionContext": ("set_input_shape",),
    "EngineInspector": ("execution_context", "get_engine_information"),
    "MemoryPoolType": ("WORKSPACE",),
    "ProfilingVerbosity": ("DETAILED",),
    "LayerInformationFormat": ("JSON",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "BuilderFlag": ("VERSION_COMPATIBLE",),
    "ILogger": (),
}  # fmt: skip
# What only TensorRT for RTX has.
RTX_API = {"IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"), "ComputeCapability": ("SM89",)}
# Names of Python, and of the worker itself.
OWN = {
    "loads", "dumps", "read_text", "write_text", "read_bytes", "write_bytes", "argv", "messages", "append", "name",
    "items", "is_file", "parent", "mkdir", "with_name", "getpid", "replace", "exit", "__init__", "__version__",
    "CDLL", "SIGKILL", "getppid", "platform", "prctl",
    "import_module", "get",
}  # fmt: skip


def test_the_worker_calls_no_name_beyond_the_table():
    tree = ast.parse(Path(build_worker.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    known = {name for table in (API, RTX_API) for names in table.values() for name in names} | {*API, *RTX_API} | OWN
    assert used - known == set()
    flags = {*EnterpriseSettings.network_flags("10.13"), *EnterpriseSettings(version_compatible=True).builder_flags()}
    assert flags <= known


def test_every_name_of_the_table_is_one_of_tensorrt_for_rtx_too():
    """The same classes, of a package that can be installed here."""
    trt = pytest.importorskip("tensorrt_rtx")
    missing = [
        f"{c}.{name}"
        for c, names in (*API.items(), *RTX_API.items())
        for name in names
        if not hasattr(getattr(trt, c), name)
    ]
    assert not missing


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
def test_the_worker_runs_up_to_the_device(tmp_path, monkeypatch, version):
    """In the place of TensorRT stands TensorRT for RTX, which has its classes: all calls are real but the inspector's,
    for which an engine must be loaded onto a GPU."""
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "tensorrt.py").write_text("from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    model = storable_graph("timm-vit", Kind.E4M3)
    halve(model)
    ir.save(model, tmp_path / "model.onnx")
    profiles = {"pixels": tuple((n, 3, *map(int, model.graph.inputs[0].shape[2:])) for n in (1, 2, 4))}
    answer, engine, path = tmp_path / "answer.json", tmp_path / "engine", tmp_path / "job.json"
    machine = EnterpriseMachine(version, "8.9")
    files = {"graph": str(tmp_path / "model.onnx"), "engine": str(engine), "answer": str(answer), "parent": os.getpid()}
    told = job(machine, profiles, EnterpriseSettings()) | files
    path.write_text(json.dumps(told))
    for _ in range(2):  # the second finds the first one's timings
        ended = subprocess.run([sys.executable, "-P", build_worker.__file__, path], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found = json.loads(answer.read_text())
        assert (found["parsed"], found["built"], found["errors"]) == (True, True, [])
        assert engine.stat().st_size > 100_000
        assert Path(told["timing_cache"]).is_file()
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(GateFailedError, match="parser of TensorRT refuses"):
        build_enterprise(tmp_path / "model.onnx", engine, machine, profiles, EnterpriseSettings())


# --- the inspector's JSON


def tensor(shape, **types):
    return {"Name": "x", "Location": "Device", "Dimensions": shape, **types}


def layers_of(kind):
    """The same three layers as 10.x and as 11.x write them."""

    def typed(shape, text, name):
        if kind == "10":
            return tensor(shape, **{"Format/Datatype": text})
        return tensor(shape, **{"Format": "Row major linear format (kLINEAR)", "Datatype": name})

    half, fp8 = ("Row major linear FP16 format", "Half"), ("Row major linear FP8 format", "FP8")
    return json.dumps({"Layers": [
        {"Name": "a/MatMul_myl0_1", "LayerType": "gemm", "Inputs": [typed([-1, 96], *fp8)],
         "Constants": [typed([96, 288], *fp8), typed([1], "Row major linear FP32", "Float")],
         "Outputs": [typed([-1, 288], *half)], "TacticName": "sm90_xmma", "StreamId": 0,
         "Metadata": "[ONNX Layer: a/MatMul]\x1f[ONNX Layer: a.input/DequantizeLinear]"},
        {"Name": "_gemm_mha_v2_myl0_2", "LayerType": "kgen", "Inputs": [typed([-1, 4, 16], *fp8)] * 3,
         "Outputs": [typed([-1, 4, 16], *fp8)], "Metadata": "[ONNX Layer: b/qk]\x1e[ONNX Layer: b/av]"},
        {"Name": "c", "LayerType": "CaskGemmMatrixMultiply", "Weights": {"Type": "Int8", "Count": 4096},
         "Inputs": [typed([8, 64], "Thirty-two wide channel vectorized row major Int8 format", "Int8")],
         "Outputs": [typed([8, 64], "Row major linear BFloat16 format", "BFloat16")], "Metadata": "[ONNX Layer: c]"},
    ], "Bindings": ["pixels", "logits"]})  # fmt: skip


@pytest.mark.parametrize("kind", ["10", "11"])
def test_inspector_layers_become_the_listing_s_records(kind):
    report = read_precision(["a/MatMul", "b/qk", "b/av", "c"], parse_inspector(layers_of(kind)))
    assert [product.name for product in report.products] == ["fp8", "fp8", "fp8", "int8"]
    assert [product.fused_attention for product in report.products] == [False, True, True, False]
    assert [product.output for product in report.products] == ["fp16", "fp8", "fp8", "bf16"]


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["a/MatMul"]}', '{"Layers": [{"Name": "a"}]}'])
def test_names_alone_or_another_form_are_an_error(text):
    with pytest.raises(BadArtifactError, match="inspector"):
        parse_inspector(text)


def test_a_type_that_is_not_known_is_no_precision():
    text = layers_of("10").replace("Row major linear FP8 format", "N/A due to dynamic shapes")
    report = read_precision(["a/MatMul"], parse_inspector(text))
    assert report.not_in({"a/MatMul": "fp8"}) == ("a/MatMul",)
