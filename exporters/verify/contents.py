"""Which checks an artifact gets, by its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from exporters.graph.findings import LintFindingsError
from exporters.verify.common import from_finding
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.discrepancy import Catcher, Discrepancy
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError

__all__ = ["check_contents"]

Check = Callable[[Artifact, Path | None, list[str]], Iterator[Discrepancy]]


def check_contents(artifact: Artifact, parent: Path | None) -> tuple[list[Discrepancy], list[str]]:
    """Check an artifact whose bytes are those of its manifest.

    Args:
        artifact: opened.
        parent: directory of the artifact or model that it was made from, where that is at hand.

    Returns:
        findings, and notes on what could not be checked.
    """
    check = _checks().get(artifact.kind)
    if check is None:
        return [], [f"nothing is known about artifacts of kind '{artifact.kind}'"]
    findings: list[Discrepancy] = []
    notes: list[str] = []
    try:
        for found in check(artifact, parent, notes):
            if found not in findings:
                findings.append(found)
    except LintFindingsError as error:
        findings += [from_finding(finding) for finding in error.findings]
    except (BadArtifactError, ConfigurationError) as error:
        findings.append(Discrepancy(Catcher.REOPEN, error.what, error.why))
    except MissingCapabilityError as error:
        notes.append(f"contents not checked: {error.what} ({error.fix})")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        # Files that hashes vouch for, and that no reader here can read: whoever wrote them is wrong.
        why = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        findings.append(Discrepancy(Catcher.REOPEN, artifact.kind, f"its files do not fit each other: {why}"))
    return findings, notes


def _checks() -> dict[str, Check]:
    from exporters.modelopt.verify import check_modelopt
    from exporters.verify.vision import check_graph_export, check_vit
    from exporters.vllm.verify import check_trained, check_vllm

    return {
        "falqon": check_trained,
        "lora-merged": check_trained,
        "vllm-export": check_vllm,
        "modelopt-export": check_modelopt,
        "vit": check_vit,
        "onnx-export": check_graph_export,
        "trt-export": check_graph_export,
    }
