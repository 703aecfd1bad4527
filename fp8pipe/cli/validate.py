"""`fp8pipe validate`: load an export in its engine and prove that it serves what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.common import Console, common_options, table


@click.command("validate")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--engine", type=click.Choice(["vllm"]), default="vllm", show_default=True, help="The engine.")
@click.option(
    "--vllm-python",
    envvar="FP8PIPE_VLLM_PYTHON",
    help="Python of the environment that holds vLLM; default: .venv-vllm, or this one.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The trained artifact: also prove that the export holds its weights.",
)
@common_options()
def command(export: Path, engine: str, vllm_python: str | None, against: Path | None, console: Console) -> None:
    """Run EXPORT in its engine and compare with its manifest; exit 14 when it does not hold.

    The record is written beside the export, as EXPORT.validation.json.
    """
    from serving.vllm.record import ExportRejectedError
    from serving.vllm.validate import validate_export

    rejection = None
    try:
        record = validate_export(export, engine=engine, vllm_python=vllm_python, against=against)
    except ExportRejectedError as error:
        rejection, record = error, error.record
    console.emit(record.model_dump(mode="json"), _text(export, record), quiet_text=record.verdict)
    if rejection is not None:
        raise rejection


def _text(export: Path, record: Any) -> str:
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
