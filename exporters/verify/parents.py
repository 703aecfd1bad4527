"""Who an artifact's parents are: found by digest among artifacts that are at hand, never by the path that is noted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from exporters.vllm.source import open_source
from fp8pipe.artifact import Artifact, Parent, read_manifest
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.verify import find_parent, find_tree
from fp8pipe.core.errors import BadArtifactError, ConfigurationError

__all__ = ["Family", "Found"]


@dataclass(slots=True)
class Found:
    """The parent of one artifact.

    Attributes:
        path: its directory; None where it is not at hand.
        findings: an artifact of the parent's name, and another digest.
        notes: what was not found.
    """

    path: Path | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Family:
    """Artifacts and models among which parents are looked for.

    Args:
        artifacts: of the tree that is verified.
        places: further artifacts, trees of them, or models.

    Raises:
        BadArtifactError: a place is no directory.
        ConfigurationError: a place holds neither an artifact nor a model.
    """

    def __init__(self, artifacts: Sequence[Artifact], places: Sequence[Path]) -> None:
        self.known = list(artifacts)
        self.named: list[Artifact] = []
        self.models: dict[str, Path] = {}
        for place in places:
            tree = find_tree(place)
            found = [Artifact(root, read_manifest(root)) for root in tree.artifacts]
            self.known += found
            if found and found[0].root == tree.root:
                self.named += found
            if not found:
                self.models[_model_digest(place)] = place

    def parents_of(self, artifact: Artifact) -> Found:
        """Look for every parent that the manifest names; the first that is at hand is what is compared with."""
        found = Found()
        for parent in artifact.manifest.parents:
            if parent.digest in self.models:
                found.path = found.path or self.models[parent.digest]
                continue
            known, finding, note = find_parent(artifact, parent, self.known)
            finding = finding or (self._other(artifact, parent) if known is None else None)
            found.findings += [finding] if finding is not None else []
            found.notes += [note] if note and finding is None else []
            if known is not None and found.path is None:
                found.path = known.root
        return found

    def _other(self, artifact: Artifact, parent: Parent) -> Finding | None:
        """An artifact that was named as the parent, is of its kind, and is another one."""
        others = [named for named in self.named if named.kind == parent.kind and named.root != artifact.root]
        if not others:
            return None
        why = f"the manifest names {parent.kind} {parent.digest}; {others[0].root.name} has {others[0].digest}"
        return Finding(Check.PARENT, others[0].root.name, why)


def _model_digest(place: Path) -> str:
    try:
        return open_source(place).parent.digest
    except (ConfigurationError, BadArtifactError) as error:
        raise ConfigurationError(
            f"{place} holds no parent", why=f"neither an artifact nor a model: {error.why or error.what}",
            fix="give the artifact or model that was exported",
        ) from error  # fmt: skip
