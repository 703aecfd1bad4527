"""A gate at its borders, the sentences of failed ones, and the order of verdicts."""

from __future__ import annotations

import itertools
import math

import pytest

from fp8pipe.artifact.gate import Comparison, Gate, Verdict, failures, none_of, read_gate, worst


@pytest.mark.parametrize(
    ("comparison", "below", "equal", "above"),
    [
        (Comparison.AT_MOST, True, True, False), (Comparison.AT_LEAST, False, True, True),
        (Comparison.BELOW, True, False, False), (Comparison.EQUAL, False, True, False),
    ],
)  # fmt: skip
def test_each_comparison_at_its_border(comparison, below, equal, above):
    border = 0.1 + 0.2
    values = (math.nextafter(border, 0), border, math.nextafter(border, 1))
    gates = [Gate(name="g", value=value, comparison=comparison, threshold=border) for value in values]
    assert [gate.passed for gate in gates] == [below, equal, above]
    assert [gate.row[0] for gate in gates] == ["pass" if held else "FAIL" for held in (below, equal, above)]


@pytest.mark.parametrize("comparison", Comparison)
@pytest.mark.parametrize("value", [None, math.nan])
def test_what_was_not_measured_never_passes(comparison, value):
    gate = Gate(name="g", value=value, comparison=comparison, failure=Verdict.REGRESSION)
    assert (gate.passed, gate.verdict) == (False, Verdict.ANOMALOUS)


@pytest.mark.parametrize(
    ("value", "verdict"), [(1.0, "ACCEPT"), (2.0, "REGRESSION"), (math.inf, "ANOMALOUS"), (-math.inf, "ACCEPT")]
)
def test_the_verdict_follows_from_the_numbers(value, verdict):
    gate = Gate(name="g", value=value, comparison="at most", threshold=1.0, failure=Verdict.REGRESSION)
    assert gate.verdict == verdict


def test_a_count_of_faults_passes_at_zero_alone():
    assert [none_of("faults", count).passed for count in (-1, 0, 1, 0.5)] == [False, True, False, False]
    assert none_of("faults", 3, "of 9").detail == "of 9"


def test_each_failed_gate_is_a_sentence():
    gates = [none_of("a", 0), none_of("b", 2, "of 5"), Gate(name="c", comparison="at most", threshold=1.0)]
    assert failures(gates) == ["b: 2 (equal 0); of 5", "c: missing (at most 1)"]
    assert failures(gates[:1]) == []


def test_the_worst_verdict_is_the_last_in_order():
    order = list(Verdict)
    assert order[0] is Verdict.ACCEPT
    for better, worse in itertools.pairwise(order):
        assert worst([better, worse, better]) is worse
    assert worst([]) is Verdict.ACCEPT


@pytest.mark.parametrize("claim", [{"passed": True}, {"verdict": "ACCEPT"}, {"passed": True, "verdict": "ANOMALOUS"}])
def test_a_claim_that_the_numbers_do_not_bear_out_is_refused(claim):
    with pytest.raises(ValueError, match="'g' claims"):
        read_gate({"name": "g", "value": 1.0, "comparison": "equal", "threshold": 0.0} | claim)


def test_gates_without_a_comparison_are_read_as_they_were_meant():
    def read(name, value, threshold, **more):
        gate = read_gate({"name": name, "value": value, "threshold": threshold} | more)
        return gate.comparison, gate.threshold, gate.passed

    assert read("payload-bytes", 5.0, 5.0) == ("equal", 5.0, True)
    assert read("top-1 agreement", 0.9, 0.8) == ("at least", 0.8, True)
    assert read("differing", 1.0, 0) == ("equal", 0.0, False)
    assert read("error", 0.5, 0.5) == ("at most", 0.5, True)
    assert read("error", 0.5, 0.6, passed=True) == ("at most", 0.6, True)
    assert read("held-out loss of the deployed weights", 1.0, 1.0) == ("below", 1.0, False)
    # Shown with four digits: what had passed still passes, and what had failed does not begin to.
    assert read("top-1 agreement", 0.99494, 0.9950, passed=True) == ("at least", 0.99494, True)
    assert read("top-1 agreement", 0.99494, 0.9950, passed=False) == ("at least", 0.9950, False)
    assert read("top-1 agreement", 0.999, 0.9950, passed=True) == ("at least", 0.9950, True)


@pytest.mark.parametrize("comparison", Comparison)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_gate_that_states_its_comparison_is_read_as_it_is(comparison, threshold):
    gate = Gate(name="top-1 agreement", value=1.5, comparison=comparison, threshold=threshold)
    assert read_gate(gate.model_dump(mode="json")) == gate


def test_a_gate_without_threshold_counts_faults():
    assert read_gate({"name": "differing", "value": 1, "passed": False}) == none_of("differing", 1)
