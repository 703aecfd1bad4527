"""A run's directory with one artifact of every kind, of tiny models; and making hashes right again.

Language: `model` (falqon) with its exports `vllm` (two shards), `modelopt` and `decoder`; `wide` (falqon) with its
exports `blocks`, in which blocks of a weight share a scale, and `four-bits`, whose weights and inputs are in NVFP4.
Vision: `vit` with `onnx`, `trt` and its engine. Beside them a validation record and `run.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from export_contents import raw
from quantized_families import quantized_family, storable, write_vit_artifact
from safetensors.torch import save_file
from torch import Tensor

from exporters.modelopt.checkpoint import export_checkpoint
from exporters.modelopt.target import ModeloptExportOptions
from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from exporters.tensorrt.export import export_tensorrt
from exporters.tensorrt.language.export import export_language
from exporters.tensorrt.language.target import LanguageExportOptions
from exporters.tensorrt.target import TrtExportOptions
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    FileEntry,
    open_artifact,
    sha256_file,
    write_checked,
)
from fp8pipe.artifact.gate import Verdict
from fp8pipe.artifact.runs import RunRecord, StageRecord, write_run
from fp8pipe.core.config import build_config
from fp8pipe.core.version import __version__
from validation.onnx.validate import validate_onnx

__all__ = ["rehash", "write_language", "write_run_record", "write_vision"]

STAGES = ("model", "vllm", "modelopt", "decoder", "vit", "onnx", "trt")


def write_language(root: Path, model: Path, even_model: Path, text: Path) -> None:
    """`model` and its exports, and `wide` with its exports `blocks`, whose scales are per block, and `four-bits`.

    Args:
        root: the run's directory.
        model: a falqon artifact, which is copied byte for byte.
        even_model: one whose joined layers share scales.
        text: for calibration.
    """
    import shutil

    from tiny_checkpoints import make_model, write_plain
    from trained_exports import write_trained

    shutil.copytree(model, root / "model")
    shutil.copytree(even_model, root / "even")
    export_vllm(root / "model", root / "vllm", VllmExportOptions(max_shard_bytes=60_000))
    plain = write_plain(root / "plain", make_model())  # its sides are whole blocks
    blocks = VllmExportOptions(format=ExportFormat.FP8_BLOCK)
    export_vllm(write_trained(root / "wide", plain), root / "blocks", blocks)
    shutil.rmtree(plain)
    four = {"format": "nvfp4-w4a4", "calibration_data": str(text), "calibration_records": 2}
    export_vllm(root / "wide", root / "four-bits", build_config(VllmExportOptions, four))
    options = {"calibration_data": str(text)}
    export_checkpoint(root / "even", root / "modelopt", build_config(ModeloptExportOptions, options))
    options |= {"compute_capabilities": ["8.9"], "sequence": [1, 8, 32], "builder": "none", "require": False}
    export_language(root / "model", root / "decoder", build_config(LanguageExportOptions, options))


def write_vision(root: Path, *, engines: bool) -> None:
    """`vit` and its exports, with a validation of `onnx`."""
    quantized = storable(quantized_family("timm-vit", bits=8))
    moments = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    quantized.preprocessing = quantized.preprocessing.model_copy(update=moments)  # no two alike
    write_vit_artifact(root / "vit", quantized, images=4)
    export_onnx(root / "vit", root / "onnx", OnnxExportOptions())
    options = {"compute_capabilities": ["8.9"], "batch": [1, 2, 4], "builder": "rtx" if engines else "none"}
    export_tensorrt(root / "vit", root / "trt", build_config(TrtExportOptions, options | {"require": False}))
    validate_onnx(root / "onnx", against=root / "vit")


def write_run_record(root: Path) -> None:
    """`run.json` with every stage that is there."""
    stages = [
        StageRecord(
            name=name, command="export", key="0" * 64, output=name, content=open_artifact(root / name).content,
            verdict=Verdict.ACCEPT,
        )
        for name in STAGES
        if (root / name).is_dir()
    ]  # fmt: skip
    record_file = "onnx.validation.json"
    verdict = json.loads((root / record_file).read_text())["verdict"]
    stages.append(
        StageRecord(
            name="proof", command="validate", key="1" * 64, output=record_file, verdict=Verdict.ACCEPT,
            content=hashlib.sha256(json.dumps(["1" * 64, verdict], separators=(",", ":")).encode()).hexdigest(),
        )
    )  # fmt: skip
    record = RunRecord(
        recipe="tiny", resolved={}, tool_version=__version__, stages=stages,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    write_run(record, root)


def rehash(root: Path, change: Callable[[dict], None] | None = None) -> Path:
    """Make hashes and checksum right for whatever lies in `root`: as if the writer were wrong, not the disk.

    Args:
        root: an artifact.
        change: edits the manifest as plain data.
    """
    data = json.loads((root / MANIFEST_NAME).read_text())
    if change is not None:
        change(data)
    flags = {entry["path"]: entry["volatile"] for entry in data["files"]}
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    data["files"] = [
        FileEntry(
            path=name, size=(root / name).stat().st_size, sha256=sha256_file(root / name),
            volatile=flags.get(name, False),
        ).model_dump()
        for name in names
        if name not in (MANIFEST_NAME, CHECKSUM_NAME)
    ]  # fmt: skip
    write_checked(root / MANIFEST_NAME, json.dumps(data, indent=2) + "\n")
    return root


def without_parents(root: Path) -> Path:
    """Let the manifest record parents at a path that does not exist, as on another machine."""
    data = json.loads((root / MANIFEST_NAME).read_text())
    for parent in data["parents"]:
        parent["path"] = "/nowhere/gone"
    write_checked(root / MANIFEST_NAME, json.dumps(data, indent=2) + "\n")
    return root


def edited_copy(export: Path, root: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy in `root` of an export of one weight file, with edited tensors and right hashes."""
    shutil.copytree(export, root)
    tensors = raw(root)
    edit(tensors)
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return rehash(root)
