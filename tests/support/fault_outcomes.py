"""`fp8pipe validate EXPORT --against PARENT` on a faulty export, in a real vLLM, and how far the fault came."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

from click.testing import CliRunner
from lasting_engines import LastingEngines, lasting_engines
from random_faults import RandomFault, inject_random

from exporters.verify.whole import verify_tree
from fp8pipe.artifact.gate import none_of
from fp8pipe.artifact.record import record_path
from fp8pipe.artifact.verify import find_tree
from fp8pipe.cli import main
from fp8pipe.core.errors import Fp8PipeError
from validation.vllm import comparison

__all__ = ["Case", "Outcome", "outcomes", "validated"]

PARENTS = {"copied": "trained", "quantized": "plain"}
# `kind`, `seed`, and which of the exports in PARENTS.
Case = tuple[str, int, str]
Caught = Literal["reading", "files", "loading", "engine", "statements", "nowhere"]


@dataclass(frozen=True)
class Outcome:
    """What a validation made of a fault.

    Attributes:
        fault: it.
        exit_code: of the command.
        caught: as the files are read or planned; by files against the parent's; as vLLM loads them; by what an engine
            holds or says; by statements of the manifest alone, though engines ran.
        quick: whether `verify --quick` finds it.
        told: reasons, or the error.
    """

    fault: RandomFault
    exit_code: int
    caught: Caught
    quick: bool
    told: str

    @property
    def by_name(self) -> bool:
        """Whether the report names what was changed."""
        return any(name in self.told for name in self.fault.named)


def validated(export: Path, parent: Path) -> tuple[int, str, dict | None]:
    """Exit code, everything said, and the record, where one was written."""
    ran = CliRunner().invoke(main, ["validate", str(export), "--against", str(parent)])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
    path = record_path(export)
    return ran.exit_code, ran.output, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def outcomes(family: Path, cases: Iterable[Case], place: Path, *, engine_alone: bool = False) -> dict[Case, Outcome]:
    """Inject each fault into a copy, and validate it.

    Args:
        family: `copied` and `quantized` beside `trained` and `plain`.
        cases: the faults.
        place: an existing directory for the copies.
        engine_alone: leave out what a validation compares without an engine: files and statements.
    """
    found = {}
    with ExitStack() as stack:
        engines = stack.enter_context(lasting_engines())
        if engine_alone:
            held = none_of("left out", 0)
            stack.enter_context(patch.object(comparison, "file_gates", lambda plan, root: []))
            stack.enter_context(patch.object(comparison, "contents_gate", lambda artifact, parent: (held, [])))
        for kind, seed, name in cases:
            copy = Path(shutil.copytree(family / name, place / f"{kind}-{seed}-{name}"))
            fault = inject_random(kind, seed, copy)
            found[kind, seed, name] = _outcome(fault, copy, family / PARENTS[name], engines)
            shutil.rmtree(copy)
    return found


def _outcome(fault: RandomFault, export: Path, parent: Path, engines: LastingEngines) -> Outcome:
    quick, before = _seen_quickly(export), engines.started
    code, said, record = validated(export, parent)
    ran = engines.started > before
    reasons: list[str] = record["reasons"] if record else []
    told = "\n".join([said, *reasons])
    if record is None:
        caught: Caught = "loading" if ran else "reading"
    elif not reasons:
        caught = "nowhere"
    elif not ran:
        caught = "files"
    else:
        caught = "engine" if any("in fp32" in r or "as served" in r for r in reasons) else "statements"
    return Outcome(fault, code, caught, quick, told)


def _seen_quickly(export: Path) -> bool:
    try:
        checked, _ = verify_tree(find_tree(export), quick=True, strict=True)
    except Fp8PipeError:
        return True
    return bool(checked.findings)
