"""`fp8pipe export`: an artifact, or a plain checkpoint, as a checkpoint that an engine serves."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options, format_bytes, table
from fp8pipe.cli.export_vision import vision_plan

if TYPE_CHECKING:
    from exporters.vllm.options import VllmExportOptions
    from fp8pipe.artifact import Artifact

_UNITS = {
    "": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


class ByteSize(click.ParamType[int]):
    """A number of bytes with an optional unit: `5GB` (10^9), `5GiB` (2^30), `1000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, or a usage error that shows the accepted forms."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
        size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
        if size < 1:
            self.fail(f"{value!r} is not a size; write for instance 5GB, 500MB or 2GiB", param, ctx)
        return size


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(["vllm", "onnx", "trt"]), required=True, help="The engine.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Directory to create.")
@click.option(
    "--format",
    "weight_format",
    help="vllm: fp8 (FP8 weights and activations, default), w8a16 (FP8 weights only) or bf16 (dequantized). "
    "onnx: qdq (as quantized, default), qdq-exact (in arithmetic that has one result) or int4-weight-only. "
    "trt: fp8, int8, nvfp4 (the artifact's own by default), int8-, int4- or nvfp4-weight-only; for language models fp8 "
    "or modelopt-checkpoint.",
)
@click.option("--max-shard-size", type=ByteSize(), help="vllm: largest weight file, for instance 5GB (default).")
@click.option(
    "--builder",
    type=click.Choice(["rtx", "enterprise", "none"]),
    help="trt: who compiles engines: TensorRT for RTX (default), TensorRT on this GPU, or nobody.",
)
@click.option("--compute-capability", "capabilities", multiple=True, help="trt: GPUs to compile for.  [8.9, 12.0]")
@click.option("--base", type=click.Choice(["fp16", "fp32"]), help="trt: type of what is not quantized.  [fp16]")
@click.option("--batch", type=int, nargs=3, help="trt: smallest, usual, largest batch.  [1 8 32; language: 1 1 8]")
@click.option("--sequence", type=int, nargs=3, help="trt, language: smallest, usual, largest length.  [1 128 1024]")
@click.option("--no-cache", is_flag=True, help="trt, language: a graph without key/value cache.")
@click.option("--calibration", type=click.Choice(["amax", "percentile", "mse"]), help="trt, language.  [amax]")
@click.option("--calibration-data", help="trt, language: text for static scales; the training's by default.")
@click.option("--calibration-records", type=int, help="trt, language: records of it to take.  [128]")
@click.option("--no-require", is_flag=True, help="trt: accept engines that multiply in another precision.")
@click.option("--workspace", type=int, help="trt, enterprise: scratch memory of the builder, MiB.  [4096]")
@click.option("--version-compatible", is_flag=True, help="trt, enterprise: engines for later versions, too.")
@click.option("--pack/--no-pack", default=None, help="trt: store engines compressed with xz, or plain.  [pack]")
@click.option("--vllm-version", help="vllm: the version whose checkpoint schema is written.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with any of the settings.")
@click.option("--force", is_flag=True, help="Replace an existing export.")
@common_options(dry_run=True)
def command(
    artifact: Path,
    target: str,
    output: Path,
    weight_format: str | None,
    max_shard_size: int | None,
    vllm_version: str | None,
    builder: str | None,
    capabilities: tuple[str, ...],
    base: str | None,
    batch: tuple[int, int, int] | None,
    sequence: tuple[int, int, int] | None,
    no_cache: bool,
    calibration: str | None,
    calibration_data: str | None,
    calibration_records: int | None,
    no_require: bool,
    workspace: int | None,
    version_compatible: bool,
    pack: bool | None,
    config: Path | None,
    force: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Write ARTIFACT in the form that an engine loads; lint before, reopen and compare after.

    For vllm, ARTIFACT is what `fp8pipe finetune` wrote, or a plain model: a Hugging Face directory, a hub id, a .gguf
    file or sample:NAME. For onnx it is what `fp8pipe quantize-vit` wrote, for trt what either of the two wrote.
    """
    given: dict[str, Any] = {
        "format": weight_format, "max_shard_bytes": max_shard_size, "vllm_version": vllm_version, "builder": builder,
        "compute_capabilities": capabilities or None, "base": base, "batch": batch,
        "require": False if no_require else None, "pack": pack, "sequence": sequence,
        "cache": False if no_cache else None, "calibration": calibration, "calibration_data": calibration_data,
        "calibration_records": calibration_records,
    }  # fmt: skip
    enterprise = {"workspace_mib": workspace, "version_compatible": version_compatible or None}
    given["enterprise"] = {key: value for key, value in enterprise.items() if value is not None} or None
    chosen = _settings_of(config) | {key: value for key, value in given.items() if value is not None}
    _refuse_foreign(chosen, target)
    chosen["force"] = force
    {"vllm": _export_vllm, "onnx": _export_onnx, "trt": _export_trt}[target](artifact, output, chosen, dry_run, console)


def _settings_of(config: Path | None) -> dict[str, Any]:
    from fp8pipe.core.config import read_yaml
    from fp8pipe.core.errors import ConfigurationError

    found = {} if config is None else read_yaml(config)
    unknown = [key for key in found if key not in _TARGETS]
    if unknown:
        raise ConfigurationError(
            f"{config} has unknown keys: {', '.join(unknown)}",
            why=f"an export can be given: {', '.join(_TARGETS)}",
            fix="correct the keys named above",
        )
    return found


# Which target an option is for; those of every target are not named.
_TARGETS = {
    "format": ("vllm", "onnx", "trt"), "max_shard_bytes": ("vllm",), "vllm_version": ("vllm",), "builder": ("trt",),
    "compute_capabilities": ("trt",), "base": ("trt",), "batch": ("trt",), "require": ("trt",), "sequence": ("trt",),
    "cache": ("trt",), "calibration": ("trt",), "calibration_data": ("trt",), "calibration_records": ("trt",),
    "pack": ("trt",), "enterprise": ("trt",),
}  # fmt: skip
_FLAGS = {
    "max_shard_bytes": "--max-shard-size", "compute_capabilities": "--compute-capability", "require": "--no-require",
    "enterprise": "--workspace and --version-compatible", "cache": "--no-cache",
}  # fmt: skip


def _refuse_foreign(chosen: dict[str, Any], target: str) -> None:
    """Options of another target are named as they are written on the command line."""
    from fp8pipe.core.errors import ConfigurationError

    foreign = [key for key in chosen if target not in _TARGETS[key]]
    if foreign:
        flags = [_FLAGS.get(key, f"--{key.replace('_', '-')}") for key in foreign]
        owners = dict.fromkeys(owner for key in foreign for owner in _TARGETS[key])
        raise ConfigurationError(
            f"{' and '.join(flags)} cannot be given for --target {target}",
            why=f"made for --target {' or '.join(owners)}",
            fix="leave it out",
        )


def _export_vllm(artifact: Path, output: Path, chosen: dict[str, Any], dry_run: bool, console: Console) -> None:
    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import VllmExportOptions
    from fp8pipe.core.config import build_config

    options = build_config(VllmExportOptions, chosen)
    if dry_run:
        document, text = _plan(artifact, output, options)
        console.emit({"dry_run": True, "target": "vllm", **document}, text, quiet_text=str(output))
        return
    _report(export_vllm(artifact, output, options), "vllm", str(options.format), console)


def _export_onnx(artifact: Path, output: Path, chosen: dict[str, Any], dry_run: bool, console: Console) -> None:
    from exporters.onnx.export import export_onnx
    from exporters.onnx.options import OnnxExportOptions
    from fp8pipe.core.config import build_config

    options = build_config(OnnxExportOptions, chosen)
    if dry_run:
        document, text = vision_plan(artifact, output, options)
        console.emit({"dry_run": True, "target": "onnx", **document}, text, quiet_text=str(output))
        return
    _report(export_onnx(artifact, output, options), "onnx", str(options.format), console, against=artifact)


def _export_trt(artifact: Path, output: Path, chosen: dict[str, Any], dry_run: bool, console: Console) -> None:
    from exporters.onnx.options import OnnxExportOptions
    from exporters.tensorrt.export import export_tensorrt
    from exporters.tensorrt.formats import plan_targets
    from exporters.tensorrt.language.plan import is_language_artifact
    from exporters.tensorrt.options import TrtExportOptions
    from fp8pipe.cli.export_language import export_language_model, refuse_language_options
    from fp8pipe.core.config import build_config

    if is_language_artifact(artifact):
        written = export_language_model(artifact, output, chosen, dry_run, console)
        if written is not None:
            _report(written, "trt", written.manifest.extra["format"], console)
        return
    refuse_language_options(chosen)
    options = build_config(TrtExportOptions, chosen)
    if dry_run:
        plain = build_config(OnnxExportOptions, {"force": options.force})
        places = {"rtx": list(plan_targets(artifact, options)[1]), "enterprise": ["the GPU of this machine"]}
        engines = places.get(options.builder, [])
        base = str(options.base)
        document, text = vision_plan(artifact, output, plain, engines=engines, base=base, pack=options.pack)
        document = {**document, "format": str(options.base), "engines": engines}
        console.emit({"dry_run": True, "target": "trt", **document}, text, quiet_text=str(output))
        return
    exported = export_tensorrt(artifact, output, options)
    after = f"  to build TensorRT's engine on another machine:\n    {exported.manifest.extra['trtexec']}"
    _report(exported, "trt", exported.manifest.extra["format"], console, after)


def _report(
    exported: Artifact, target: str, format: str, console: Console, *after: str, against: Path | None = None
) -> None:
    """What was written, with every gate, and the command that proves it against what it was made from."""
    manifest = exported.manifest
    rows = [(gate.name, f"{gate.value:g}", f"({gate.threshold:g})", gate.detail) for gate in manifest.gates]
    text = f"{exported.root}: {len(manifest.files)} files, {format_bytes(exported.size_bytes)}"
    document = {
        "dry_run": False,
        "target": target,
        "path": str(exported.root),
        "kind": exported.kind,
        "digest": exported.digest,
        "size_bytes": exported.size_bytes,
        "format": format,
        "gates": [gate.model_dump() for gate in manifest.gates],
        "warnings": list(manifest.warnings),
    }
    source = "" if against is None else f" --against {against}"
    after = (*after, f"  next: fp8pipe validate {exported.root}{source}")
    console.emit(document, "\n".join([text, *([table(rows)] if rows else []), *after]), quiet_text=str(exported.root))


def _plan(source: Path, output: Path, options: VllmExportOptions) -> tuple[dict[str, Any], str]:
    """The dry run: what would be written and what it takes; of the weights nothing is read, so nothing is linted."""
    from exporters.vllm.dry_run import dry_run_export
    from exporters.vllm.export import plan_export, plan_warnings
    from fp8pipe.core.disk import free_bytes
    from fp8pipe.core.plan import Plan, missing_disk, missing_memory
    from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_bytes

    plan = plan_export(source, options)
    free, took = free_bytes(output), dry_run_export(plan)
    converted = sum(layer.converted for layer in plan.layers)
    written = plan.payload_bytes + sidecar_bytes(plan.source.root, SERVED_FILES)
    document = {
        "source": str(source),
        "source_kind": str(plan.source.kind),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
        "shards": list(plan.shard_names()),
        "need_bytes": plan.payload_bytes,
        "free_bytes": free,
        "fits": free >= plan.payload_bytes,
        "layer_counts": {"converted": converted, "skipped": len(plan.layers) - converted},
        "warnings": plan_warnings(plan),
        "serving_hardware": _hardware(options),
    }
    actions = Counter(str(unit.action) for unit in plan.units)
    shown = Plan(
        reads=(f"{source} ({document['source_kind']})",),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
        peak_memory_bytes=took.peak_bytes,
        disk_bytes=written,
        output_bytes=written,
        seconds=took.seconds,
        missing=(*missing_disk(output, written), *missing_memory(took.peak_bytes, "free memory")),
        notes=(*plan_warnings(plan), "memory and time from the largest tensor of each kind, with made-up values"),
        facts={
            "format": str(options.format),
            "files": len(plan.shards),
            "layers": f"{converted} in FP8, {len(plan.layers) - converted} not",
            "tensors": ", ".join(f"{count} {action}" for action, count in sorted(actions.items())),
            "to_serve": document["serving_hardware"],
        },
    )
    return {**document, "plan": shown.document()}, shown.text()


def _hardware(options: VllmExportOptions) -> str:
    """What serving this format takes."""
    if str(options.format) == "bf16":
        return "any device vLLM runs on"
    if str(options.format) == "w8a16":
        return "a GPU of compute capability 8.0 or later, or a CPU with this project's vLLM plugin"
    return "a GPU of compute capability 8.9 or later, or a CPU with this project's vLLM plugin"
