"""Pictures in, classes out: the same numbers as ONNX Runtime called directly on the same preprocessed image."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image
from running_server import running
from tiny_exports import write_export

from exporters.graph.runtime import open_session
from fp8pipe.artifact import open_artifact
from fp8pipe.models.vision.answers import probabilities
from fp8pipe.models.vision.preprocessing import Preprocessing, read_model_file


def _encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _direct(export, data):
    """(C,) logits of one file, by ONNX Runtime alone."""
    recipe = read_model_file(Preprocessing, export / "preprocessing.json")
    pixels = recipe.image_to_tensor(Image.open(io.BytesIO(data))).numpy()
    return open_session(export / "model.onnx").run(None, {"pixels": pixels[None]})[0][0]


def _shares(result):
    return {found["index"]: found["probability"] for found in result["classes"]}


def _classify(server, data, kind="image/png", **parameters):
    return httpx.post(f"{server.url}/v1/classify", content=data, headers={"Content-Type": kind}, params=parameters)


def _expected(export, data):
    return {i: float(p) for i, p in enumerate(probabilities(_direct(export, data)[None], "softmax")[0])}


def test_a_raw_body_gives_the_direct_result_bit_for_bit(server, export, png):
    answer = _classify(server, png, top_k=5)
    assert answer.status_code == 200, answer.text
    assert _shares(answer.json()["results"][0]) == _expected(export, png)
    names = json.loads((export / "classes.json").read_text())
    assert all(found["name"] == names[found["index"]] for found in answer.json()["results"][0]["classes"])
    assert answer.headers["x-fp8pipe-artifact"] == f"sha256:{open_artifact(export).digest}"


def test_many_images_in_one_request_keep_their_bits_and_order(server, export):
    random = np.random.default_rng(1)
    files = [_encoded(Image.fromarray(random.integers(0, 256, (33, 50, 3), dtype=np.uint8)), "PNG") for _ in range(7)]
    parts = [("image", (f"../../{i}.png", data, "image/png")) for i, data in enumerate(files)]
    answer = httpx.post(f"{server.url}/v1/classify", files=parts, data={"top_k": "5"})
    assert answer.status_code == 200, answer.text
    assert [_shares(result) for result in answer.json()["results"]] == [_expected(export, data) for data in files]


def test_json_with_base64(server, export, png):
    text = base64.b64encode(png).decode()
    sent = {"images": [text, f"data:image/png;base64,{text}"], "top_k": 2}
    answer = httpx.post(f"{server.url}/v1/classify", json=sent)
    assert answer.status_code == 200, answer.text
    best = sorted(_expected(export, png).items(), key=lambda item: -item[1])[:2]
    assert [list(_shares(result).items()) for result in answer.json()["results"]] == [best, best]


def _rotated(picture):
    exif = picture.getexif()
    exif[0x0112] = 6
    return _encoded(picture, "PNG", exif=exif)


@pytest.mark.parametrize("make", [
    lambda p: _encoded(p.convert("CMYK"), "JPEG"),
    lambda p: _encoded(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) * 27), "PNG"),
    _rotated,
    lambda p: _encoded(p, "GIF", save_all=True, append_images=[p.rotate(90), p.rotate(180)]),
    lambda p: _encoded(p.convert("RGBA"), "WEBP", lossless=True),
    lambda p: _encoded(p.convert("1"), "TIFF"),
    lambda p: _encoded(p.convert("P"), "BMP"),
], ids=["cmyk", "16-bit", "exif", "animated", "rgba", "1-bit", "palette"])  # fmt: skip
def test_unusual_pictures_are_read_as_in_calibration(server, export, picture, make):
    data = make(picture)
    answer = _classify(server, data, "application/octet-stream", top_k=5)
    assert answer.status_code == 200, answer.text
    assert _shares(answer.json()["results"][0]) == _expected(export, data)


def test_a_backbone_gives_its_features(tmp_path, png):
    export = write_export(tmp_path, "timm-vit-qk-norm")
    with running(export, "--max-batch", "2", "--threads", "1") as server:
        answer = httpx.post(f"{server.url}/v1/embed", content=png, headers={"Content-Type": "image/png"})
        assert answer.status_code == 200, answer.text
        features = np.array(answer.json()["results"][0]["embedding"], np.float32)
        assert np.array_equal(features, _direct(export, png))
        refused = _classify(server, png)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "no_classes"
