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
    from serving.vllm.validate import validate_export

    record = validate_export(export, engine=engine, vllm_python=vllm_python, against=against)
    document = _document(record)
    rows = [(key, value) for key, value in document.items() if not isinstance(value, dict | list)]
    console.emit(document, f"{export}: validated\n{table(rows)}", quiet_text=str(export))


def _document(record: Any) -> dict[str, Any]:
    """A validation record, pydantic model or dataclass, as plain data."""
    import dataclasses

    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return dataclasses.asdict(record)
    document: dict[str, Any] = record.model_dump(mode="json")
    return document
