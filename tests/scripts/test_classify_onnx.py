"""The stand-alone classifier: pixels bit for bit those of training, no torch, the export's own classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quantized_families import quantized_family, write_vit_artifact
from script_modules import load_script

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.quantized import load_quantized

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "classify_onnx.py"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


def _picture(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    width, height = size
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    rgb = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return rgb if mode == "RGBA" else rgb.convert("RGB").convert(mode)


RECIPES = [
    {"resize": 37, "crop": [32, 32], "interpolation": "bicubic"},
    {"resize": 40, "crop": [31, 38], "interpolation": "bilinear"},
    {"resize": [33, 47], "crop": [32, 40], "interpolation": "nearest"},
    {"resize": 24, "crop": [24, 24], "interpolation": "bicubic"},
    {"resize": 37, "crop": [32, 32], "interpolation": "lanczos", "anchor": "down"},
    {"resize": [37, 53], "ratio": "cover", "crop": [32, 46], "interpolation": "bicubic"},
    {"resize": [32, 32], "ratio": "fit", "crop": [31, 31], "interpolation": "hamming", "padding": [124, 116, 104]},
    {"resize": 57, "crop": [32, 32], "interpolation": "bicubic", "resizer": "torchvision", "transparency": "white"},
    {"resize": [33, 47], "crop": [32, 40], "interpolation": "bilinear", "resizer": "torchvision"},
    {"resize": 37, "crop": [32, 32], "interpolation": "lanczos", "resizer": "torchvision"},
    {"resize": None, "crop": [40, 45], "interpolation": "box", "padding": [0, 0, 0], "anchor": "corner"},
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1"])
def test_pixels_are_those_of_training_bit_for_bit(script, tmp_path, recipe, mode):
    whole = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "channels": "rgb", "divisor": 255, **recipe}
    preprocessing = Preprocessing.model_validate(whole)
    for seed, size in enumerate([(50, 41), (40, 97), (24, 24), (33, 33)]):
        path = tmp_path / f"{seed}.{'tif' if mode == 'CMYK' else 'png'}"
        picture = _picture(mode, size, seed)
        exif = Image.Exif()
        exif[0x0112] = [1, 3, 6, 8][seed]  # orientation
        picture.save(path, exif=exif)
        expected = preprocessing.image_to_tensor(Image.open(path))
        found = torch.from_numpy(script.preprocess(script.read_rgb(path, whole), whole))
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


def test_it_runs_without_torch_and_names_torchs_class(tmp_path):
    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit"))
    export = export_onnx(artifact.root, tmp_path / "onnx", OnnxExportOptions())
    _picture("RGB", (60, 44), 3).save(tmp_path / "a.png")
    # Imports of these fail, as where they are not installed.
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'fp8pipe', 'timm', 'onnx', 'exporters')))\n"
    code = f"{blocked}import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT, export.root, tmp_path / "a.png", "--top", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, cwd=tmp_path)
    quantized = load_quantized(artifact.root)
    with torch.no_grad():
        logits = quantized(quantized.preprocessing.image_to_tensor(Image.open(tmp_path / "a.png"))[None])[0]
    share, best = logits.softmax(0).max(0)
    assert done.stdout.startswith(f"{tmp_path / 'a.png'}: {quantized.architecture.classes[best]} ")
    assert float(done.stdout.split()[-1].rstrip("%")) / 100 == pytest.approx(float(share), abs=0.02)


def test_the_accuracy_on_a_folder_is_torchs(script, tmp_path, capsys, monkeypatch):
    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit"))
    export = export_onnx(artifact.root, tmp_path / "onnx", OnnxExportOptions())
    quantized = load_quantized(artifact.root)
    right = 0
    for seed, name in enumerate(["bee", "ant", "bee", "elk", "dog", "cat"]):
        path = tmp_path / "pictures" / name / f"{seed}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        _picture("RGB", (60, 44), seed).save(path)
        with torch.no_grad():
            logits = quantized(quantized.preprocessing.image_to_tensor(Image.open(path))[None])
        right += quantized.architecture.classes[int(logits.argmax())] == name
    (tmp_path / "pictures" / "ant" / "notes.txt").write_text("no picture")
    monkeypatch.setattr(sys, "argv", ["classify_onnx.py", str(export.root), str(tmp_path / "pictures")])
    script.main()
    assert capsys.readouterr().out == f"top-1 {right / 6:.4f} ({right} of 6), top-5 1.0000\n"
    (tmp_path / "pictures" / "yak").mkdir()
    with pytest.raises(SystemExit, match="no class yak"):
        script.main()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    for name in ("broken.png", "nowhere.png"):
        monkeypatch.setattr(sys, "argv", ["classify_onnx.py", str(export.root), str(tmp_path / name)])
        with pytest.raises(SystemExit, match=f"{name} cannot be read as an image"):
            script.main()
