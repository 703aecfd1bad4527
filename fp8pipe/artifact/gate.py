"""Gates: comparisons of a measured value with a threshold, and the verdicts that follow from them.

Exports, validations, recipes, reports and model cards use the same class. Whether a gate passed is always computed from
its numbers; a stored gate that states another result is rejected when it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import Field, ModelWrapValidatorHandler, computed_field, model_validator

from fp8pipe.core.config import FrozenConfig

__all__ = ["Comparison", "Gate", "Verdict", "at_most", "failures", "none_of", "number_of", "read_gate", "worst"]


class Verdict(StrEnum):
    """Possible verdicts, from best to worst."""

    ACCEPT = "ACCEPT"
    """All gates passed."""
    PROVED_WITHOUT_RUNNING = "PROVED-WITHOUT-RUNNING"
    """Graph and engine have the required contents, but were not run."""
    CONSISTENT = "CONSISTENT"
    """The engine computes what the files describe, but the files were not compared with their source."""
    REGRESSION = "REGRESSION"
    """A measured value is on the wrong side of its threshold."""
    ANOMALOUS = "ANOMALOUS"
    """A value is missing or not finite, or two things that must be equal differ, so no measurement can be trusted."""
    INFEASIBLE = "INFEASIBLE"
    """The stage cannot run here (a package, a device, memory or disk space is missing), or the export is refused."""

    @property
    def failed(self) -> bool:
        """Whether the verdict means that something is wrong, and not only that something was not proved."""
        order = list(Verdict)
        return order.index(self) > order.index(Verdict.CONSISTENT)


class Comparison(StrEnum):
    """The relation that must hold between a value and its threshold."""

    AT_MOST = "at most"
    AT_LEAST = "at least"
    BELOW = "below"
    EQUAL = "equal"


_HOLDS: Final[Mapping[Comparison, Callable[[float, float], bool]]] = {
    Comparison.AT_MOST: float.__le__, Comparison.AT_LEAST: float.__ge__, Comparison.BELOW: float.__lt__,
    Comparison.EQUAL: float.__eq__,
}  # fmt: skip


class Gate(FrozenConfig):
    """A value that is compared with a threshold; `passed` and `verdict` are computed from them."""

    name: str = Field(description="what was measured")
    value: float | None = Field(
        default=None, description="the measured value; NaN is recorded as such, none where it is missing"
    )
    comparison: Comparison = Field(
        default=Comparison.EQUAL, description="what the value must be, against the threshold"
    )
    threshold: float = Field(default=0.0, description="what it is compared with")
    detail: str = Field(default="", description="unit, what was counted, or why this threshold")
    failure: Verdict = Field(
        default=Verdict.ANOMALOUS,
        description="what a failure means: two things differ that must be equal, or a figure got worse than accepted",
    )
    source: str = Field(
        default="", description="where the figure is found, as FILE#path; empty for the gate's own artifact"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_false_claims(cls, data: Any, handler: ModelWrapValidatorHandler[Gate]) -> Gate:
        """Reject stored values of `passed` and `verdict` that differ from those computed from the numbers."""
        claims = {}
        if isinstance(data, Mapping):
            claims = {key: data[key] for key in ("passed", "verdict") if key in data}
            data = {key: value for key, value in data.items() if key not in claims}
        gate = handler(data)
        for key, claimed in claims.items():
            if claimed != getattr(gate, key):
                raise ValueError(f"the gate {gate.name!r} claims {key}={claimed}, and {gate.numbers} says otherwise")
        return gate

    @computed_field(description="whether the value is what it must be; NaN and a missing value never are")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether the comparison holds; False if the value is NaN or missing."""
        return self.value is not None and _HOLDS[self.comparison](float(self.value), float(self.threshold))

    @computed_field(description="what the gate says")  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """ACCEPT if the gate passed, ANOMALOUS if the value is missing or not finite, otherwise `failure`."""
        if self.passed:
            return Verdict.ACCEPT
        return self.failure if self.value is not None and math.isfinite(self.value) else Verdict.ANOMALOUS

    @property
    def numbers(self) -> str:
        """Value, comparison and threshold as text: `0.2 (at most 0.1)`."""
        value = "missing" if self.value is None else f"{self.value:g}"
        return f"{value} ({self.comparison} {self.threshold:g})"

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Row of a table: "pass" or "FAIL", name, numbers and detail."""
        return "pass" if self.passed else "FAIL", self.name, self.numbers, self.detail

    def __str__(self) -> str:
        return f"{self.name}: {self.numbers}{f'; {self.detail}' if self.detail else ''}"


def number_of(value: Any) -> float | None:
    """A JSON value as a number; None if it is not one. Manifests store infinities and NaN as strings."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str) and value.lower().lstrip("-") in ("nan", "inf", "infinity"):
        return float(value)
    return None


def none_of(name: str, count: float, detail: str = "") -> Gate:
    """A gate that requires a count (of errors, for instance) to be zero."""
    return Gate(name=name, value=count, comparison=Comparison.EQUAL, threshold=0, detail=detail)


def at_most(name: str, value: float, threshold: float, detail: str) -> Gate:
    """A gate that requires a value not to exceed a threshold."""
    return Gate(name=name, value=value, comparison=Comparison.AT_MOST, threshold=threshold, detail=detail)


def failures(gates: Iterable[Gate]) -> list[str]:
    """One message for each failed gate; empty if all passed."""
    return [str(gate) for gate in gates if not gate.passed]


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of several verdicts; ACCEPT if there are none."""
    return max(verdicts, key=list(Verdict).index, default=Verdict.ACCEPT)


# Before schema 3, gates were stored without a comparison. These are the comparisons of the gates for which it is not
# the one that `read_gate` assumes by default.
_BEFORE_3: Final[Mapping[str, Comparison]] = {
    "top-1 agreement": Comparison.AT_LEAST,
    "top-1 agreement with the teacher": Comparison.AT_LEAST,
    "cosine with the teacher's features": Comparison.AT_LEAST,
    "held-out loss of the deployed weights": Comparison.BELOW,
    "payload-bytes": Comparison.EQUAL,
}


def read_gate(data: Mapping[str, Any]) -> Gate:
    """Read a gate of any schema version.

    Raises:
        pydantic.ValidationError: invalid fields, or a stored result that contradicts the numbers.
    """
    if "comparison" in data or "threshold" not in data:
        return Gate.model_validate(data)
    known = _BEFORE_3.get(str(data.get("name")))
    # A threshold of 0 was used for counts of errors. A waived gate was stored with its value as threshold.
    plain = Comparison.EQUAL if data["threshold"] == 0 else Comparison.AT_MOST
    gate: dict[str, Any] = {**data, "comparison": known or plain}
    if known is Comparison.AT_LEAST and data.get("passed") and isinstance(data["value"], float):
        gate["threshold"] = min(data["threshold"], data["value"])  # the threshold was stored rounded to four digits
    return Gate.model_validate_json(json.dumps(gate))
