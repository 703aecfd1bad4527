"""Validation for TensorRT without a GPU: what is proved is said, and what is not; stale engines are built again."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_tree import rehash
from click.testing import CliRunner

from exporters.tensorrt.engine_cache import ready_engine
from fp8pipe.artifact import MANIFEST_NAME, write_checked
from fp8pipe.artifact.record import ExportRejectedError, record_path
from fp8pipe.cli import main
from fp8pipe.core import machine
from fp8pipe.core.errors import BadArtifactError, MissingCapabilityError
from fp8pipe.core.machine import Gpu
from validation.tensorrt import run as run_module
from validation.tensorrt import run_worker, validate
from validation.tensorrt.run import Run, run_engine
from validation.tensorrt.validate import validate_tensorrt

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these say what is missing without a GPU")


def _edit(export, change):
    path = export / MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data["details"])
    write_checked(path, json.dumps(data))


def test_the_command_line_says_what_was_proved_and_what_was_not(export):
    ended = CliRunner().invoke(main, ["validate", str(export), "--engine", "tensorrt"])
    assert ended.exit_code == 0, ended.output
    assert "PROVED-WITHOUT-RUNNING" in ended.output
    assert "not proved: execution" in ended.output
    assert "not proved: timing" in ended.output
    record = json.loads(record_path(export).read_text())
    assert record["verdict"] == "PROVED-WITHOUT-RUNNING"
    assert record["execution"] is None
    assert [(e["capability"], e["source"]) for e in record["engines"]] == [("8.9", "export")]
    assert set(record["engines"][0]["precisions"]) == {"fp8"}
    shown = CliRunner().invoke(main, ["validate", str(export), "--json"])
    assert json.loads(shown.stdout)["verdict"] == "PROVED-WITHOUT-RUNNING"


@pytest.mark.parametrize("plan", [[], ["--dry-run"]])
def test_what_it_does_not_compare_with_is_refused(export, plan):
    ended = CliRunner().invoke(main, ["validate", str(export), "--images", str(export), *plan])
    assert ended.exit_code == 10
    assert "--images cannot be given for tensorrt" in ended.output


def test_a_stale_engine_is_built_again_with_a_notice(export):
    (export / "engines" / "rtx-8.9.engine.xz").unlink()
    notices = []
    record = validate_tensorrt(export, notify=notices.append)
    assert record.verdict == "PROVED-WITHOUT-RUNNING"
    assert record.engines[0].source == "built"
    assert "is missing" in record.engines[0].reasons[0]
    assert len(notices) == 1
    ended = CliRunner().invoke(main, ["validate", str(export)])
    assert ended.exit_code == 0
    assert "from this machine's cache, not the export's own" in ended.output
    assert "not proved: the export's own engine for 8.9: another was used" in ended.output


def test_precisions_that_are_not_the_engine_s_are_rejected(export):
    _edit(export, lambda details: details["engines"]["8.9"].update(precisions={"fp8": 5, "fp16": 2}))
    with pytest.raises(ExportRejectedError, match="products listed otherwise than in the engine"):
        validate_tensorrt(export)
    assert json.loads(record_path(export).read_text())["verdict"] == "REJECT"
    assert CliRunner().invoke(main, ["validate", str(export)]).exit_code == 14


def test_a_damaged_graph_is_refused_and_leaves_no_old_verdict(export):
    validate_tensorrt(export)
    graph = export / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(BadArtifactError, match=r"model\.onnx"):
        validate_tensorrt(export)


def test_an_export_without_engines_says_that_no_builder_saw_it(export):
    shutil.rmtree(export / "engines")
    (export / "layers.json").unlink()
    rehash(export, lambda data: data["details"].update(engines={}))
    record = validate_tensorrt(export)
    assert any("the export has no engine" in text for text in record.not_proved)


def test_without_a_device_the_worker_gives_the_runtime_s_own_words(export):
    pixels = np.zeros((1, 3, 32, 32), np.float32)
    with pytest.raises(BadArtifactError, match=r"(?s)does not run.*(CUDA|Cuda)"):
        run_engine(ready_engine(export, "8.9").path, "rtx", pixels, names=("pixels", "x"), batch=1, time_batches=[1])


# --- what a GPU would add; the engine's run is stood in for, everything around it is real


def test_a_gpu_s_outputs_and_times_decide(export, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("RTX 4090", (8, 9), 24 << 30)])
    wanted, asked = {}, []
    expected = validate._expected

    def remember(artifact, pixels):
        wanted["outputs"] = expected(artifact, pixels)
        return wanted["outputs"]

    def ran(noise):
        def run(engine, builder, pixels, *, names, batch, time_batches):
            asked.append((engine.name, builder, names, tuple(time_batches)))
            assert engine.is_file()
            return Run(wanted["outputs"] * (1 + noise), {size: 1.0 + size for size in time_batches}, "RTX 4090")

        return run

    monkeypatch.setattr(validate, "_expected", remember)
    monkeypatch.setattr(validate, "run_engine", ran(0.01))
    record = validate_tensorrt(export)
    assert record.verdict == "ACCEPT"
    assert record.not_proved == ()
    assert record.execution.relative_error == pytest.approx(0.01, rel=1e-3)
    assert [timing.batch for timing in record.execution.timings] == [1, 2, 4]
    assert [name for name, *_ in asked] == [ready_engine(export, "8.9").path.name, "plain.engine"]
    ended = CliRunner().invoke(main, ["validate", str(export)])
    assert "batch 4: 5.000 ms, in FP16 5.000 ms (x1.00)" in ended.output
    monkeypatch.setattr(validate, "run_engine", ran(0.2))
    with pytest.raises(ExportRejectedError, match="relative error"):
        validate_tensorrt(export)


def test_a_gpu_that_the_builder_does_not_know_is_named(export, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("H100", (9, 0), 80 << 30)])
    with pytest.raises(MissingCapabilityError, match=r"9\.0"):
        validate_tensorrt(export)


# What the worker calls of the runtime, by class; held to the bindings of TensorRT for RTX below.
API = {
    "Runtime": ("deserialize_cuda_engine",),
    "ICudaEngine": ("create_execution_context", "get_tensor_dtype"),
    "IExecutionContext": ("set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"),
    "DataType": ("FLOAT", "HALF"),
    "ILogger": (),
}  # fmt: skip
TORCH = {
    "from_numpy", "cuda", "float", "cpu", "cat", "numpy", "get_device_name", "float32", "float16", "Stream", "stream",
    "synchronize", "arange", "device", "Event", "record", "elapsed_time", "to", "contiguous", "shape", "empty",
    "data_ptr", "cuda_stream",
}  # fmt: skip
OWN = {
    "loads", "dumps", "read_text", "write_text", "read_bytes", "argv", "messages", "append", "name", "exit", "__init__",
    "__version__", "import_module", "load", "save", "time", "median", "_torch", "_context", "_source", "_result",
    "_input", "_output", "_stream", "_bind", "_execute", "_input_kept", "_output_kept",
}  # fmt: skip


def test_every_name_that_the_worker_calls_exists():
    trt = pytest.importorskip("tensorrt_rtx")
    missing = [f"{c}.{name}" for c, names in API.items() for name in names if not hasattr(getattr(trt, c), name)]
    assert not missing
    tree = ast.parse(Path(run_worker.__file__).read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used - {name for names in API.values() for name in names} - set(API) - TORCH - OWN == set()
    owners = (torch, torch.cuda, torch.Tensor, torch.cuda.Stream, torch.cuda.Event)
    only_with_cuda = {"cuda_stream"}  # documented for torch.cuda.Stream
    assert not [name for name in TORCH - only_with_cuda if not any(hasattr(owner, name) for owner in owners)]
    assert Path(run_worker.__file__) == run_module._WORKER
