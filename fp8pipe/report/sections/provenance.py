"""What was made from what: a tree of digests, from the base model to the records of its exports."""

from __future__ import annotations

from typing import Any

from fp8pipe.report.blocks import Block, Missing, Node, Section, Text, Tree
from fp8pipe.report.figures import Badge, Digest
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]

_EXPLAINED = (
    "First the digest of the manifest, then that of the content: what a rerun of the same work gives again, without "
    "times and versions. Both are shortened; hold the pointer over one to see it whole, or run fp8pipe inspect."
)


def section(subject: Subject) -> Section:
    """The section."""
    roots: list[Node] = []
    nodes: dict[str, Node] = {item.artifact.digest: _node(subject, item) for item in subject.items}
    outside: dict[str, Node] = {}
    for item in subject.items:
        node = nodes[item.artifact.digest]
        parents = item.artifact.manifest.parents
        if not parents:
            roots.append(node)
        for parent in parents:
            above = nodes.get(parent.digest)
            if above is None:
                above = outside.get(parent.digest)
            if above is None:
                place = parent.path.rpartition("/")[2] or parent.path
                above = outside[parent.digest] = Node([f"{parent.kind}: {place} ", Digest(parent.digest)])
                roots.append(above)
            above.children.append(node)
    lead = "A child names its parent by digest. A digest covers every file, since the manifest lists theirs."
    blocks: list[Block] = [Tree(roots)] if roots else [Missing("No artifact is here.", "fp8pipe run")]
    if roots:
        blocks.append(Text([_EXPLAINED]))
    return Section("provenance", "Provenance", lead, blocks)


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
