"""ViT-S in INT8 on the CPU: this project's ONNX export against other quantizers and engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from comparison.environments import Environment, peer, project
from comparison.harness import Comparison, Contender, Running, Settings, worker
from comparison.models import fresh, project_script
from comparison.processes import WORKERS, environment_of, run_measured
from comparison.results import Metric

OURS = "fp8pipe in ONNX Runtime"
_METRICS = (
    Metric(name="ms_batch_1", label="ms, 1 image", better="lower"),
    Metric(name="ms_batch_8", label="ms, 8 images", better="lower"),
    Metric(name="output_error", label="relative error of the outputs", better="none"),
)
_ABOUT = """{model} at {size} pixels on {threads} threads. Every quantizer gets
the same float graph or model and the same {images} calibration images, and none trains. A figure is the time of one
call, with one image and with eight; a round has {calls} calls of each. *Relative error* is the distance of the
outputs from those of the float graph on {images} other images, over the norm of the latter: a graph that is fast
because it is wrong shows there.

* `ONNX Runtime, static`: `quantize_static`, per channel, U8S8; `dynamic`: `quantize_dynamic`, linear layers only.
* `ModelOpt`: `modelopt.onnx.quantization --quantize_mode int8`, run in ONNX Runtime.
* `OpenVINO, NNCF`: `nncf.quantize` for transformers; `fp8pipe in OpenVINO`: this project's ONNX file there. OpenVINO
  computes floating point in fp32, as the other engines do, and in `bf16` in the type that it chooses itself, which is
  bf16 where the processor has instructions for it.
* `torch inductor`: `torch.compile` with freezing; `INT8`: torchao's quantizer for x86 first."""


def prepare(settings: Settings) -> tuple[Path, int]:
    """Write graphs and images, unless they are there.

    Returns:
        Their directory, see `workers/prepare_vision.py`, and the side of the images in pixels.

    Raises:
        ContenderError: they cannot be written, for instance because the sample is not installed.
    """
    folder = settings.work / "vision"
    model, size, images = settings.choose(("sample:vit-s", 224, 16), ("sample:vit-digits", 24, 4))
    if not folder.exists():
        part = settings.work / "vision.partial"  # so that what an interrupted run leaves is not used
        fresh(part)
        part.mkdir()
        arguments = [part, "--model", model, "--image-size", str(size), "--images", str(images)]
        project_script(settings, WORKERS / "prepare_vision.py", arguments, "prepare-vision.log")
        part.rename(folder)
    return folder, size


def build(settings: Settings) -> Comparison:
    """The comparison on the sample ViT-S."""
    folder, size = prepare(settings)
    what = settings.choose("A trained ViT-S/14 (`sample:vit-s`, features)", "A tiny model (`sample:vit-digits`)")
    images, calls = len(np.load(folder / "heldout.npy")), settings.choose(10, 3)
    usual = project("onnxruntime", "torch")
    openvino, modelopt, torchao = (peer(name, settings.environments) for name in ("openvino", "modelopt", "torchao"))

    def contender(name: str, where: Environment, engine: str, graph: Path, *, ours: bool = False) -> Contender:
        arguments = [engine, graph, "--heldout", folder / "heldout.npy", "--reference", folder / "reference.npy",
                     "--calibration", folder / "calibration.npy", "--threads", str(settings.threads),
                     "--calls", str(calls)]  # fmt: skip
        log = settings.work / f"vision-{name.replace(', ', '-').replace(' ', '-')}.log"
        variables = {"OMP_NUM_THREADS": str(settings.threads), "ORT_DISABLE_TELEMETRY": "1"}
        return worker(name, where, WORKERS / "vision_calls.py", arguments, log, ours=ours, **variables)

    by_modelopt = contender("ModelOpt in ONNX Runtime", usual, "onnxruntime", folder / "modelopt.onnx")
    ours = folder / "ours" / "model.onnx"
    return Comparison(
        title="A vision transformer in INT8 on the CPU",
        about=_ABOUT.format(model=what, size=size, threads=settings.threads, images=images, calls=calls),
        metrics=_METRICS,
        contenders=(  # the float graph first, as it writes the reference
            contender("ONNX Runtime, fp32", usual, "onnxruntime", folder / "float.onnx"),
            contender(OURS, usual, "fp8pipe", ours, ours=True),
            contender("fp8pipe in OpenVINO", openvino, "openvino", ours),
            contender("fp8pipe in OpenVINO, bf16", openvino, "openvino-default", ours),
            contender("ONNX Runtime, static", usual, "onnxruntime", folder / "static.onnx"),
            contender("ONNX Runtime, dynamic", usual, "onnxruntime", folder / "dynamic.onnx"),
            _after(by_modelopt, modelopt, lambda: _quantize_modelopt(settings, modelopt, folder)),
            contender("OpenVINO, fp32", openvino, "openvino", folder / "float.onnx"),
            *(_after(contender(name, openvino, engine, folder / "nncf.xml"), openvino,
                     lambda: _quantize_nncf(settings, openvino, folder))
              for name, engine in (("OpenVINO, NNCF", "openvino"), ("OpenVINO, NNCF, bf16", "openvino-default"))),
            contender("torch inductor, fp32", usual, "inductor", folder / "model"),
            contender("torch inductor, INT8", torchao, "inductor-int8", folder / "model"),
        ),
        baseline=OURS,
        rounds=settings.choose(9, 1),
        warmup=settings.choose(1, 0),
    )  # fmt: skip


def _after(contender: Contender, where: Environment, prepare: Callable[[], None]) -> Contender:
    """A contender that first quantizes its graph, whose versions are those of the quantizer."""

    def start() -> Running:
        prepare()
        return contender.start()

    return Contender(contender.name, where, start)


def _quantize_nncf(settings: Settings, where: Environment, folder: Path) -> None:
    output = folder / "nncf.xml"
    if not output.exists():
        command = [where.python(), WORKERS / "quantize_nncf.py", folder / "float.onnx", folder / "calibration.npy"]
        log = settings.work / "quantize-nncf.log"
        run_measured([*command, output], log, environment=environment_of(project=False))


def _quantize_modelopt(settings: Settings, where: Environment, folder: Path) -> None:
    output = folder / "modelopt.onnx"
    if not output.exists():
        command = modelopt_command(where.python(), folder / "float.onnx", folder / "calibration.npy", output, "int8")
        log = settings.work / "quantize-modelopt.log"
        run_measured(command, log, environment=environment_of(project=False))


def modelopt_command(python: Path | str, graph: Path, data: Path, output: Path, mode: str) -> list[str]:
    """ModelOpt's command line.

    Args:
        python: the interpreter of an environment with ModelOpt.
        graph: the float graph.
        data: a .npy file with calibration images (N, 3, H, W).
        output: the file to write.
        mode: `int8` or `fp8`.
    """
    return [str(python), "-m", "modelopt.onnx.quantization", f"--onnx_path={graph}", f"--quantize_mode={mode}",
            f"--calibration_data_path={data}", f"--output_path={output}", "--calibration_eps", "cpu"]  # fmt: skip
