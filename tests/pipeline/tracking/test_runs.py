"""Runs that report to the real libraries, and what can be read back from their own files."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from tuning_config import config
from vit_families import family, vision_family

from fp8pipe.cli import main
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.sources import save_vision_model
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loop import Trainer
from pipeline.finetune.stage import finetune
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit

Curves = dict[str, list[tuple[int, float]]]
SETTINGS = {"steps": 6, "log_every": 1, "evaluate_every": 3, "save_every": 4}


def lines_of(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def curves_of(lines: list[dict]) -> Curves:
    """The curves that the lines of metrics.jsonl describe."""
    found: Curves = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if name != "step":
                found[name].append((line["step"], pytest.approx(value, rel=1e-6)))  # event files hold fp32
    return found


def event_curves(output: Path) -> tuple[Curves, dict[str, str]]:
    """All curves and texts in the event files beside an artifact, which must be those of one run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = output.with_name(f"{output.name}.tensorboard").iterdir()
    # 0: all points; without purging, which would hide a step that was reported twice
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = events.Tags()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}, texts


def interrupt(told: FinetuneConfig, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tune until Ctrl-C after step 5, whose line is reported, and held by no checkpoint."""
    one_step = Trainer.one_step

    def cut(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return one_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", cut)
        with pytest.raises(KeyboardInterrupt):
            finetune(told, output)


def test_an_interrupted_run_has_each_point_once_in_its_event_files(make_base, pairs, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    base, output = make_base(), tmp_path / "out"
    told = config(base, pairs, **SETTINGS, report_to="tensorboard")
    interrupt(told, output, monkeypatch)
    artifact = finetune(told, output, resume=True)
    curves, texts = event_curves(output)
    expected = curves_of(lines_of(artifact.root))
    for name in ("tokens_per_second", "flush_share"):  # times: step 5 was computed twice, and reported first
        assert [step for step, _ in curves.pop(name)] == [step for step, _ in expected.pop(name)]
    assert curves == expected
    assert json.loads(texts["config/text_summary"].strip("`json\n"))["model"] == str(base)
    assert texts["fp8pipe/digest/text_summary"] == artifact.digest
    assert texts["fp8pipe/artifact/text_summary"] == str(output)
    assert not list(artifact.root.glob("trackers*"))
    silent = finetune(config(base, pairs, **SETTINGS), tmp_path / "silent")
    assert silent.content == artifact.content  # nothing that is reported to is part of what was made


def test_losses_of_images_and_of_distillation_are_reported(tmp_path):
    pytest.importorskip("tensorboard")
    save_vision_model(vision_family(family("timm-vit")), tmp_path / "model")
    values = {
        "model": str(tmp_path / "model"), "bits": "w4a4", "images": 8, "report_to": ["tensorboard"],
        "synthesis": {"steps": 2, "batch_size": 4}, "distill": {"steps": 3, "batch_size": 4},
    }  # fmt: skip
    artifact = quantize_vit(build_config(QuantizeVitConfig, values), tmp_path / "out")
    curves, _ = event_curves(tmp_path / "out")
    made = {name.removeprefix("synthesis/"): curves.pop(name) for name in list(curves) if name.startswith("synthesis/")}
    assert curves == curves_of(lines_of(artifact.root))
    kept = json.loads((artifact.root / "calibration" / "images.json").read_text())["losses"]
    batches = {
        name: [(end, pytest.approx(sum(losses[end - 4 : end]) / 4, rel=1e-6)) for end in (4, 8)]
        for name, losses in kept.items()
    }
    assert made == batches


def test_only_one_of_several_processes_reports(make_base, pairs, tmp_path):
    pytest.importorskip("tensorboard")
    from rank_work import tuned
    from ranks import run_ranks

    settings = {
        "base": str(make_base()), "data": str(pairs), "steps": 1, "gradient_accumulation": 2, "report_to": "tensorboard"
    }  # fmt: skip
    run_ranks(2, tuned, settings, str(tmp_path / "out"))
    curves, _ = event_curves(tmp_path / "out")
    assert curves["loss"] == curves_of(lines_of(tmp_path / "out"))["loss"]
    assert len(list((tmp_path / "out.tensorboard").rglob("events.*"))) == 1


def test_a_package_that_is_missing_ends_the_command_before_it_reads_anything(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    arguments = ["--model", "/nowhere", "--data", "/nowhere", "--output", str(tmp_path / "out")]
    ended = CliRunner().invoke(main, ["finetune", *arguments, "--report-to", "wandb", "--json"])
    assert ended.exit_code == 11
    assert "wandb is not installed" in json.loads(ended.stdout)["error"]["why"]
    vision = CliRunner().invoke(
        main, ["quantize-vit", "--model", "/nowhere", "--bits", "w4a4", *arguments[4:], "--report-to", "wandb"]
    )
    assert vision.exit_code == 11


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    """A store of MLflow in files of its own, and a client that reads it."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    mlflow.set_tracking_uri(None)  # it remembers the last test's
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


def mlflow_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("fp8pipe").experiment_id])
    names = run.data.metrics
    points = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return run, {name: sorted((p.step, p.value) for p in found) for name, found in points.items()}


def test_a_resumed_run_is_one_run_of_mlflow(make_base, pairs, tmp_path, monkeypatch, mlflow_store):
    told = config(make_base(), pairs, **SETTINGS, report_to="mlflow")
    interrupt(told, tmp_path / "out", monkeypatch)
    assert mlflow_run(mlflow_store)[0].info.status == "KILLED"
    artifact = finetune(told, tmp_path / "out", resume=True)
    run, curves = mlflow_run(mlflow_store)
    expected = curves_of(lines_of(artifact.root))
    for name in ("tokens_per_second", "flush_share"):
        assert [step for step, _ in curves.pop(name)] == [step for step, _ in expected.pop(name)]
    assert curves == expected
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "out"
    assert run.data.params["learning_rate"] == "0.01"
    assert run.data.tags["fp8pipe/digest"] == artifact.digest
    assert run.data.tags["fp8pipe/artifact"] == str(tmp_path / "out")


def test_a_server_that_ends_during_training_costs_a_warning(make_base, pairs, tmp_path, monkeypatch, caplog):
    mlflow = pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", "--backend-store-uri",
        f"sqlite:///{tmp_path / 'mlflow.db'}", "--default-artifact-root", str(tmp_path / "files"),
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
    )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        mlflow.set_tracking_uri(None)
        one_step = Trainer.one_step

        def step(trainer):
            if trainer.step == 3:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            return one_step(trainer)

        monkeypatch.setattr(Trainer, "one_step", step)
        with caplog.at_level(logging.WARNING, "pipeline"):
            artifact = finetune(config(make_base(), pairs, **SETTINGS, report_to="mlflow"), tmp_path / "out")
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
    assert [line["step"] for line in lines_of(artifact.root) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    warned = [record for record in caplog.records if record.name == "pipeline.tracking.reporter"]
    assert len(warned) == 1
    store = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [step for step, _ in mlflow_run(store)[1]["loss"]] == [1, 2, 3]


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < deadline:
        try:
            opener.open(url, timeout=2)
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{url} does not answer")


def test_an_offline_run_of_wandb_holds_each_point_once(make_base, pairs, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    told = config(make_base(), pairs, **SETTINGS, report_to="wandb")
    interrupt(told, tmp_path / "out", monkeypatch)
    artifact = finetune(told, tmp_path / "out", resume=True)
    rows, runs, summary = wandb_rows(tmp_path)
    assert len(runs) == 1
    curves: Curves = defaultdict(list)
    for row in rows:
        for name in row.keys() - {"step"}:
            curves[name].append((row["step"], row[name]))
    expected = curves_of(lines_of(artifact.root))
    for name in ("tokens_per_second", "flush_share"):
        assert [step for step, _ in curves.pop(name)] == [step for step, _ in expected.pop(name)]
    assert curves == expected
    assert summary["digest"] == artifact.digest


def wandb_rows(folder: Path) -> tuple[list[dict], set[str], dict]:
    """The rows of all files that the library keeps for a later upload, their runs, and the last summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, runs, summary = [], set(), {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):  # by time
        for data in log_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                runs.add(record.run.run_id)
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if row:
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows, runs, summary


def log_records(data: bytes) -> list[bytes]:
    """The records of a file in LevelDB's log format, after the seven bytes that name its version."""
    place, whole, found = 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of a block
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(whole)
            whole = b""
    return found
