"""Faults that hashes cannot show: each is injected, checksummed again, and must be reported by its check, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fault_table
import pytest
from click.testing import CliRunner
from fault_case import Fault
from fault_table import FAULTS

from exporters.verify.whole import verify_tree
from fp8pipe.artifact.finding import Check
from fp8pipe.artifact.signature import Trust
from fp8pipe.artifact.verify import find_tree
from fp8pipe.cli import main

# The tree takes half a minute to write.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("graphs_made_once")]


def inject(fault: Fault, whole: Path, place: Path) -> Path:
    """A tree of what the fault needs, with the fault in it."""
    place.mkdir()
    names = {fault.artifact, fault.parent} - {None}
    for name in names | ({"onnx.validation.json"} if "run.json" in names else set()):
        if (whole / name).is_dir():
            shutil.copytree(whole / name, place / name)
        else:
            for path in whole.glob(f"{Path(name).stem}.*"):
                shutil.copy(path, place / path.name)
    fault.inject(place)
    return place


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault, whole_tree, tmp_path):
    if fault.artifact == "trt" and not (whole_tree / "trt" / "engines").is_dir():
        pytest.skip("TensorRT for RTX is not installed")
    if fault.check is Check.SIGNATURE:
        pytest.importorskip("model_signing")
    root = inject(fault, whole_tree, tmp_path / "run")
    checked, _ = verify_tree(find_tree(root))
    if fault.check is Check.SIGNATURE:
        signed = root / fault.parent
        checked.findings += Trust(public_key=root / "key.pub").findings(signed, find_tree(signed).beside)
    caught = [f for f in checked.findings if f.check is fault.check and fault.named in f"{f.where}: {f.why}"]
    assert caught, "\n".join(map(str, checked.findings)) or "nothing was found"


def test_names_are_unique_and_there_are_many():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in ("heads-permuted", "resize")], ids=lambda f: f.name)
def test_the_command_finds_them_with_parents_elsewhere(fault, whole_tree, tmp_path):
    root = inject(fault, whole_tree, tmp_path / "run")
    (root / fault.parent).rename(tmp_path / "elsewhere")
    alone = CliRunner().invoke(main, ["verify", "--json", str(root)])
    assert alone.exit_code == 0, alone.output
    assert any("it is neither there nor beside the artifact" in note for note in json.loads(alone.stdout)["notes"])
    ended = CliRunner().invoke(main, ["verify", str(root), "--parents", str(tmp_path / "elsewhere")])
    assert ended.exit_code == 12
    assert fault.named in ended.stderr


def test_the_document_and_the_table_agree():
    """Run `python tests/support/fault_table.py` after a change."""
    assert fault_table.PAGE.read_text(encoding="utf-8") == fault_table.page()
