"""Quantize a float ONNX graph to INT8 with NNCF for OpenVINO, as its guide for transformers says.

    python quantize_nncf.py GRAPH CALIBRATION OUTPUT

CALIBRATION is an array (N, 3, H, W) in a .npy file. Runs in OpenVINO's environment.
"""

from __future__ import annotations

import sys

import nncf
import numpy as np
import openvino


def main() -> None:
    graph, calibration, output = sys.argv[1:]
    images = np.load(calibration)
    model = openvino.Core().read_model(graph)
    data = nncf.Dataset([image[None] for image in images])
    found = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images))
    openvino.save_model(found, output, compress_to_fp16=False)


if __name__ == "__main__":
    main()
