"""Serving pictures needs no torch, onnx or onnx-ir: importing them raises here, and the answers are the same bits."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from running_server import running

from exporters.graph.runtime import open_session
from fp8pipe.models.vision.preprocessing import Preprocessing, read_model_file
from serving.vision.server import probabilities

_ROOT = Path(__file__).resolve().parents[3]
_HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "timm", "torchvision", "safetensors")
# Python imports a module of this name when it starts.
_FORBID = f"""
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_HEAVY!r}:
            raise ImportError(f"{{name}} is forbidden here")

sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture
def forbidding(tmp_path):
    """Variables under which the heavy packages cannot be imported."""
    (tmp_path / "sitecustomize.py").write_text(_FORBID)
    return {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(_ROOT)))}


def test_the_variables_do_forbid(forbidding):
    done = subprocess.run([sys.executable, "-c", "import torch"], env=os.environ | forbidding, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert "torch is forbidden here" in done.stderr


def test_nothing_is_kept_or_sent_by_the_runtime(export, tmp_path):
    """ONNX Runtime's telemetry would leave a session file and a device's identity here."""
    folders = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    with running(export, "--max-batch", "1", "--threads", "1", PYTHONDONTWRITEBYTECODE="1", **folders) as server:
        assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert list(tmp_path.iterdir()) == []


def test_a_classification_without_the_heavy_packages(export, png, forbidding):
    with running(export, "--max-batch", "2", "--threads", "1", **forbidding) as server:
        answer = httpx.post(f"{server.url}/v1/classify", params={"top_k": 5}, content=png,
                            headers={"Content-Type": "image/png"})  # fmt: skip
    assert answer.status_code == 200, answer.text
    recipe = read_model_file(Preprocessing, export / "preprocessing.json")
    # torch's arithmetic, as in calibration, against the server's numpy
    pixels = recipe.normalize(recipe.pixels(Image.open(io.BytesIO(png))))
    logits = open_session(export / "model.onnx").run(None, {"pixels": pixels[None].numpy()})[0]
    found = {one["index"]: one["probability"] for one in answer.json()["results"][0]["classes"]}
    assert np.array_equal([found[i] for i in range(5)], probabilities(logits, "softmax")[0].astype(float))
