"""Compare the INT8 and FP8 graphs of a vision transformer with those of ModelOpt's and ONNX Runtime's quantizers.

All quantizers start from the same model and use the same calibration images, those of the artifact. The script compares
the size of the file; the number of matrix multiplications and convolutions that TensorRT for RTX computes in low
precision and of attentions that it fuses, as reported for the built engine; the number of these operators that ONNX
Runtime computes with integers; top-1 accuracy on held-out images; and the processor time of a call in ONNX Runtime on
this CPU. All files are timed in turn, and the speed-up is the ratio to the float graph in the same round.

    fp8pipe quantize-vit --model runs/vit-s --bits w8a8 --distill-steps 0 --images 64 --output runs/vits-w8a8
    fp8pipe quantize-vit --model runs/vit-s --bits wfp8afp8 --distill-steps 0 --calibration artifact:runs/vits-w8a8 \\
        --images 64 --output runs/vits-fp8
    python benchmarks/onnx_peers.py --model runs/vit-s --int8 runs/vits-w8a8 --fp8 runs/vits-fp8 \\
        --pictures runs/cifar10/held-out --modelopt-python MODELOPT/bin/python --work runs/peers

MODELOPT is a separate Python environment with `nvidia-modelopt[onnx]` and `requests`. Without `--modelopt-python`, the
rows of ModelOpt are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from comparison.vision import modelopt_command

from exporters.graph.images import folder_images, probe_images
from exporters.graph.runtime import open_session
from exporters.graph.trace import trace_float
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.tensorrt.builder import build_rtx
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.listing import read_precision
from exporters.tensorrt.target import TrtExportOptions
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import Fp8PipeError, one_line
from fp8pipe.models.vision.sources import load_vision_model
from fp8pipe.models.vision.structure import read_structure
from fp8pipe.numerics.bf16 import widen_bf16_products

PRODUCTS = ("MatMul", "Gemm", "Conv")
INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "QLinearConv", "ConvInteger", "MatMulInteger")
CAPABILITY = "8.9"


def float_graph(model, path):
    """Write the unquantized model as an ONNX graph (opset 21, dynamic batch size); returns the loaded model."""
    vision = load_vision_model(model)
    traced = trace_float(vision.model, read_structure(vision.model, vision.architecture.image_size))
    for index, node in enumerate(traced.model.graph):
        node.name = node.name or f"node_{index}"
    ir.save(traced.model, path)
    return vision


class Images:
    """A calibration data reader, as ONNX Runtime's quantizer expects it; `pixels` are `(N, 3, H, W)`."""

    def __init__(self, pixels):
        self._left = iter([{"pixels": one[None]} for one in pixels])

    def get_next(self):
        """The next image as the input of the model; None after the last one."""
        return next(self._left, None)


def onnxruntime_static(graph, pixels, output, symmetric):
    """Quantize a graph with ONNX Runtime's `quantize_static`, per channel.

    Args:
        graph: the float graph.
        pixels: calibration images `(N, 3, H, W)`.
        output: the file to write.
        symmetric: whether activations are quantized symmetrically to INT8, as TensorRT requires; otherwise to UINT8.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    extra = {"ActivationSymmetric": symmetric}
    quantize_static(
        str(graph), str(output), Images(pixels), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax, extra_options=extra,
    )  # fmt: skip


def modelopt(python, graph, pixels, output, mode):
    """Quantize a graph with ModelOpt's command line.

    Args:
        python: the Python interpreter of an environment with ModelOpt.
        graph: the float graph.
        pixels: calibration images `(N, 3, H, W)`.
        output: the file to write.
        mode: `int8` or `fp8`.

    Raises:
        RuntimeError: ModelOpt failed.
    """
    data = output.with_suffix(".npy")
    np.save(data, pixels)
    command = modelopt_command(python, graph, data, output, mode)
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode or not output.is_file():
        raise RuntimeError(f"ModelOpt ({mode}) ended with {ended.returncode}: {ended.stderr.strip()[-400:]}")


def engine(path, work, size):
    """Build an engine and describe it.

    Args:
        path: the graph.
        work: directory for the engine.
        size: (height, width) of the images.

    Returns:
        The number of matrix multiplications and convolutions by precision, the number of fused attentions and the size
        of the engine in MB; or the builder's error as `refused`.
    """
    nodes = [node.name for node in ir.load(path).graph if node.op_type in PRODUCTS]
    target = work / "engine"
    shapes = tuple((count, 3, *size) for count in (1, 8, 32))
    try:
        built = build_rtx(path, target, [CAPABILITY], {"pixels": shapes})
    except Fp8PipeError as error:
        return {"refused": one_line(error, 200)}
    report = read_precision(nodes, built.layers)
    fused = sum(product.fused_attention for product in report.products) // 2
    return {"products": report.counts(), "fused_attentions": fused, "engine_mb": target.stat().st_size / 1e6}


def integer_products(path, ours):
    """The number of operators in ONNX Runtime's optimized graph that multiply integers; for `ours` see `open_cpu`."""
    optimized = path.with_suffix(".optimized.onnx")
    open_cpu(path, ours, optimized=optimized)
    found = sum(node.op_type in INTEGER for node in ir.load(optimized).graph)
    optimized.unlink()
    return found


def open_cpu(path, ours, optimized=None):
    """Open a graph in ONNX Runtime on the CPU with one thread.

    Args:
        path: the graph.
        ours: whether to use the session settings of fp8pipe; otherwise ONNX Runtime's defaults.
        optimized: a file to which ONNX Runtime writes the optimized graph; None for none.
    """
    if ours:
        return open_session(path, threads=1, write_to=optimized)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(session, pixels, labels):
    """Top-1 accuracy of a session on images `(N, 3, H, W)`, as a fraction; `labels` are class indices `(N,)`."""
    outputs = np.concatenate([session.run(["logits"], {"pixels": x})[0] for x in np.array_split(pixels, 16)])
    return float((outputs.argmax(1) == labels).mean())


def timed(sessions, rounds):
    """Time calls of all sessions in turn, with one image.

    Returns:
        For each session, the median processor time of a call in ms, and the median speed-up over the first session in
        the same round.
    """
    pixels = np.zeros((1, *sessions[0].get_inputs()[0].shape[1:]), np.float32)
    times = [[] for _ in sessions]
    for turn in range(rounds + 1):
        for session, kept in zip(sessions, times, strict=True):
            started = time.process_time()
            session.run(None, {"pixels": pixels})
            if turn:
                kept.append(time.process_time() - started)
    return [(1000 * median(t), median(a / b for a, b in zip(times[0], t, strict=True))) for t in times]


def write_files(options, vision):
    """Write all quantized graphs.

    Returns:
        For each graph by name, its path and whether ONNX Runtime runs it with fp8pipe's session settings; and the
        errors of the quantizers that failed, by name.
    """
    work, files, failed = options.work, {"float": (options.work / "float.onnx", False)}, {}
    calibration = probe_images(options.int8, vision.preprocessing).pixels.numpy()

    def attempt(name, make):
        path = work / f"{name.replace(' ', '-')}.onnx"
        try:
            make(path)
            files[name] = (path, False)
        except Exception as error:  # the failure of another quantizer is a result, too
            failed[name] = one_line(error)

    qdq = export_onnx(options.int8, work / "ours-int8-onnx", build_config(OnnxExportOptions, {"force": True}))
    files["ours int8, onnx"] = (qdq.root / "model.onnx", True)
    for name, artifact in (("int8", options.int8), ("fp8", options.fp8)):
        config = build_config(TrtExportOptions, {"force": True, "compute_capabilities": [CAPABILITY]})
        exported = export_tensorrt(artifact, work / f"ours-{name}-trt", config)
        files[f"ours {name}, trt"] = (exported.root / "model.onnx", False)
    attempt("onnxruntime s8", lambda path: onnxruntime_static(work / "float.onnx", calibration, path, True))
    attempt("onnxruntime u8", lambda path: onnxruntime_static(work / "float.onnx", calibration, path, False))
    if options.modelopt_python:
        for mode in ("int8", "fp8"):
            make = partial(modelopt, options.modelopt_python, work / "float.onnx", calibration, mode=mode)
            attempt(f"modelopt {mode}", make)
    return files, failed


def main():
    """Write all graphs, measure them, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--int8", type=Path, required=True, help="artifact with integer codes, for instance w8a8")
    parser.add_argument("--fp8", type=Path, required=True, help="artifact with FP8 codes (wfp8afp8)")
    parser.add_argument("--pictures", type=Path, required=True, help="held-out images, one folder per class")
    parser.add_argument("--modelopt-python", help="Python of an environment with nvidia-modelopt[onnx]")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    widen_bf16_products()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    vision = float_graph(options.model, options.work / "float.onnx")
    files, failed = write_files(options, vision)
    images = folder_images(options.pictures, vision.preprocessing)
    from fp8pipe.models.vision.image_folder import read_image_folder

    folder = read_image_folder(options.pictures)
    rows = torch.randperm(len(folder.files), generator=torch.Generator().manual_seed(0))[: len(images.pixels)]
    labels = np.array([folder.labels[row] for row in sorted(rows.tolist())])
    found = {}
    for name, (path, ours) in files.items():
        found[name] = {"file_mb": path.stat().st_size / 1e6, "integer_products": integer_products(path, ours)}
        found[name] |= engine(path, options.work, vision.architecture.image_size)
        found[name]["top1"] = accuracy(open_cpu(path, ours), images.pixels.numpy(), labels)
    times = timed([open_cpu(path, ours) for path, ours in files.values()], options.rounds)
    for (name, row), (milliseconds, ratio) in zip(found.items(), times, strict=True):
        row |= {"ms": milliseconds, "speed_up": ratio}
        print(f"{name:16} {row['file_mb']:6.1f} MB  {milliseconds:7.1f} ms {ratio:5.2f}x  top-1 {row['top1']:.3f}  "
              f"{row['integer_products']:3} on integers in ORT  {row.get('products', row.get('refused'))}  "
              f"{row.get('fused_attentions', '')} fused  {row.get('engine_mb', 0):.1f} MB engine")  # fmt: skip
    for name, why in failed.items():
        print(f"{name:16} failed: {why}")
    print(json.dumps({"rows": found, "failed": failed, "onnxruntime": onnxruntime.__version__}))


if __name__ == "__main__":
    main()
