"""What the files of an export say, against what they hold and against the parent: the checks of `verify`, as a gate.

A validation measures what an engine computes. Manifest, preprocessing and class names are not computed with, and who
deploys an export reads them: a false statement is no less a fault than a false number.
"""

from __future__ import annotations

from pathlib import Path

from exporters.verify.contents import check_contents
from fp8pipe.artifact import Artifact, Gate
from fp8pipe.artifact.gate import none_of

_SHOWN = 3


def contents_gate(artifact: Artifact, parent: Path | None) -> tuple[Gate, list[str]]:
    """Every statement of an export, checked.

    Args:
        artifact: the export, whose bytes are those of its manifest.
        parent: directory of what it was made from, where that is at hand.

    Returns:
        A gate on the number of findings, and what could not be checked.
    """
    findings, notes = check_contents(artifact, parent)
    shown = [f"{found.where}: {found.why}" for found in findings[:_SHOWN]]
    shown += ["..."] if len(findings) > _SHOWN else []
    against = "the files" if parent is None else "the files and the parent"
    detail = "; ".join(shown) or f"manifest, preprocessing and classes against {against}, as `verify` checks them"
    return none_of("statements that do not hold", len(findings), detail), notes
