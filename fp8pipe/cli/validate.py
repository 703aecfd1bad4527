"""`fp8pipe validate`: load an export in its engine and prove that it serves what was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.common import Console, common_options, table

# The engines by the kind of export that they run; the first is the default.
_ENGINES = {"vllm-export": ("vllm",), "onnx-export": ("onnxruntime",), "trt-export": ("tensorrt",)}


@click.command("validate")
@click.argument("export", type=click.Path(path_type=Path))
@click.option(
    "--engine",
    type=click.Choice([engine for engines in _ENGINES.values() for engine in engines]),
    help="The engine; default: the one the export is for.",
)
@click.option(
    "--vllm-python",
    envvar="FP8PIPE_VLLM_PYTHON",
    help="Python of the environment that holds vLLM; default: .venv-vllm, or this one.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The artifact that was exported: also prove that the export holds its weights.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="onnxruntime: image folder; compare classes on up to 500 of its pictures (needs --against).",
)
@common_options(dry_run=True)
def command(
    export: Path,
    engine: str | None,
    vllm_python: str | None,
    against: Path | None,
    images: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Run EXPORT in its engine and compare with its manifest; exit 14 when it does not hold.

    The record is written beside the export, as EXPORT.validation.json.
    """
    from fp8pipe.artifact.record import ExportRejectedError

    chosen = _engine(export, engine)
    _refuse_foreign(chosen, against, images)
    if dry_run:
        _show_plan(export, chosen, vllm_python, (against, images), console)
        return
    rejection = None
    try:
        record = _validate(export, chosen, vllm_python, against, images)
    except ExportRejectedError as error:
        rejection, record = error, error.record
    text = {"onnxruntime": _onnx_text, "tensorrt": _trt_text}.get(record.engine, _vllm_text)
    console.emit(record.model_dump(mode="json"), text(export, record), quiet_text=record.verdict)
    if rejection is not None:
        raise rejection


def _show_plan(
    export: Path, engine: str, vllm_python: str | None, given: Sequence[Path | None], console: Console
) -> None:
    from fp8pipe.artifact import open_artifact
    from fp8pipe.artifact.record import record_path
    from validation.plan import plan_engine

    artifact = open_artifact(export, kind=list(_ENGINES), verify=False, caches="engines")
    reads = [str(path) for path in given if path is not None]
    vision = given[0] if artifact.kind == "onnx-export" else None
    plan = plan_engine(
        artifact, "validate", record_path(artifact.root), vllm_python=vllm_python, against=vision, reads=reads
    )
    document = {"dry_run": True, "export": str(artifact.root), "engine": engine, "plan": plan.document()}
    console.emit(document, plan.text())


def _engine(export: Path, engine: str | None) -> str:
    """The engine for this kind of export."""
    from fp8pipe.artifact import open_artifact
    from fp8pipe.core.errors import ConfigurationError

    kind = open_artifact(export, kind=list(_ENGINES), verify=False, caches="engines").kind
    if engine is not None and engine not in _ENGINES[kind]:
        raise ConfigurationError(
            f"{export} cannot be validated in {engine}",
            why=f"it is of the kind {kind}, made for {_ENGINES[kind][0]}",
            fix=f"--engine {_ENGINES[kind][0]}, or none",
        )
    return engine or _ENGINES[kind][0]


def _validate(export: Path, engine: str, vllm_python: str | None, against: Path | None, images: Path | None) -> Any:
    if engine == "onnxruntime":
        from validation.onnx.validate import validate_onnx

        return validate_onnx(export, against=against, pictures=images)
    if engine == "tensorrt":
        from validation.tensorrt.validate import validate_tensorrt

        return validate_tensorrt(export)
    from validation.vllm.validate import validate_export

    return validate_export(export, engine=engine, vllm_python=vllm_python, against=against)


def _refuse_foreign(engine: str, against: Path | None, images: Path | None) -> None:
    """Options of another engine, before anything is planned or run."""
    from fp8pipe.core.errors import ConfigurationError

    takes = {"onnxruntime": ("--against", "--images"), "vllm": ("--against",)}.get(engine, ())
    given = {"--against": against, "--images": images}
    foreign = [flag for flag, value in given.items() if value is not None and flag not in takes]
    if foreign:
        raise ConfigurationError(
            f"{' and '.join(foreign)} cannot be given for {engine}", why="nothing is compared with it there",
            fix="leave it out",
        )  # fmt: skip


def _onnx_text(export: Path, record: Any) -> str:
    rows = [(gate.name, f"{gate.value:g}", f"({gate.threshold:g})", gate.detail) for gate in record.gates]
    title = f"{record.verdict}  {export} in ONNX Runtime {record.versions.get('onnxruntime', '')}"
    return f"{title}, against the {record.reference}\n{table(rows)}"


def _trt_text(export: Path, record: Any) -> str:
    rows = [(gate.name, f"{gate.value:g}", f"({gate.threshold:g})", gate.detail) for gate in record.gates]
    lines = [f"{record.verdict}  {export} in TensorRT", table(rows)]
    lines += [f"  proved: {text}" for text in record.proved]
    lines += [f"  not proved: {text}" for text in record.not_proved]
    if record.execution is not None:
        lines += [
            f"  batch {t.batch}: {t.engine_ms:.3f} ms, in FP16 {t.fp16_ms:.3f} ms (x{t.fp16_ms / t.engine_ms:.2f})"
            for t in record.execution.timings
        ]
    return "\n".join(lines)


def _vllm_text(export: Path, record: Any) -> str:
    weights, logprobs = record.weights, record.logprobs
    rows = [
        (
            "weights read back",
            f"{weights.elements:,} elements of {weights.tensors} tensors, against the {weights.reference}",
        ),
        ("weights differing", f"{weights.differing}"),
        ("FP8 codes differing", f"{weights.differing_codes} in {weights.layers} layers"),
        ("log-probabilities", f"largest difference {logprobs.max_abs_diff:.1e} nats over {logprobs.tokens} tokens"),
        *((f"asked: {answer.prompt}", f"{answer.answer!r} ({answer.verdict})") for answer in record.canary),
    ]
    return f"{record.verdict}  {export} in {record.engine} {record.versions.get(record.engine, '')}\n{table(rows)}"
