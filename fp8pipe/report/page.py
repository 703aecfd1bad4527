"""Renders all sections into one self-contained HTML file: no script, no network access, no further files."""

from __future__ import annotations

import os
from pathlib import Path

from fp8pipe.artifact import sha256_file, translate_disk_full
from fp8pipe.artifact.runs import RUN_NAME
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.version import __version__
from fp8pipe.report.figures import Badge
from fp8pipe.report.sections import sections_of
from fp8pipe.report.sections.verdicts import overall
from fp8pipe.report.subject import Subject, open_subject

__all__ = ["default_output", "render", "write_report"]


def default_output(path: Path) -> Path:
    """`RUN/report.html`; for an artifact `ARTIFACT.report.html` next to it, because the artifact has checksums."""
    absolute = Path(os.path.abspath(path))
    if (path / RUN_NAME).is_file():
        return absolute / "report.html"
    return absolute.with_name(absolute.name + ".report.html")


def write_report(path: Path, output: Path | None = None, image: Path | None = None) -> tuple[Path, Subject]:
    """Write the report of a run, or of one artifact.

    Args:
        path: directory of a run or of an artifact.
        output: the file to write, replaced if it exists; `default_output` when None.
        image: an image given by the user, whose attention map is shown beside those of the calibration images.

    Returns:
        The report file, and its subject.

    Raises:
        BadArtifactError: `path` is neither a run nor an artifact, or is damaged.
        ConfigurationError: the image cannot be read, or the output cannot be written.
        OutOfMemoryError: the disk is full.
    """
    subject = open_subject(Path(path), image)
    target = output or default_output(Path(path))
    text = render(subject)
    partial = target.with_name(target.name + ".partial")
    try:
        with translate_disk_full(target.parent):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {target}", why=error.strerror or str(error), fix="name another file with --output"
        ) from error
    return target, subject


def render(subject: Subject) -> str:
    """The HTML text; deterministic for given files."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fp8pipe.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["kind"] = lambda block: type(block).__name__
    environment.filters["joined"] = lambda cell: cell if isinstance(cell, list | tuple) else [cell]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        title=subject.run.recipe if subject.run else subject.items[0].name, facts=_facts(subject),
        verdict=Badge(overall(subject)), sections=sections_of(subject), style=style, version=__version__,
        files=_files(subject),
    )  # fmt: skip


def _facts(subject: Subject) -> list[str]:
    if subject.run is not None:
        machine = subject.run.machine
        where = [f"{machine['processor']}, {machine['cores']} cores"] if {"processor", "cores"} <= set(machine) else []
        return [f"run of {_minute(subject.run.started)}", *where]
    manifest = subject.items[0].artifact.manifest
    return [f"artifact of kind {manifest.kind}", f"written {_minute(manifest.created)}"]


def _minute(time: str) -> str:
    return f"{time[:16].replace('T', ' ')} UTC"


def _files(subject: Subject) -> list[tuple[str, str]]:
    """Every file that was read for the report, with the sha256 of its content."""
    names = [RUN_NAME] if subject.run is not None else []
    for item in subject.items:
        names += [item.manifest, *(record.file for record in item.records)]
    return [(name, sha256_file(subject.root / name)) for name in names]
