"""Labels that hold each by itself, and values: what is served of models that are no choice of one class."""

from __future__ import annotations

import io
import json
import shutil

import httpx
import pytest
import torch
from PIL import Image
from running_server import running

from exporters.graph.runtime import open_session
from fp8pipe.artifact import ArtifactWriter, open_artifact
from fp8pipe.models.vision.preprocessing import Preprocessing, read_model_file


def _meaning(export, folder, activation):
    """The same graph, whose outputs mean something else."""
    manifest = open_artifact(export).manifest
    output = manifest.details.output.model_copy(update={"activation": activation})
    with ArtifactWriter(folder, kind=manifest.kind, stage="export") as writer:
        for entry in manifest.files:
            shutil.copyfile(export / entry.path, writer.root / entry.path)
        details = manifest.details.model_copy(update={"output": output})
        return writer.commit(details=details, runtime=manifest.runtime).root


@pytest.mark.parametrize(("activation", "task", "others"), [
    ("sigmoid", "classify", ("predict", "embed")), ("none", "predict", ("classify", "embed")),
])  # fmt: skip
def test_each_model_is_served_as_what_it_is(activation, task, others, export, png, tmp_path):
    found = _meaning(export, tmp_path / "other", activation)
    recipe = read_model_file(Preprocessing, export / "preprocessing.json")
    pixels = recipe.image_to_tensor(Image.open(io.BytesIO(png))).numpy()
    logits = torch.from_numpy(open_session(export / "model.onnx").run(None, {"pixels": pixels[None]})[0][0])
    names = json.loads((export / "classes.json").read_text())
    with running(found, "--max-batch", "1", "--threads", "1") as server:
        about = httpx.get(f"{server.url}/v1/artifact").json()
        assert (about["task"], about["activation"], about["classes"]) == (task, activation, names)
        answer, *refused = (
            httpx.post(f"{server.url}/v1/{name}", content=png, headers={"Content-Type": "image/png"})
            for name in (task, *others)
        )
    assert [(reply.status_code, reply.json()["error"]["fix"]) for reply in refused] == [(404, f"use /v1/{task}")] * 2
    result = answer.json()["results"][0]
    if task == "predict":
        assert result == {"values": [{"index": i, "name": names[i], "value": float(logits[i])} for i in range(5)]}
        return
    shares = torch.tensor([entry["probability"] for entry in result["classes"]])
    best = logits.argsort(descending=True)
    assert [entry["index"] for entry in result["classes"]] == best.tolist()
    torch.testing.assert_close(shares, logits.sigmoid()[best], rtol=1e-6, atol=0)
    assert abs(float(shares.sum()) - 1) > 0.1
