"""Reads the verdicts of validations and measurements from their records.

`read_verdict` reads a record, and `require_accept` also requires the verdict ACCEPT. Both raise an error if the record
is missing, damaged or of an unknown schema, or if its gates contradict its verdict.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fp8pipe.artifact.gate import Gate, Verdict, failures, read_gate
from fp8pipe.artifact.reader import Artifact, read_manifest
from fp8pipe.artifact.record import read_checked, record_path
from fp8pipe.core.errors import BadArtifactError, GateFailedError, word

__all__ = ["REJECT", "VerdictRecord", "former_name", "read_verdict", "require_accept"]

REJECT: Final = "REJECT"
_SCHEMA: Final = 3  # the newest schema of any record


def _gate(data: Any) -> Gate:
    """Read a gate of any schema.

    Raises:
        ValueError: it is not a gate, or an invalid one.
    """
    try:
        return read_gate(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is not a gate: {error!r}") from error


class VerdictRecord(BaseModel):
    """The fields that all records of validations and measurements have; `document` contains the whole record."""

    model_config = ConfigDict(frozen=True, strict=True)

    schema_version: int = Field(ge=1, le=_SCHEMA, description="version of its schema")
    manifest_digest: str = Field(description="digest of the manifest that it speaks of")
    verdict: Literal["ACCEPT", "PROVED-WITHOUT-RUNNING", "CONSISTENT", "REJECT"] = Field(description="its verdict")
    versions: dict[str, str] = Field(description="versions of the packages that took part")
    gates: list[Annotated[Gate, BeforeValidator(_gate)]] = Field(default=[], description="what had to hold")
    reasons: list[str] = Field(default=[], description="why it was rejected")
    not_proved: list[str] = Field(default=[], description="what was not tried, and why")
    document: dict[str, Any] = Field(description="the whole record")

    @property
    def said(self) -> Verdict:
        """The verdict as a `Verdict`; REJECT becomes ANOMALOUS, because things differ that must be equal."""
        return Verdict.ANOMALOUS if self.verdict == REJECT else Verdict(self.verdict)

    @property
    def measures(self) -> str:
        """The command that wrote the record of a measurement, which may have no gates; empty for a validation."""
        return str(self.document.get("stage") or "")

    @property
    def form(self) -> str:
        """The engine settings for which the validation is valid, as text; empty if the record states none."""
        served = self.document.get("served")
        return str(served.get("form", "")) if isinstance(served, dict) else ""


def read_verdict(path: Path, artifact: Artifact | None = None) -> VerdictRecord:
    """Read a record, and check that it is consistent and refers to an artifact.

    Args:
        path: the record.
        artifact: the artifact that it must refer to; None for the directory next to the record with the same base name.

    Raises:
        BadArtifactError: the record is missing, cannot be read or is invalid; its checksum is missing or does not
            match; its verdict is unknown, or contradicted by its gates; or it refers to another manifest.
    """
    try:
        data = json.loads(read_checked(path, former_name(path)))
        if not isinstance(data, dict):
            raise ValueError(f"its top level is a {type(data).__name__}, not an object")
        gates = data.get("gates") or _gates_before_3(data)
        record = VerdictRecord.model_validate({**data, "gates": gates, "document": data})
    except OSError as error:
        raise _unsound(path, error.strerror or str(error)) from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise _unsound(path, "; ".join(found)[:300]) from error
    except (ValueError, RecursionError) as error:
        raise _unsound(path, f"it is not JSON: {error}"[:300]) from error
    if record.verdict != REJECT:
        wrong = [*record.reasons, *failures(record.gates), *([] if record.versions else ["it names no versions"])]
        if wrong or not (record.gates or record.measures):
            raise _unsound(path, f"its verdict is {record.verdict}, but {'; '.join(wrong)[:300] or 'it has no gates'}")
    export = path.with_name(path.stem.rpartition(".")[0])
    digest = read_manifest(export).digest if artifact is None else artifact.digest
    if record.manifest_digest != digest:
        name = (export if artifact is None else artifact.root).name
        raise _unsound(path, f"it is about manifest {record.manifest_digest}; {name} has {digest}")
    return record


def require_accept(artifact: Artifact, place: Path | None = None) -> VerdictRecord:
    """Read the validation record of an artifact, and require the verdict ACCEPT.

    Args:
        artifact: the export.
        place: path of the record; `<export>.validation.json` if None.

    Raises:
        BadArtifactError: the record is invalid.
        GateFailedError: there is no record, or its verdict is not ACCEPT.
    """
    path = place or record_path(artifact.root)
    why, fix = f"there is no record of a validation at {path}", f"fp8pipe validate {word(artifact.root)}"
    if path.exists():
        record = read_verdict(path, artifact)
        if record.measures:
            raise _unsound(path, f"it is a record of {record.measures}, not of a validation")
        if record.said is Verdict.ACCEPT:
            return record
        why = f"{path.name} says {record.verdict}: {'; '.join([*record.reasons, *record.not_proved])[:300]}"
        fix = "do not deploy it" if record.said.failed else "validate it where all of it can be proved"
    raise GateFailedError(f"{artifact.root} is not accepted", why=why, fix=fix)


def former_name(path: Path) -> str:
    """The file name under which a record was written, from its content; containers mount records under other names."""
    try:
        name = f"{json.loads(path.read_bytes())['export']}.validation.json"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""
    return name if Path(name).name == name and "\0" not in name else ""


def _gates_before_3(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Gates for a language model's record of schema 1 or 2, in which only the measured values were stored."""
    weights, logprobs, answers = (data.get(key) for key in ("weights", "logprobs", "canary"))
    if data.get("schema_version") not in (1, 2) or not isinstance(weights, dict) or not isinstance(logprobs, dict):
        return []
    wrong = {
        "weights differing": weights.get("differing"),
        "weights missing": len(weights.get("missing") or ()),
        "products differing from stored weights": len(weights.get("gemm_differs") or ()),
        "answers that differ": sum(answer.get("verdict") != "ok" for answer in answers or ()),
    }
    far = {"name": "log-probabilities", "value": logprobs.get("max_abs_diff"), "comparison": "at most"}
    return [*({"name": name, "value": count, "threshold": 0} for name, count in wrong.items()),
            {**far, "threshold": logprobs.get("threshold")}]  # fmt: skip


def _unsound(path: Path, why: str) -> BadArtifactError:
    return BadArtifactError(f"{path} is not a valid record", why=why, fix="validate or measure the artifact again")
