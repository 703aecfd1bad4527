"""Versions, machine, and the commands that do the same again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fp8pipe.artifact.runs import RUN_NAME
from fp8pipe.report.blocks import Block, Code, Section, Table, Text
from fp8pipe.report.figures import Figure, Form
from fp8pipe.report.subject import Subject

__all__ = ["section"]

_RECIPE = "recipe.yaml"


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = [_versions(subject)]
    if subject.run is not None:
        blocks += list(_machine(subject, subject.run.machine))
        blocks.append(Code(f"fp8pipe run {subject.path / _RECIPE} --output ANOTHER_DIRECTORY", "The whole run again."))
        lines = [stage.reproduce for stage in subject.run.stages if stage.reproduce]
        if lines:
            blocks.append(Code("\n".join(lines), "Stage by stage."))
        recipe = subject.path / _RECIPE
        if recipe.is_file():
            text = recipe.read_text(encoding="utf-8").strip()
            blocks.append(Code(text, f"{_RECIPE}, defaults included.", folded=True))
    else:
        blocks += list(_by_hand(subject))
    return Section("reproduce", "Versions and commands", "What it takes to do this again.", blocks)


def _versions(subject: Subject) -> Table:
    found: dict[str, list[str]] = {}
    if subject.run is not None:
        found["fp8pipe"] = [subject.run.tool_version]
        for name, version in subject.run.versions.items():
            found.setdefault(name, []).append(version)
    for item in subject.items:
        manifest = item.artifact.manifest
        for name, version in {"fp8pipe": manifest.tool_version, **manifest.versions}.items():
            found.setdefault(name, []).append(version)
    for file in (record.file for item in subject.items for record in item.records if record.current):
        for name, version in (subject.documents.get(file, "versions") or {}).items():
            found.setdefault(str(name), []).append(str(version))
    rows = [[name, ", ".join(dict.fromkeys(versions))] for name, versions in found.items()]
    return Table(["package", "version"], rows, "Versions. Several where stages used several.")


def _machine(subject: Subject, machine: Mapping[str, Any]) -> Iterator[Block]:
    if not machine:
        yield Text(["The machine was not recorded."])
        return
    rows: list[list[Any]] = []
    for key, value in machine.items():
        cell: Any = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            form = Form.BYTES if key.endswith("_bytes") else Form.COUNT
            cell = Figure(float(value), f"{RUN_NAME}#/machine/{key}", form)
        rows.append([key.removesuffix("_bytes").replace("_", " "), cell if cell != "" else "none"])
    yield Table(["machine", "value"], rows, "The machine of the run.")


def _by_hand(subject: Subject) -> Iterator[Block]:
    import yaml

    for item in subject.items:
        manifest = item.artifact.manifest
        parent = manifest.parents[0].path.rpartition("/")[2] if manifest.parents else "its source"
        chosen = yaml.safe_dump(_set(manifest.config), sort_keys=False).strip()
        yield Code(chosen, f"Configuration of {item.name}, all that is set: fp8pipe {manifest.stage}, from {parent}.")
        yield Code(f"fp8pipe inspect {subject.path}\nfp8pipe verify {subject.path}", "Look at it, and hash it again.")


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what is not set."""
    found = {key: _set(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return {key: value for key, value in found.items() if value is not None}
