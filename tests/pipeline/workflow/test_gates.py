"""What an exit code and an artifact's own gates say together."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter
from fp8pipe.artifact.gate import none_of
from pipeline.workflow.gates import said_by_gates


@pytest.mark.parametrize(("code", "faults", "said"), [(14, 1, True), (14, 0, False), (1, 1, False), (0, 0, False)])
def test_a_code_says_no_more_than_the_gates_that_failed(code: int, faults: int, said: bool, tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out", kind="vit", stage="quantize-vit") as writer:
        (writer.root / "file").write_text("x")
        writer.gate(none_of("faults", faults))
        writer.commit(details=details_of("vit", images=1))
    assert said_by_gates(code, tmp_path / "out") is said
