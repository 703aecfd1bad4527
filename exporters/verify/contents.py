"""Which checks an artifact gets: those of its export target, or of what training and quantization leave."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from exporters.target import Reference, call, target_of
from exporters.verify.common import lint_findings
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Check, Finding, LintFindingsError
from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError

__all__ = ["check_contents"]

_CHECKS: Final[dict[str, Reference]] = {
    **dict.fromkeys(TUNED_KINDS, "exporters.verify.tuned:check_tuned"), VIT_KIND: "exporters.verify.vit:check_vit",
}  # fmt: skip


def check_contents(artifact: Artifact, parent: Path | None) -> tuple[list[Finding], list[str]]:
    """Check an artifact whose bytes are those of its manifest.

    Args:
        artifact: opened.
        parent: directory of the artifact or model that it was made from, where that is at hand.

    Returns:
        findings, and notes on what could not be checked.
    """
    target = target_of(artifact.kind)
    check = _CHECKS.get(artifact.kind) if target is None else target.verify
    if check is None:
        return [], [f"contents not checked: no check is known for the kind {artifact.kind!r}"]
    findings: list[Finding] = []
    notes: list[str] = []
    try:
        for found in call(check, artifact, parent, notes):
            if found not in findings:
                findings.append(found)
    except LintFindingsError as error:
        findings += lint_findings(error.findings)
    except (BadArtifactError, ConfigurationError) as error:
        findings.append(Finding(Check.REOPEN, error.what, error.why))
    except MissingCapabilityError as error:
        notes.append(f"contents not checked: {error.what} ({error.fix})")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        # Files whose hashes are right, and that no reader here can read: whoever wrote them is wrong.
        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        findings.append(Finding(Check.REOPEN, artifact.kind, f"its files do not fit each other: {why}"))
    return findings, notes
