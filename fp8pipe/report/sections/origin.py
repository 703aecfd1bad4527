"""The origin of every artifact, with the versions, the machine and the commands that were used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fp8pipe.artifact.runs import RUN_NAME
from fp8pipe.core.errors import word
from fp8pipe.report.blocks import Block, Code, Node, Table, Text, Tree
from fp8pipe.report.figures import Badge, Digest, Figure, Form
from fp8pipe.report.subject import Item, Subject

_EXPLAINED = (
    "First the digest of the manifest, then that of the content: what a rerun of the same work gives again, without "
    "times and versions. Both are shortened; hold the pointer over one to see it whole, or run fp8pipe inspect."
)
_RECIPE = "recipe.yaml"


def provenance(subject: Subject) -> Iterator[Block]:
    """A tree of digests from the base model to the records of its exports."""
    roots: list[Node] = []
    nodes = {item.artifact.digest: _node(subject, item) for item in subject.items}
    outside: dict[str, Node] = {}
    for item in subject.items:
        node = nodes[item.artifact.digest]
        if not item.artifact.manifest.parents:
            roots.append(node)
        for parent in item.artifact.manifest.parents:
            above = nodes.get(parent.digest) or outside.get(parent.digest)
            if above is None:
                place = parent.path.rpartition("/")[2] or parent.path
                above = outside[parent.digest] = Node([f"{parent.kind}: {place} ", Digest(parent.digest)])
                roots.append(above)
            above.children.append(node)
    if roots:
        yield Tree(roots)
        yield Text([_EXPLAINED])


def _node(subject: Subject, item: Item) -> Node:
    manifest = item.artifact.manifest
    parts: list[Any] = [f"{manifest.kind}: {item.name} ", Digest(item.artifact.digest)]
    parts += [" content ", Digest(item.artifact.content)]
    seed = f", seed {manifest.seed}" if manifest.seed is not None else ""
    parts.append(f" by {manifest.stage}, {manifest.created[:10]}{seed}")
    node = Node(parts)
    for record in item.records:
        verdict = subject.documents.get(record.file, "verdict")
        state = "" if record.current else ", not used"
        node.children.append(Node([f"{record.kind}: {record.file}{state} ", Badge(str(verdict))]))
    return node


def reproduce(subject: Subject) -> Iterator[Block]:
    """Versions, machine, and the commands that reproduce the result."""
    yield _versions(subject)
    if subject.run is None:
        yield from _by_hand(subject)
        return
    yield _machine(subject.run.machine)
    yield Code(f"fp8pipe run {word(subject.path / _RECIPE)} --output ANOTHER_DIRECTORY", "The whole run again.")
    lines = [stage.reproduce for stage in subject.run.stages if stage.reproduce]
    if lines:
        yield Code("\n".join(lines), "Stage by stage.")
    recipe = subject.path / _RECIPE
    if recipe.is_file():
        yield Code(recipe.read_text(encoding="utf-8").strip(), f"{_RECIPE}, defaults included.", folded=True)


def _versions(subject: Subject) -> Table:
    told: list[tuple[Any, Any]] = []
    for made in ([subject.run] if subject.run else []) + [item.artifact.manifest for item in subject.items]:
        told += [("fp8pipe", made.tool_version), *made.versions.items()]
    for file in (record.file for item in subject.items for record in item.records if record.current):
        told += (subject.documents.get(file, "versions") or {}).items()
    found: dict[str, list[str]] = {}
    for name, version in told:
        found.setdefault(str(name), []).append(str(version))
    rows = [[name, ", ".join(dict.fromkeys(versions))] for name, versions in found.items()]
    return Table(["package", "version"], rows, "Versions. Several where stages used several.")


def _machine(machine: Mapping[str, Any]) -> Block:
    if not machine:
        return Text(["The machine was not recorded."])
    rows: list[list[Any]] = []
    for key, value in machine.items():
        cell: Any = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            form = Form.BYTES if key.endswith("_bytes") else Form.COUNT
            cell = Figure(float(value), f"{RUN_NAME}#/machine/{key}", form)
        rows.append([key.removesuffix("_bytes").replace("_", " "), cell if cell != "" else "none"])
    return Table(["machine", "value"], rows, "The machine of the run.")


def _by_hand(subject: Subject) -> Iterator[Block]:
    import yaml

    for item in subject.items:
        manifest = item.artifact.manifest
        parent = manifest.parents[0].path.rpartition("/")[2] if manifest.parents else "its source"
        chosen = yaml.safe_dump(_set(manifest.config), sort_keys=False).strip()
        yield Code(chosen, f"Configuration of {item.name}, all that is set: fp8pipe {manifest.stage}, from {parent}.")
        path = word(subject.path)
        yield Code(f"fp8pipe inspect {path}\nfp8pipe verify {path}", "Look at it, and hash it again.")


def _set(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its unset entries."""
    found = {key: _set(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return {key: value for key, value in found.items() if value is not None}
