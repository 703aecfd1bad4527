"""Checks the metadata of an export against its files and its parent: the checks of `verify`, as one gate.

A validation measures what an engine computes. The manifest, the preprocessing and the class names take no part in that
computation, but whoever deploys an export relies on them, so wrong metadata is as much a defect as a wrong number.
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
