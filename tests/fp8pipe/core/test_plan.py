"""The plan's form, what it finds missing, and the refusal of what cannot fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fp8pipe.core import plan as planning
from fp8pipe.core.errors import OutOfMemoryError
from fp8pipe.core.plan import (
    Missing,
    PhaseMeter,
    Plan,
    can_measure,
    enter_phase,
    missing_disk,
    missing_memory,
    missing_packages,
    refuse_impossible,
)

MIB = 1 << 20


def a_plan() -> Plan:
    return Plan(
        reads=("model",), writes=("out",), peak_memory_bytes=1_500_000_000, disk_bytes=300, output_bytes=200,
        seconds=120.0, packages=("timm",), missing=(Missing("no GPU", "use --device cpu"),), notes=("measured",),
        facts={"layers": 210, "left_out": {"lm_head": "output head"}, "mapped_bytes": 2_000_000},
    )  # fmt: skip


def test_a_plan_survives_its_document():
    assert Plan.of_document(a_plan().document()).document() == a_plan().document()
    assert a_plan().document()["layers"] == 210


def test_text_says_what_is_missing_and_how_to_get_it():
    text = a_plan().text()
    for words in ("1.5 GB at its peak", "300 B at most, 200 B at the end", "about 2 min", "no GPU; use --device cpu"):
        assert words in text
    assert "lm_head (output head)" in text
    assert [line.split() for line in text.splitlines() if "mapped" in line] == [["mapped", "2", "MB"]]


def test_of_many_names_with_one_reason_the_first_are_shown():
    tower = {f"visual.{n}": "outside the text decoder" for n in range(5)}
    facts = {"left_out": {**tower, "lm_head": "output head"}, "seconds": {"a": 0.5, "b": 0.5}}
    text = dataclasses.replace(a_plan(), facts=facts).text()
    assert "visual.0, visual.1, visual.2 and 2 more (outside the text decoder), lm_head (output head)" in text
    assert "a (0.5), b (0.5)" in text  # figures are no reasons


def test_missing_packages_are_named_with_their_extra():
    (found,) = missing_packages(["torch", "no-such-distribution-here"])
    assert "no-such-distribution-here" in found.what
    assert found.fix == "pip install no-such-distribution-here"


def test_more_memory_or_disk_than_there_is_is_missing(tmp_path):
    assert missing_memory(1, "") == missing_memory(None, "") == missing_disk(tmp_path, 1) == ()
    (memory,) = missing_memory(1 << 60, "a smaller batch")
    assert memory.fix == "a smaller batch"
    assert "available now" in memory.what
    (disk,) = missing_disk(tmp_path / "not" / "yet", 1 << 60)
    assert "needed" in disk.what


def test_only_the_impossible_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "memory_bytes", lambda: 1000)
    monkeypatch.setattr(planning, "swap_bytes", lambda: 500)
    refuse_impossible(1500, "it")
    with pytest.raises(OutOfMemoryError, match="it cannot fit") as caught:
        refuse_impossible(1501, "it")
    assert "1.5 kB" in caught.value.why


@pytest.mark.skipif(not can_measure(), reason="peaks of memory are read from /proc")
def test_each_phase_has_its_own_peak():
    with PhaseMeter() as meter:
        enter_phase("large")
        block = bytearray(b"x" * 200 * MIB)
        del block
        enter_phase("small")
        kept = bytearray(b"x" * 20 * MIB)
        enter_phase("small")
    del kept
    large, small = meter.phases["large"].peak_bytes, meter.phases["small"].peak_bytes
    assert large - small > 100 * MIB
    assert len(meter.phases["small"].seconds) == 2
    before = len(meter.phases)
    enter_phase("nobody listens")
    assert len(meter.phases) == before
    assert Path("/proc/self/clear_refs").exists()
