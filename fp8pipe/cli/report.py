"""`fp8pipe report`: a run or an artifact as one HTML file for people."""

from __future__ import annotations

from pathlib import Path

import click

from fp8pipe.cli.common import Console, common_options, format_bytes


@click.command("report")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write; default: see below.")
@click.option("--image", type=click.Path(path_type=Path, dir_okay=False), help="A picture, to see attention on it too.")
@common_options()
def command(directory: Path, output: Path | None, image: Path | None, console: Console) -> None:
    """Write a report of DIRECTORY, a run's or an artifact's, as one HTML file without scripts or network.

    It goes to RUN/report.html, or beside an artifact to ARTIFACT.report.html. Nothing else is changed.
    """
    from fp8pipe.report import write_report
    from fp8pipe.report.sections.verdicts import overall

    path, subject = write_report(directory, output, image)
    verdict, size = str(overall(subject)), path.stat().st_size
    document = {
        "path": str(path), "size_bytes": size, "verdict": verdict, "artifacts": [item.name for item in subject.items],
    }  # fmt: skip
    console.emit(document, f"{path}: {format_bytes(size)}, {verdict}", quiet_text=str(path))
