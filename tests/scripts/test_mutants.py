"""Mutation testing: which faults are tried, and that its table names files that are there."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = b'''
from typing import Final
LIMIT: Final = 3

def judge(values: list[int], name: str = "x") -> list[str]:
    """Words."""
    found = []
    if LIMIT <= 4 and not values:
        raise ValueError(f"{name} {1 + 1}")
    for value in values:
        found.append(check(name, value))
    return [*found, other(found)]
'''


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import mutations

    yield mutations
    sys.modules.pop("mutations", None)


def test_the_faults_of_a_function(mutations):
    found = mutations.mutants_of("m.py", SOURCE)
    tried = {(m.where, m.before, m.after) for m in found}
    assert {
        ("", "3", "(4)"), ("", "3", "(2)"), ("judge", "LIMIT <= 4", "(LIMIT < 4)"),
        ("judge", "LIMIT <= 4", "(LIMIT > 4)"), ("judge", "LIMIT <= 4 and not values", "(LIMIT <= 4 or not values)"),
        ("judge", "LIMIT <= 4 and not values", "(not values)"), ("judge", "LIMIT <= 4 and not values", "False"),
        ("judge", "not values", "(values)"), ("judge", "found.append(check(name, value))", "pass"),
        ("judge", "check(name, value)", "(check(value, name))"), ("judge", "[*found, other(found)]", "([*found])"),
        ("judge", "return [*found, other(found)]", "return []"),
    } <= tried  # fmt: skip
    assert any(before.startswith("raise ValueError") and after == "pass" for _, before, after in tried)
    assert not any("1 + 1" in before and "raise" not in before for _, before, _ in tried)  # a message is for people
    for mutant in found:
        compile(SOURCE[: mutant.start] + mutant.after.encode() + SOURCE[mutant.end :], "m.py", "exec")


def test_a_fault_keeps_its_name_when_other_code_moves(mutations):
    moved = mutations.mutants_of("m.py", SOURCE.replace(b"LIMIT: Final", b"# more\n\nLIMIT: Final"))
    names = [m.name for m in mutations.mutants_of("m.py", SOURCE)]
    assert [m.name for m in moved] == names
    assert len(set(names)) == len(names)


def test_the_table_names_files_that_are_there():
    table = tomllib.loads((ROOT / "scripts/mutants.toml").read_text(encoding="utf-8"))
    for module, entry in table["modules"].items():
        assert (ROOT / module).is_file(), module
        assert all((ROOT / test.partition("::")[0]).exists() for test in entry["tests"]), module
        assert entry["count"] > 0
