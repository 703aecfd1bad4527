"""An export as a model repository of the Triton Inference Server, for fleets that run Triton already.

    DIR/NAME/config.pbtxt      what Triton needs to know, from the export's manifest
    DIR/NAME/labels.txt        class names, where the export has them
    DIR/NAME/1/model.onnx      or, for a language export, 1/model.json and 1/checkpoint/

Triton does not prepare pictures: clients send what `preprocessing.json` of the export describes. That file is copied
beside the configuration, and the manifest too, so that a served model can be traced to its artifact.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.graph.details import GraphDetails, GraphInput
from exporters.target import call, open_export
from exporters.triton.graph import TritonDevice, write_graph
from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, Artifact, open_artifact, sha256_file, translate_disk_full
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.plan import PhaseMeter, Plan, can_measure, missing_disk

_MODEL, _CLASSES, _PREPROCESSING = "model.onnx", "classes.json", "preprocessing.json"
_MAX_BATCH = 32


def write_triton_repository(
    export: Path, output: Path, *, device: TritonDevice = TritonDevice.CPU, max_model_len: int | None = None
) -> Path:
    """Write the repository; the folder of the model in it.

    Args:
        export: one whose target says how (`Service.repository`).
        output: the repository; may exist, and may hold other models.
        device: of a vision export, see `write_graph`; vLLM chooses its own.
        max_model_len: context of a language model, tokens; vLLM's choice when None.

    Raises:
        BadArtifactError: the export's files are not those of its manifest, or it is of another kind.
        ConfigurationError: the model is there already.
        GateFailedError, MissingCapabilityError: as `write_graph`.
        OutOfMemoryError: the disk is full.
    """
    found, target = open_export(export, lambda known: known.service.repository)
    artifact = open_artifact(found.root)
    name = artifact.root.resolve().name
    root = output / name
    if root.exists():
        raise ConfigurationError(f"{root} exists already", why="nothing is overwritten", fix="give another --output")
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
    """The files of a graph, and its config.pbtxt."""
    graph = root / "1" / _MODEL
    width = write_graph(artifact.root / _MODEL, graph, device, artifact.manifest.runtime.get("session_entries", {}))
    labels = _labels(artifact.root / _CLASSES)
    if labels is not None:
        (root / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
    if (artifact.root / _PREPROCESSING).is_file():
        shutil.copyfile(artifact.root / _PREPROCESSING, root / _PREPROCESSING)
    details = artifact.manifest.details_of(GraphDetails)
    parameters = {"fp8pipe_artifact": artifact.digest, "fp8pipe_graph": f"sha256:{sha256_file(graph)}"}
    return _onnx_config(
        name, details.input, details.output.name, width, labelled=labels is not None, device=device,
        parameters=parameters,
    )  # fmt: skip


def _onnx_config(
    name: str, source: GraphInput, result: str, width: int, *, labelled: bool, device: TritonDevice,
    parameters: Mapping[str, str],
) -> str:  # fmt: skip
    dims = ", ".join(str(int(size)) for size in source.shape[1:])
    label = '\n    label_filename: "labels.txt"' if labelled else ""
    kind = "KIND_GPU" if device is TritonDevice.GPU else "KIND_CPU"
    said = "".join(_parameter(key, value) for key, value in parameters.items())
    return f"""# Written from the export's manifest, for --device {device.value}.
name: {_quoted(name)}
backend: "onnxruntime"
max_batch_size: {_MAX_BATCH}
input [
  {{
    name: {_quoted(source.name)}
    data_type: TYPE_FP32
    dims: [ {dims} ]
  }}
]
output [
  {{
    name: {_quoted(result)}
    data_type: TYPE_FP32
    dims: [ {width} ]{label}
  }}
]
instance_group [ {{ kind: {kind} }} ]
dynamic_batching {{ max_queue_delay_microseconds: 2000 }}
{said}"""


def write_language(artifact: Artifact, root: Path, name: str, device: TritonDevice, max_model_len: int | None) -> str:
    """The files of a checkpoint for the vLLM backend, and its config.pbtxt."""
    checkpoint = root / "1" / "checkpoint"
    for entry in artifact.manifest.files:
        (checkpoint / entry.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.root / entry.path, checkpoint / entry.path)
    # Relative to the repository's folder as Triton's container is told to start in it; see the documentation.
    arguments: dict[str, Any] = {"model": f"{name}/1/checkpoint", "disable_log_stats": False}
    if max_model_len is not None:
        arguments["max_model_len"] = max_model_len
    (root / "1" / "model.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    # The backend fills in inputs and outputs itself; vLLM batches, so Triton must not.
    return f"""# Written from the export's manifest.
name: {_quoted(name)}
backend: "vllm"
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ count: 1, kind: KIND_MODEL }} ]
{_parameter("fp8pipe_artifact", artifact.digest)}"""


def _quoted(text: str) -> str:
    """A string of protobuf's text format: JSON's ASCII escapes, but for \\u, are its own."""
    return json.dumps(text, ensure_ascii=False)


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}\n"


def _labels(path: Path) -> list[str] | None:
    """One name per line; line breaks inside names would shift all that follow."""
    if not path.is_file():
        return None
    return [" ".join(str(label).split()) for label in json.loads(path.read_text(encoding="utf-8"))]


def plan_repository(artifact: Artifact, output: Path, device: TritonDevice) -> Plan:
    """Plan a model repository: a copy of the export's files, or its graph as a CPU gets it."""
    target = output / artifact.root.resolve().name
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})",),
        writes=(f"{target}{' (exists already: will be refused)' if target.exists() else ''}",),
        peak_memory_bytes=_repository_peak(artifact, device),
        disk_bytes=artifact.size_bytes,
        output_bytes=artifact.size_bytes,
        missing=missing_disk(output, artifact.size_bytes),
        facts={"kind": artifact.kind},
    )


def _repository_peak(artifact: Artifact, device: TritonDevice) -> int | None:
    """The one large step is done, in a folder that goes again."""
    if not can_measure():
        return None
    with PhaseMeter() as meter, tempfile.TemporaryDirectory() as scratch:
        meter.enter("graph")
        if isinstance(artifact.manifest.details, GraphDetails):
            entries = artifact.manifest.runtime.get("session_entries", {})
            write_graph(artifact.root / _MODEL, Path(scratch) / _MODEL, device, entries)
    return meter.phases["graph"].peak_bytes
