"""`bench` and `serve-check` on a real export: figures that hang together, and a service that is really asked."""

from __future__ import annotations

import json

import pytest
from tiny_exports import write_export

from fp8pipe.cli.common import Console
from fp8pipe.cli.measure import _show_record
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, Fp8PipeError
from validation.bench.check import serve_check
from validation.bench.record import BenchConfig, MeasureRecord, ServeCheckConfig, measure_path
from validation.bench.speed import bench_vision


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("measured"), "timm-vit")


def test_a_bench_measures_the_export_beside_its_float_graph(export, capsys):
    record = bench_vision(export, build_config(BenchConfig, {"batches": [1, 3], "rounds": 3, "threads": 1}))
    figures = record.figures
    assert figures["size_bytes"] == (export / "model.onnx").stat().st_size
    assert figures["size_ratio"] == figures["size_bytes"] / figures["float_size_bytes"]
    assert figures["images_per_s_batch_3"] == pytest.approx(3000 / figures["latency_ms_batch_3"])
    assert all(value > 0 for value in figures.values())
    assert {row.name: row.value for row in record.rows} == figures
    written = json.loads(measure_path(export, "bench").read_text())
    assert MeasureRecord.model_validate(written) == record
    assert written["verdict"] == "ACCEPT"
    # Nothing was judged, so nothing is called accepted; where it is slower, that is said.
    speeds = {"speedup_batch_1": 0.79, "speedup_batch_3": 1.2}
    rows = [row.model_copy(update={"value": speeds.get(row.name, row.value)}) for row in record.rows]
    _show_record(Console(), export, record.model_copy(update={"rows": rows}))
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == f"MEASURED  {export}"
    assert last == "  slower than floating point on this machine: 0.79x with 1 image at once"


def test_a_service_is_started_asked_and_ended(export):
    record = serve_check(export, build_config(ServeCheckConfig, {"images": 3}))
    assert record.verdict == "ACCEPT"
    assert record.figures["outputs_differing"] == record.figures["requests_refused"] == 0
    assert record.figures["identities_differing"] == record.figures["exit_status_after_sigterm"] == 0
    assert record.figures["requests"] == 3
    assert measure_path(export, "serve-check").is_file()


def test_outputs_that_differ_are_rejected(export, monkeypatch):
    """The service is real; what it is compared with is off by one in the last bit."""
    import numpy as np

    import exporters.graph.runtime as runtime

    real = runtime.open_session

    class Off:
        def __init__(self, *arguments, **options):
            self.inner = real(*arguments, **options)
            self.get_inputs, self.get_outputs = self.inner.get_inputs, self.inner.get_outputs

        def run(self, *arguments):
            return [np.nextafter(array, np.float32(np.inf)) for array in self.inner.run(*arguments)]

    monkeypatch.setattr(runtime, "open_session", Off)
    record = serve_check(export, build_config(ServeCheckConfig, {"images": 2}))
    assert record.verdict == "REJECT"
    assert "outputs differing" in record.reasons[0]


def test_a_damaged_export_is_refused(export, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    (copy / "model.onnx").write_bytes(b"x" + (copy / "model.onnx").read_bytes()[1:])
    with pytest.raises(BadArtifactError, match="is not what was written"):
        bench_vision(copy, build_config(BenchConfig, {"rounds": 3}))
    with pytest.raises(BadArtifactError):
        serve_check(copy, build_config(ServeCheckConfig, {}))


def test_a_service_that_does_not_come_up_is_quoted(export):
    with pytest.raises(Fp8PipeError, match="did not become ready in time"):
        serve_check(export, build_config(ServeCheckConfig, {"ready_s": 0.1}))


@pytest.mark.parametrize("values", [{"batches": [0]}, {"batches": []}, {"rounds": 1}, {"batchs": [1]}])
def test_wrong_settings_are_refused(values):
    with pytest.raises(ConfigurationError):
        build_config(BenchConfig, values)
