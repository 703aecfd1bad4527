"""The page that lists every injected fault with its check, written from the suite's registry: `docs/faults.md`."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from fault_case import Fault
from faults_language import LANGUAGE_FAULTS
from faults_vision import VISION_FAULTS

from fp8pipe.artifact.finding import Check

__all__ = ["FAULTS", "PAGE", "page"]

FAULTS: tuple[Fault, ...] = (*LANGUAGE_FAULTS, *VISION_FAULTS)
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
CHECKS = {
    Check.CHECKSUM: "a record's bytes against its checksum",
    Check.SIGNATURE: "a directory's files, and a record beside it, against their signatures, where a key is given",
    Check.HASH: "a file's bytes against the manifest",
    Check.RECORD: "what a validation or a run says, against the artifacts it speaks of and against itself",
    Check.PARENT: "the parents that a manifest names, against the artifacts that are there",
    Check.MANIFEST: "what a manifest states, against the files",
    Check.LINT: "the linters' rules on values and structure",
    Check.REOPEN: "files read as an engine reads them: do they fit each other?",
    Check.PARITY: "every number, operator and file, against those that follow from the parent",
}
HEAD = """# What `fp8pipe verify` catches

Hashes show that bytes are those that were written. They do not show that the writer was right, or honest. So the tests
inject faults into finished artifacts, make every hash and checksum right again (except where those are the fault), and
demand that `fp8pipe verify` reports each one, through the check named here and with the name of the file, layer, tensor
or node. No engine is started: every fault below is found by reading.

A parent in the last column means that the artifact alone looks right, and only the comparison with its parent tells.
Without the parent at hand `verify` says that it was not compared; `validate --against` compares, too.

What is not covered: a fault that is in the parent already and breaks no rule (a badly trained model is a whole one);
differences of an ONNX graph's structure where torch or onnxscript have other versions than when it was written (they
are noted, stored numbers are compared still); the machine code inside of an engine; forged checksums, against which
only a signature helps ([artifact.md](artifact.md#signatures)).

This page is written by `python tests/support/fault_table.py` from the registry in `tests/support/faults_*.py`; a test
keeps the two alike, and `tests/exporters/verify/test_faults.py` injects them all.

## Checks

| check | looks at |
|---|---|
"""


def page() -> str:
    """The whole page."""
    rows = "".join(f"| `{name}` | {what} |\n" for name, what in CHECKS.items())
    columns = "| fault | injected into | what is done | check | reported by name | parent |"
    lines = [f"## {len(FAULTS)} faults\n", columns, "|---|---|---|---|---|---|"]
    for fault in FAULTS:
        place = f"`{fault.artifact}`, {fault.where}"
        lines.append(f"| {fault.name} | {place} | {fault.how} | `{fault.check}` | `{fault.named}` | {_parent(fault)} |")
    return HEAD + rows + "\n" + "\n".join(lines) + "\n"


def _parent(fault: Fault) -> str:
    return f"`{fault.parent}`" if fault.check in (Check.PARITY, Check.PARENT) and fault.parent else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
