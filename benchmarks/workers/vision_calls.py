"""Calls of a vision model in one engine, timed once per round: the worker of every contender on vision graphs.

    python vision_calls.py ENGINE GRAPH --heldout heldout.npy --reference OUTPUTS --threads 2 --calls 10

ENGINE is `onnxruntime` (its default session); `fp8pipe` (ONNX Runtime with this project's session settings); `openvino`
with floating point in fp32, or `openvino-default` in the type that it chooses (bf16 where the processor has it); or
`inductor` and `inductor-int8`, for which GRAPH is a model directory. Figures of a round: the median time of a call with
one image and with eight, in ms. `output_error` is the norm of the difference of the outputs for the held-out images
from REFERENCE, over the norm of that; if that file is missing, the outputs are written there.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from protocol import serve

BATCHES = (1, 8)
ENGINES = ("onnxruntime", "fp8pipe", "openvino", "openvino-default", "inductor", "inductor-int8")


def onnxruntime_calls(graph, threads, own):
    """A call in ONNX Runtime, with its default session or with that of this project."""
    if own:
        from exporters.graph.runtime import open_session

        session = open_session(graph, threads=threads)
    else:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda pixels: session.run(None, {name: pixels})[0]


def openvino_calls(graph, threads, exact):
    """A call in OpenVINO on the CPU, compiled for low latency; `exact`: with floating point in fp32."""
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    compiled = core.compile_model(model, "CPU", settings)
    output = compiled.output(0)
    return lambda pixels: compiled([pixels])[output]


def inductor_calls(folder, threads, calibration):
    """A call of the model compiled by torch's inductor; with calibration images, quantized to INT8 for x86 first."""
    import torch

    from fp8pipe.models.vision.prepare import vision_outputs
    from fp8pipe.models.vision.sources import load_vision_model

    torch.set_num_threads(threads)
    vision = load_vision_model(str(folder)).model

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = vision

        def forward(self, pixels):
            return vision_outputs(self.model, pixels)

    forward = Exported().eval()
    if calibration is None:
        compiled = dict.fromkeys(BATCHES, torch.compile(forward, dynamic=False, options={"freezing": True}))
    else:
        compiled = {batch: quantized(forward, calibration, batch) for batch in BATCHES}

    def call(pixels):
        with torch.no_grad():
            return compiled[len(pixels)](torch.from_numpy(pixels)).numpy()

    return call


def quantized(forward, calibration, batch):
    """The module with INT8 products, by torchao's quantizer for x86, compiled for one batch size."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    images = torch.from_numpy(np.resize(calibration, (-(-len(calibration) // batch) * batch, *calibration.shape[1:])))
    with torch.no_grad():
        exported = torch.export.export(forward, (images[:batch],), strict=True).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(exported, quantizer)
        for part in images.split(batch):
            prepared(part)
        return torch.compile(convert_pt2e(prepared), dynamic=False, options={"freezing": True})


def open_engine(options):
    """The function from pixels (N, 3, H, W) to outputs that the command line names."""
    if options.engine.startswith("openvino"):
        return openvino_calls(options.graph, options.threads, options.engine == "openvino")
    if options.engine.startswith("inductor"):
        images = np.load(options.calibration) if options.engine == "inductor-int8" else None
        return inductor_calls(options.graph, options.threads, images)
    return onnxruntime_calls(options.graph, options.threads, options.engine == "fp8pipe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="outputs of the float model; written if missing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=10)
    options = parser.parse_args()
    call = open_engine(options)
    heldout = np.load(options.heldout)
    outputs = np.concatenate([np.asarray(call(one[None])) for one in heldout])
    if not options.reference.exists():
        np.save(options.reference, outputs)
    true = np.load(options.reference).astype(np.float64)
    error = float(np.linalg.norm(outputs - true) / np.linalg.norm(true))
    inputs = {batch: np.resize(heldout, (batch, *heldout.shape[1:])) for batch in BATCHES}
    for pixels in inputs.values():
        call(pixels)

    def work():
        figures = {"output_error": error}
        for batch, pixels in inputs.items():
            times = []
            for _ in range(options.calls):
                started = time.perf_counter()
                call(pixels)
                times.append(1000 * (time.perf_counter() - started))
            figures[f"ms_batch_{batch}"] = median(times)
        return figures

    serve(work, engine=options.engine)


if __name__ == "__main__":
    sys.exit(main())
