"""Write what the comparison of vision graphs starts from: a vision transformer as graphs, and images.

    python prepare_vision.py FOLDER --model sample:vit-s --image-size 224 --images 16

Everything is made from the model and the same calibration images ("dead leaves", which are generated without a
model): `float.onnx`, `dynamic.onnx` and `static.onnx` (ONNX Runtime's quantizers), `artifact` and `ours` (this
project's W8A8 artifact and its ONNX export), and the images as arrays (N, 3, H, W): `calibration.npy`, `heldout.npy`.
Runs in this project's environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx_peers
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from calibration.dead_leaves import dead_leaves
from exporters.graph.images import probe_images
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.sources import load_vision_model, save_vision_model
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.stage import quantize_vit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="sample:vit-s")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    folder = options.folder
    side = options.image_size
    save_vision_model(load_vision_model(options.model, (side, side)), folder / "model")
    vision = onnx_peers.float_graph(str(folder / "model"), folder / "float.onnx")
    settings = {
        "model": str(folder / "model"), "bits": "w8a8", "synthesis": {"steps": 0}, "images": options.images,
        "distill": {"steps": 0, "save_every": 0},
    }  # fmt: skip
    artifact = quantize_vit(build_config(QuantizeVitConfig, settings), folder / "artifact").root
    np.save(folder / "calibration.npy", probe_images(artifact, vision.preprocessing).pixels.numpy())
    drawn = dead_leaves(1, 0, options.images, (side, side))
    np.save(folder / "heldout.npy", vision.preprocessing.normalize((255 * drawn).round().to(torch.uint8)).numpy())
    export_onnx(artifact, folder / "ours", OnnxExportOptions())
    quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", per_channel=True, weight_type=QuantType.QInt8)
    pixels = np.load(folder / "calibration.npy")
    onnx_peers.onnxruntime_static(folder / "float.onnx", pixels, folder / "static.onnx", False)


if __name__ == "__main__":
    main()
