"""Turns an export into a model repository of the Triton Inference Server, for deployments that already run Triton.

    DIR/NAME/config.pbtxt      what Triton needs to know, from the export's manifest
    DIR/NAME/labels.txt        class names, if the export has them
    DIR/NAME/1/model.onnx      or, for a language export, 1/model.json and 1/checkpoint/

Triton does not preprocess images: clients send what the export's `preprocessing.json` describes. That file is copied
beside the configuration, and so is the manifest, so that a served model can be traced to its artifact.

The result of a graph must not depend on settings that Triton does not pass on. Its ONNX Runtime backend passes a single
session entry to the runtime (an allocator's) and no list of optimizers (`ModelState` in its src/onnxruntime.cc,
2026-06). With the runtime's defaults integer sums saturate on x64 processors without VNNI, a classifier runs in float,
and activations are rounded to 8 bits next to INT4 weights, all silently. So for CPUs the graph is written as optimized
under the export's own settings: it contains integer operators, and no default replaces them. Then both are run, the
export as it was validated and the new file as Triton will run it, and must agree in every bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.graph.formats import CLASSES_FILE, MODEL_FILE, GraphDetails
from exporters.graph.runtime import PRECISION_MODE, has_vnni, import_onnx_package, open_session
from exporters.target import call, open_export
from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, Artifact, open_artifact, sha256_file, translate_disk_full
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError
from fp8pipe.core.plan import PhaseMeter, Plan, can_measure, missing_disk

_IMAGES: Final = 4
# Three times the range of normalized pixels: many activations saturate, where sums are largest.
_PIXEL_SPREAD: Final = 3.0


class TritonDevice(StrEnum):
    """Where Triton will compute."""

    CPU = "cpu"
    CPU_VNNI = "cpu-vnni"
    GPU = "gpu"


def write_graph(source: Path, target: Path, device: TritonDevice, entries: Mapping[str, str]) -> int:
    """Write the graph of an ONNX export for a device; returns the number of outputs per image.

    `CPU` computes the same on any processor; `CPU_VNNI` about twice as fast on one with VNNI; `GPU` uses the Q/DQ graph
    unchanged. `entries` are the session entries that the export was validated with.

    Raises:
        BadArtifactError: ONNX Runtime refuses the graph, or its number of outputs is not fixed.
        GateFailedError: the outputs of the two graphs differ in a bit.
        MissingCapabilityError: a graph for VNNI cannot be compared on a processor without it.
    """
    proved = open_session(source)
    width = proved.get_outputs()[0].shape[-1]
    if not isinstance(width, int) or width < 1:
        raise BadArtifactError(
            f"{source} has no fixed number of outputs", why="Triton's configuration must state it", fix="export again"
        )
    if device is TritonDevice.GPU:
        shutil.copyfile(source, target)
        return width
    if device is TritonDevice.CPU_VNNI:
        if not has_vnni():
            raise MissingCapabilityError(
                "a graph for VNNI cannot be compared with the export here", why="this processor has no VNNI",
                fix="run this on a machine with Triton's processor, or use --device cpu, which suits all",
            )  # fmt: skip
        entries = {name: value for name, value in entries.items() if name != PRECISION_MODE}
    _optimize(source, target, entries)
    _compare(proved, _as_triton(target), target)
    return width


def _optimize(source: Path, target: Path, entries: Mapping[str, str]) -> None:
    open_session(source, write_to=target, portable=True, entries=entries)


def _as_triton(path: Path) -> Any:
    """A session as created by Triton's backend: all optimizations, no session entries."""
    runtime = import_onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(proved: Any, written: Any, path: Path) -> None:
    source = proved.get_inputs()[0]
    pixels = np.random.default_rng(0).normal(0.0, _PIXEL_SPREAD, (_IMAGES, *source.shape[1:])).astype(np.float32)
    expected, found = (session.run(None, {source.name: pixels})[0] for session in (proved, written))
    differing = int((expected.view(np.uint32) != found.view(np.uint32)).sum())
    if differing:
        raise GateFailedError(
            f"{path.name} for Triton does not compute what the export does",
            why=f"{differing} of {expected.size} outputs of {_IMAGES} random images are not equal bit for bit",
            fix="nothing was written; report this with the version of onnxruntime",
        )


_PREPROCESSING = "preprocessing.json"
_MAX_BATCH = 32


def write_triton_repository(
    export: Path, output: Path, *, device: TritonDevice = TritonDevice.CPU, max_model_len: int | None = None
) -> Path:
    """Write the repository; returns the folder of the model in it.

    The export's target provides the writer (`Service.repository`); `output` may exist and hold other models. `device`
    applies to vision exports, see `write_graph`; vLLM chooses its own. `max_model_len` is the context length of a
    language model in tokens; vLLM's default if None.

    Raises:
        BadArtifactError: the export's files do not match its manifest, or it is of another kind.
        ConfigurationError: the repository already has a model of that name.
        GateFailedError, MissingCapabilityError: as `write_graph`.
        OutOfMemoryError: the disk is full.
    """
    found, target = open_export(export, lambda known: known.service.repository)
    artifact = open_artifact(found.root)
    name = artifact.root.resolve().name
    root = output / name
    if root.exists():
        raise ConfigurationError(
            f"{root} already exists", why="an existing model is never overwritten", fix="give another --output"
        )
    partial = output / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "1").mkdir(parents=True)
    with translate_disk_full(output, artifact.size_bytes):
        config = call(target.service.repository or "", artifact, partial, name, device, max_model_len)
        (partial / "config.pbtxt").write_text(config, encoding="utf-8")
        for file in (MANIFEST_NAME, CHECKSUM_NAME):
            if (artifact.root / file).is_file():
                shutil.copyfile(artifact.root / file, partial / file)
    partial.rename(root)
    return root


def write_vision(artifact: Artifact, root: Path, name: str, device: TritonDevice, max_model_len: int | None) -> str:
    """Write the files of a graph; returns its config.pbtxt."""
    graph = root / "1" / MODEL_FILE
    width = write_graph(artifact.root / MODEL_FILE, graph, device, artifact.manifest.runtime.get("session_entries", {}))
    labels = _labels(artifact.root / CLASSES_FILE)
    if labels is not None:
        (root / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    if (artifact.root / _PREPROCESSING).is_file():
        shutil.copyfile(artifact.root / _PREPROCESSING, root / _PREPROCESSING)
    details = artifact.manifest.details_of(GraphDetails)
    dims = ", ".join(str(int(size)) for size in details.input.shape[1:])
    label = "" if labels is None else '\n    label_filename: "labels.txt"'
    parameters = {"fp8pipe_artifact": artifact.digest, "fp8pipe_graph": f"sha256:{sha256_file(graph)}"}
    said = "".join(_parameter(key, value) for key, value in parameters.items())
    return f"""# Written from the export's manifest, for --device {device.value}.
name: {_quoted(name)}
backend: "onnxruntime"
max_batch_size: {_MAX_BATCH}
input [
  {{
    name: {_quoted(details.input.name)}
    data_type: TYPE_FP32
    dims: [ {dims} ]
  }}
]
output [
  {{
    name: {_quoted(details.output.name)}
    data_type: TYPE_FP32
    dims: [ {width} ]{label}
  }}
]
instance_group [ {{ kind: {"KIND_GPU" if device is TritonDevice.GPU else "KIND_CPU"} }} ]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
{said}"""


def write_language(artifact: Artifact, root: Path, name: str, device: TritonDevice, max_model_len: int | None) -> str:
    """Write the files of a checkpoint for the vLLM backend; returns its config.pbtxt."""
    checkpoint = root / "1" / "checkpoint"
    for entry in artifact.manifest.files:
        (checkpoint / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.root / entry.path, checkpoint / entry.path)
    # Relative to the repository folder, in which Triton's container must be started; see the documentation.
    arguments: dict[str, Any] = {"model": f"{name}/1/checkpoint", "disable_log_stats": False}
    if max_model_len is not None:
        arguments["max_model_len"] = max_model_len
    (root / "1" / "model.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    # The backend adds inputs and outputs itself; vLLM does the batching, so Triton must not.
    return f"""# Written from the export's manifest.
name: {_quoted(name)}
backend: "vllm"
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ count: 1, kind: KIND_MODEL }} ]
{_parameter("fp8pipe_artifact", artifact.digest)}"""


def _quoted(text: str) -> str:
    """A string in protobuf's text format, which has the same ASCII escapes as JSON except \\u."""
    return json.dumps(text, ensure_ascii=False)


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}\n"


def _labels(path: Path) -> list[str] | None:
    """One name per line; line breaks inside names would shift all following ones, so they are replaced by spaces."""
    if not path.is_file():
        return None
    return [" ".join(str(label).split()) for label in json.loads(path.read_text(encoding="utf-8"))]


def plan_repository(artifact: Artifact, output: Path, device: TritonDevice) -> Plan:
    """Plan a model repository: a copy of the export's files, or its graph optimized for a CPU."""
    target = output / artifact.root.resolve().name
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})",),
        writes=(f"{target}{' (already exists: will be refused)' if target.exists() else ''}",),
        peak_memory_bytes=_repository_peak(artifact, device),
        disk_bytes=artifact.size_bytes,
        output_bytes=artifact.size_bytes,
        missing=missing_disk(output, artifact.size_bytes),
        facts={"kind": artifact.kind},
    )


def _repository_peak(artifact: Artifact, device: TritonDevice) -> int | None:
    """Peak memory of the only large step, which is run in a temporary folder."""
    if not can_measure():
        return None
    with PhaseMeter() as meter, tempfile.TemporaryDirectory() as scratch:
        meter.enter("graph")
        if isinstance(artifact.manifest.details, GraphDetails):
            entries = artifact.manifest.runtime.get("session_entries", {})
            write_graph(artifact.root / MODEL_FILE, Path(scratch) / MODEL_FILE, device, entries)
    return meter.phases["graph"].peak_bytes
