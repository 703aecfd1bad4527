"""Images without a Docker daemon: files linted, names checked against each other, and the entry point run for real.

The last test makes the environment of the language image from its pinned requirements and the built wheel, and runs the
image's own command in it, in an empty folder, on an export that cannot be written to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from bare_environment import bare_environment

from fp8pipe.artifact.record import checksum_path, record_path

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
TARGETS = {"vision-cpu", "vision-gpu", "llm-cpu", "llm-gpu"}


def _documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / name).read_text(encoding="utf-8")))


def _stage(target: str) -> str:
    """The text of a stage and of the stages it begins with."""
    found = re.search(rf"^FROM (\S+) AS {target}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found is not None, target
    base = found[1]
    return (_stage(base) if re.search(rf"^FROM \S+ AS {base}$", DOCKERFILE, re.M) else "") + found[2]


def test_hadolint_finds_nothing() -> None:
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([tool, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_final_stages_are_closed(target: str) -> None:
    stage = _stage(target)
    assert json.loads(re.findall(r"^ENTRYPOINT (.*)$", stage, re.M)[-1])[:3] == ["fp8pipe", "serve", "/model"]
    assert re.findall(r"^USER (.*)$", stage, re.M)[-1] == "10001:10001"
    assert re.search(r"^HEALTHCHECK ", stage, re.M)
    assert "EXPOSE 8000" in stage
    assert not re.search(r"pip install|build-essential|gcc|-dev\b", stage)


def test_copied_files_exist_and_are_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in allowed, source


def test_requirements_are_pinned() -> None:
    files = sorted((ROOT / "serving" / "container").glob("requirements-*.txt"))
    assert {file.name for file in files} >= set(re.findall(r"requirements-[\w-]+\.txt", DOCKERFILE))
    for file in files:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert lines
        assert all(re.fullmatch(r"[a-z0-9.-]+==[\w.+]+", line) for line in lines), file.name


def test_vision_images_hold_no_training_packages_and_fit_their_python() -> None:
    slim = re.search(r"^ARG PYTHON_IMAGE=python:(3\.\d+)", DOCKERFILE, re.M)
    assert slim is not None
    # Ubuntu 24.04 has Python 3.12.
    assert re.search(r"^ARG CUDA_IMAGE=nvidia/cuda:13\.\S+-cudnn-runtime-ubuntu24\.04$", DOCKERFILE, re.M)
    for name, python, runtime in (("cpu", slim[1], "onnxruntime"), ("gpu", "3.12", "onnxruntime-gpu")):
        text = (ROOT / "serving" / "container" / f"requirements-vision-{name}.txt").read_text(encoding="utf-8")
        assert text.startswith(f"# Written by scripts/pin_container.py for Python {python}.\n")
        found = {line.partition("==")[0] for line in text.splitlines()[1:]}
        assert runtime in found
        assert not found & {"torch", "onnx", "onnx-ir", "safetensors", "transformers"}


def test_base_images_are_pinned_to_a_tag() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, re.M)
    assert len(images) == 3
    assert all(re.search(r":[\w.-]*\d+\.\d+", image) for image in images)


def test_compose_names_what_exists() -> None:
    (compose,) = _documents("compose.yaml")
    serve, prometheus = compose["services"]["serve"], compose["services"]["prometheus"]
    assert re.fullmatch(r"\$\{TARGET:-([\w-]+)\}", serve["build"]["target"])[1] in TARGETS  # type: ignore[index]
    assert serve["read_only"] is True
    assert serve["ports"] == ["127.0.0.1:8000:8000"]
    mounted = {volume.rsplit(":", 2)[1] for volume in serve["volumes"]}
    record = record_path(Path("/model"))
    assert mounted == {"/model", str(record), str(checksum_path(record))}
    assert (ROOT / prometheus["volumes"][0].split(":")[0]).is_file()
    (scrape,) = _documents("deploy/prometheus.yml")[0]["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["serve:8000"]
    assert scrape["metrics_path"] == "/metrics"


@pytest.mark.slow
@pytest.mark.vllm
def test_the_entry_point_in_a_bare_environment(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests" / "serving"))
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm.environment import find_vllm_python
    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions
    from fp8pipe.core.errors import MissingCapabilityError

    try:
        engine = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))
    python = bare_environment(tmp_path / "venv", "llm-front")
    export = tmp_path / "model"
    export_vllm(write_plain(tmp_path / "plain", make_model()), export, VllmExportOptions())
    for path in [*export.rglob("*"), export]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    (tmp_path / "empty").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path / "tmp"), "PYTHONSAFEPATH": "1",
                   "TMPDIR": str(tmp_path / "tmp"), "FP8PIPE_VLLM_PYTHON": str(engine.absolute())}  # fmt: skip
    process = subprocess.Popen(
        [str(python.parent / "fp8pipe"), "serve", str(export), "--port", "0", "--unvalidated"],
        cwd=tmp_path / "empty", env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"serving on (http://\S+)", line)))
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            assert client.get("/healthz").status_code == 200
            assert client.get("/v1/artifact").json()["kind"] == "vllm-export"
            assert client.get("/readyz").status_code in (200, 503)
    finally:
        process.terminate()
        assert process.wait(90) == 0
    assert list((tmp_path / "empty").iterdir()) == []
