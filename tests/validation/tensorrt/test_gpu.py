"""On a GPU: engines are built by TensorRT, run, compared with ONNX Runtime on the same pixels, and timed.

Nothing here runs without a device. Needs `tensorrt` 10.13 or later with its libraries, a CUDA build of torch, and the
sample model; `tensorrt_rtx` and `trtexec` are used where they are there.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

import pytest
import torch

from exporters.tensorrt.engine_cache import EngineSource, ready_engine
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.listing import parse_inspector, read_precision
from exporters.tensorrt.recipe import cache_folder
from exporters.tensorrt.target import CAPABILITIES, TrtExportOptions
from fp8pipe.artifact import MANIFEST_NAME, write_checked
from fp8pipe.core.config import build_config
from fp8pipe.core.machine import gpus
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit
from validation.tensorrt.validate import RELATIVE_LIMIT, validate_tensorrt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH = [1, 8, 32]


def capability() -> str:
    major, minor = gpus()[0].capability
    return f"{major}.{minor}"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """The digits model: INT8, and FP8 where the GPU has it."""
    place, made = tmp_path_factory.mktemp("artifacts"), {}
    for bits in ("w8a8", *(["wfp8afp8"] if gpus()[0].fp8 else [])):
        config = {"model": "sample:vit-digits", "bits": bits, "calibration": "gaussian", "images": 16}
        quantize_vit(build_config(QuantizeVitConfig, config | {"distill": {"steps": 0}}), place / bits)
        made[bits] = place / bits
    return made


@pytest.fixture(scope="module")
def exports(artifacts, tmp_path_factory):
    """Exports with engines of TensorRT; every gate must hold, so `require` is left on."""
    pytest.importorskip("tensorrt")
    place = tmp_path_factory.mktemp("exports")
    options = build_config(TrtExportOptions, {"builder": "enterprise", "batch": BATCH})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8PIPE_CACHE", str(place / "cache"))
        yield {bits: export_tensorrt(path, place / bits, options) for bits, path in artifacts.items()}


def test_every_product_runs_in_the_precision_of_the_artifact(exports):
    for bits, export in exports.items():
        entry = json.loads((export.root / "layers.json").read_text())[capability()]
        assert entry["engine"] == f"engines/trt-{capability()}.engine.xz"
        assert entry["precisions"] == {"fp8" if bits == "wfp8afp8" else "int8": 38}
        assert entry["recipe"]["builder"] == "enterprise"


def test_timings_are_kept_for_the_next_build(exports):
    kept = list(cache_folder().glob(f"timing-*-{capability()}.cache"))
    assert len(kept) == 1
    assert kept[0].stat().st_size > 0


def test_engines_compute_what_onnx_runtime_computes_and_are_timed(exports, capsys):
    for bits, export in exports.items():
        record = validate_tensorrt(export.root)
        assert record.verdict == "ACCEPT"
        assert record.not_proved == ()
        assert record.execution.relative_error <= RELATIVE_LIMIT
        assert record.execution.same_class >= 0.8  # random pixels are near ties; figures on pictures are benchmarks
        assert [timing.batch for timing in record.execution.timings] == BATCH
        with capsys.disabled():
            for timing in record.execution.timings:
                print(f"\n{bits} batch {timing.batch}: {timing.engine_ms:.3f} ms, FP16 {timing.fp16_ms:.3f} ms", end="")


def test_an_engine_of_another_version_is_built_again_and_runs(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    export = shutil.copytree(exports["w8a8"].root, tmp_path / "export")
    data = json.loads((export / MANIFEST_NAME).read_text())
    data["details"]["engines"][capability()]["recipe"]["version"] = "10.0.0.1"
    write_checked(export / MANIFEST_NAME, json.dumps(data))
    notices = []
    ready = ready_engine(export, capability(), on_build=notices.append)
    assert ready.source is EngineSource.BUILT
    assert "10.0.0.1" in notices[0]
    assert validate_tensorrt(export).verdict == "ACCEPT"


@pytest.mark.skipif(shutil.which("trtexec") is None, reason="trtexec is not on the path")
def test_the_command_line_of_the_manifest_builds_the_same_precisions(exports, tmp_path):
    for bits, export in exports.items():
        place = tmp_path / bits
        place.mkdir()
        shutil.copy(export.root / "model.onnx", place)
        words = shlex.split(export.manifest.details.trtexec)
        ended = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=1800)
        assert ended.returncode == 0, ended.stdout[-3000:]
        assert (place / "model.engine").stat().st_size > 100_000
        products = json.loads((export.root / "layers.json").read_text())[capability()]["products"]
        layers = parse_inspector((place / "model.layers.json").read_text())
        report = read_precision([product["node"] for product in products], layers)
        wanted = dict.fromkeys((product["node"] for product in products), export.manifest.details.format)
        assert report.not_in(wanted) == ()


def test_tensorrt_for_rtx_runs_on_the_gpus_it_builds_for(artifacts, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    if capability() not in CAPABILITIES:
        pytest.skip(f"TensorRT for RTX does not build for {capability()}")
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    options = build_config(TrtExportOptions, {"compute_capabilities": [capability()], "batch": BATCH})
    for bits, path in artifacts.items():
        record = validate_tensorrt(export_tensorrt(path, tmp_path / bits, options).root)
        assert record.verdict == "ACCEPT"
        assert record.execution.relative_error <= RELATIVE_LIMIT
