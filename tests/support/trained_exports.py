"""Exports of a plain and of a trained model, and their validation with a torch engine in vLLM's place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_artifacts import details_of
from tiny_checkpoints import make_model, quantize, write_plain
from torch import Tensor, nn

from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import ArtifactWriter, LayerRecord, NumberFormat, open_artifact
from fp8pipe.artifact.manifest import Encoding
from fp8pipe.artifact.record import ExportRejectedError, record_path
from validation.vllm.record import ValidationRecord
from validation.vllm.validate import validate_export

__all__ = [
    "PROMPTS", "calibrated_options", "checked", "export_both", "scaled_inputs", "write_family", "write_packed",
    "write_trained",
]  # fmt: skip

PROMPTS = ("Hello",)


def export_both(root: Path, options: VllmExportOptions) -> Path:
    """Writes `plain` and `trained` (one scale a tensor) into `root`, and their exports, `quantized` and `again`."""
    plain = write_plain(root / "plain", make_model())
    export_vllm(plain, root / "quantized", options)
    export_vllm(write_trained(root / "trained", plain), root / "again", options)
    return root


def calibrated_options(root: Path) -> VllmExportOptions:
    """Those of an export with inputs in NVFP4, calibrated on a text of three records that is written into `root`."""
    text = root / "text.jsonl"
    pairs = [("What is a scale?", "A factor of codes."), ("And a code?", "A number."), ("Why?", "It is short."),
             ("Is this held out?", "Perhaps.")]  # fmt: skip
    text.write_text("".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs), encoding="utf-8")
    return VllmExportOptions(format=ExportFormat.NVFP4_W4A4, calibration_data=str(text), calibration_records=3)


def write_trained(folder: Path, plain: Path, **details: object) -> Path:
    """A falqon artifact with one scale a tensor, a power of two; `details` are added to the manifest's."""
    found: dict[str, Tensor] = {}
    layers = []
    encoding = Encoding(format="e4m3", bits=8, granularity="per-tensor")
    for name, value in load_file(plain / "model.safetensors").items():
        found[name] = value
        if name.endswith("_proj.weight"):
            codes, scale, _ = quantize(value.float(), "tensor")
            found[name], found[name + "_scale"] = codes, torch.exp2(torch.round(torch.log2(scale)))
            layers.append(LayerRecord(name=name.removesuffix(".weight"), weight=encoding, shape=tuple(value.shape)))
    with ArtifactWriter(folder, kind="falqon", stage="finetune") as writer:
        for file in plain.iterdir():
            if not file.name.startswith("model"):
                shutil.copyfile(file, writer.root / file.name)
        save_file(found, writer.root / "model.safetensors", metadata={"format": "pt"})
        writer.commit(
            number_format=NumberFormat(name="e4m3", granularity="per-tensor"), layers=layers,
            details=details_of("falqon", base_dtype="bfloat16", **details),
        )  # fmt: skip
    return folder


def write_packed(folder: Path, export: Path) -> Path:
    """A falqon artifact with the weights of an export in NVFP4, in the layout of compressed-tensors, byte for byte."""
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    inputs = {"activation": None}
    layers = [layer.model_copy(update=inputs) for layer in open_artifact(export, verify=False).manifest.layers]
    with ArtifactWriter(folder, kind="falqon", stage="finetune") as writer:
        for file in export.iterdir():
            if not file.name.startswith((".", "manifest", "config", "README")):
                shutil.copyfile(file, writer.root / file.name)
        (writer.root / "config.json").write_text(json.dumps(config), encoding="utf-8")
        writer.commit(
            number_format=NumberFormat(name="nvfp4", granularity="per-block"), layers=layers,
            details=details_of("falqon", base_dtype="bfloat16"),
        )  # fmt: skip
    return folder


def write_family(root: Path) -> Path:
    """`plain` and `trained`, and their exports: `quantized` (which did the rounding), `copied`, `bf16`."""
    plain = write_plain(root / "plain", make_model())
    trained = write_trained(root / "trained", plain)
    export_vllm(plain, root / "quantized", VllmExportOptions())
    export_vllm(trained, root / "copied", VllmExportOptions())
    export_vllm(trained, root / "bf16", VllmExportOptions(format=ExportFormat.BF16))
    return root


def checked(export: Path, **options: Any) -> ValidationRecord:
    """The record, of whatever verdict."""
    try:
        return validate_export(export, prompts=PROMPTS, max_tokens=4, **options)
    except ExportRejectedError as error:
        record: ValidationRecord = error.record
        assert json.loads(record_path(export).read_text(encoding="utf-8"))["verdict"] == "REJECT"
        return record


def scaled_inputs(model: nn.Module) -> None:
    """Activations in E4M3, one scale per token, as the checkpoint declares."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: (_to_e4m3(args[0]), *args[1:]))


def _to_e4m3(x: Tensor) -> Tensor:
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))
    return ((x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
