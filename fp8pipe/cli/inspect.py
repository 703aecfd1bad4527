"""`fp8pipe inspect` and `fp8pipe report`: show what an artifact, a run or a third-party checkpoint contains."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import PATH, Console, common_options, format_bytes, table

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact, LayerRecord, Manifest
    from fp8pipe.models.inspection.contents import Contents, LayerView

_SHOWN_OPERATORS = 8


@click.command("inspect")
@click.argument("path", type=PATH)
@click.option("--layers", "list_layers", is_flag=True, help="List every layer, not only the counts.")
@click.option("--headers", is_flag=True, help="Read headers only: no scales, no share of saturated codes.")
@common_options()
def inspect_command(path: Path, list_layers: bool, headers: bool, console: Console) -> None:
    """Show what PATH is and what it contains.

    PATH is an artifact, a Hugging Face checkpoint (compressed-tensors, ModelOpt, FP8 blocks, GPTQ, AWQ or
    unquantized), or a .safetensors, .onnx or .gguf file. For an artifact: kind, parents, gates, warnings and layers.
    For all: formats, scales, share of saturated codes, tokenizer and preprocessing. Tensors are read in chunks.

    For an artifact, checks that every file exists and has the recorded size; `fp8pipe verify` also hashes the files.
    """
    from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME, open_artifact
    from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
    from fp8pipe.models.inspection.places import inspect_contents

    checksummed = any((path / name).is_file() for name in (MANIFEST_NAME, CHECKSUM_NAME)) or path.suffix == ".partial"
    if not checksummed:
        contents = inspect_contents(path, look=not headers)
        text = f"{path}\n{_contents_text(contents, list_layers)}"
        console.emit({"path": str(path), "contents": contents.to_json()}, text, quiet_text=contents.form)
        return
    opened = open_artifact(path, verify=False)
    document, text = _document(opened), _text(opened, list_layers)
    try:
        contents = inspect_contents(path, look=not headers)
        document["contents"], text = contents.to_json(), f"{text}\n{_contents_text(contents, False)}"
    except (BadArtifactError, ConfigurationError, MissingCapabilityError) as error:
        document["contents"], text = None, f"{text}\ncontents not read: {error.what}: {error.why}"
    console.emit(document, text, quiet_text=str(opened.root))


def _document(opened: Artifact) -> dict[str, Any]:
    manifest = opened.manifest
    converted = sum(layer.converted for layer in manifest.layers)
    return {
        "path": str(opened.root), "digest": opened.digest, "size_bytes": opened.size_bytes,
        "layer_counts": {"converted": converted, "skipped": len(manifest.layers) - converted},
        "manifest": manifest.plain(),
    }  # fmt: skip


def _text(opened: Artifact, list_layers: bool) -> str:
    manifest = opened.manifest
    number_format = manifest.number_format
    rows: list[tuple[str, object]] = [
        ("kind", manifest.kind),
        ("stage", f"{manifest.stage}, fp8pipe {manifest.tool_version}, {manifest.created}"),
        ("digest", opened.digest),
        ("files", f"{len(manifest.files)}, {format_bytes(opened.size_bytes)}"),
    ]
    rows += [
        ("parent", f"{p.kind} {p.digest[:12]} {p.path}" + (f", {p.stored}" if p.stored else ""))
        for p in manifest.parents
    ]
    if number_format is not None:
        rows.append(
            ("number format", f"{number_format.name}, {number_format.granularity}, {number_format.scale_direction}")
        )
    if manifest.seed is not None:
        rows.append(("seed", manifest.seed))
    details = manifest.details.model_dump(mode="json", exclude_none=True)
    rows += [(key, value) for key, value in details.items() if isinstance(value, str | int | float)]
    rows += _training(details)
    parts = [str(opened.root), table(rows), *_findings(opened)]
    if manifest.layers:
        parts += _layers(manifest, list_layers)
    return "\n".join(parts)


def _training(details: dict[str, Any]) -> list[tuple[str, object]]:
    """Table rows of held-out losses and statistics of the final merge, if the manifest has them."""
    named = (("heldout_loss", "held-out loss", " nats per answer token"), ("final_merge", "final merge", ""))
    rows: list[tuple[str, object]] = []
    for key, label, unit in named:
        figures = details.get(key)
        if isinstance(figures, dict):
            rows.append((label, ", ".join(f"{name} {_brief(value)}" for name, value in figures.items()) + unit))
    return rows


def _brief(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _findings(opened: Artifact) -> list[str]:
    manifest = opened.manifest
    parts = []
    if manifest.gates:
        parts += ["gates (what the value must be)", table([gate.row for gate in manifest.gates])]
    if manifest.warnings:
        parts += ["warnings", *(f"  {warning}" for warning in manifest.warnings)]
    return parts


def _layers(manifest: Manifest, list_layers: bool) -> list[str]:
    """Lines that list every layer, or count the converted and the skipped layers by encoding or reason."""
    if list_layers:
        rows = [
            ("converted" if layer.converted else "skipped", layer.name, _shape(layer), _encoded(layer, manifest))
            for layer in manifest.layers
        ]
        return ["layers", table(rows)]
    groups = Counter((layer.converted, _encoded(layer, manifest)) for layer in manifest.layers)
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0], -item[1]))
    counted = [(count, "converted" if done else "skipped", reason) for (done, reason), count in ordered]
    return ["layers", table(counted)]


def _encoded(layer: LayerRecord, manifest: Manifest) -> str:
    """Text on how a layer's weight and input are quantized, or why the layer is not quantized."""
    if layer.weight is None:
        return layer.reason
    from fp8pipe.artifact.manifest import ENCODINGS_SINCE

    # Older manifest schemas did not record how inputs are quantized; some migrations add it, others leave it unknown.
    recorded = manifest.stored_version >= ENCODINGS_SINCE
    inputs = f"inputs {layer.activation}" if layer.activation else "float inputs" if recorded else "inputs not recorded"
    return "; ".join(filter(None, (str(layer.weight), inputs, layer.reason)))


def _contents_text(contents: Contents, list_layers: bool) -> str:
    """Text with formats, facts, the histogram of scales and notes; and every layer if `list_layers` is set."""
    rows: list[tuple[object, ...]] = [("weights as", "scales", "layers", "size", "saturated codes")]
    for format, granularity, count, size, codes, saturated in contents.by_format():
        rows.append((format, granularity or "-", count, format_bytes(size), _share(saturated, codes)))
    parts = [f"contents: {contents.form}", table(rows)]
    facts = [(name, _fact(value)) for name, value in contents.facts.items()]
    parts += [table(facts)] if facts else []
    scales = contents.scales()
    if scales.count:
        parts.append(f"scales, {scales.count:,} of them, by power of two")
        parts += [f"  {line}" for line in scales.bars()]
        parts += [f"  {scales.bad} are zero, negative or not finite"] if scales.bad else []
    parts += [f"note: {note}" for note in contents.notes]
    if list_layers:
        parts += ["layers", table([_row(layer) for layer in contents.layers])]
    return "\n".join(parts)


def _row(layer: LayerView) -> tuple[object, ...]:
    bins = layer.scales.bins
    return (
        layer.name, layer.format, _shape(layer), format_bytes(layer.size_bytes), layer.granularity or "-",
        _share(layer.saturated, layer.codes), f"2^{min(bins)}..2^{max(bins)}" if bins else "-",
        f"{layer.nan} NaN" if layer.nan else "",
    )  # fmt: skip


def _shape(layer: LayerRecord | LayerView) -> str:
    return "x".join(map(str, layer.shape)) if layer.shape else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "-"


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        shown = [f"{key} {inner}" for key, inner in list(value.items())[:_SHOWN_OPERATORS]]
        return ", ".join(shown) + (", ..." if len(value) > _SHOWN_OPERATORS else "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


@click.command("report")
@click.argument("directory", type=PATH)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="File to write; default: see below.",
)
@click.option(
    "--image",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    help="A picture, to show attention on it as well.",
)
@common_options()
def report_command(directory: Path, output: Path | None, image: Path | None, console: Console) -> None:
    """Write a report on DIRECTORY, a run or an artifact, as one HTML file that needs no scripts and no network.

    The default output is RUN/report.html for a run, and ARTIFACT.report.html next to an artifact. Nothing else is
    changed.
    """
    from fp8pipe.report import write_report
    from fp8pipe.report.sections.verdicts import overall

    path, subject = write_report(directory, output, image)
    verdict, size = overall(subject), path.stat().st_size
    document = {
        "path": str(path), "size_bytes": size, "verdict": verdict, "artifacts": [item.name for item in subject.items],
    }  # fmt: skip
    console.emit(document, f"{path}: {format_bytes(size)}, {verdict}", quiet_text=str(path))
