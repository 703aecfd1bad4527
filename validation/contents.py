"""Checks the metadata of an export against its files and its parent, as `fp8pipe verify` does, in a single gate.

A validation otherwise measures only what an engine computes. The manifest, the preprocessing and the class names do not
affect that computation, but users of an export rely on them, so wrong metadata must lead to a rejection, too.
"""

from __future__ import annotations

from pathlib import Path

from exporters.verify.contents import check_contents
from fp8pipe.artifact import Artifact, Gate
from fp8pipe.artifact.gate import none_of

_SHOWN = 3


def contents_gate(artifact: Artifact, parent: Path | None) -> tuple[Gate, list[str]]:
    """Check the metadata of an export.

    Args:
        artifact: the export; its files must already have been checked against the manifest's hashes.
        parent: directory of the artifact or model that it was made from, if available.

    Returns:
        A gate on the number of findings, and a list of what could not be checked.
    """
    findings, notes = check_contents(artifact, parent)
    shown = [f"{found.where}: {found.why}" for found in findings[:_SHOWN]]
    shown += ["..."] if len(findings) > _SHOWN else []
    against = "the files" if parent is None else "the files and the parent"
    detail = (
        "; ".join(shown) or f"manifest, preprocessing and classes against {against}, checked as by `fp8pipe verify`"
    )
    return none_of("statements that do not hold", len(findings), detail), notes
