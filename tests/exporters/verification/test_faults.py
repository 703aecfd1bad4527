"""Faults that hashes cannot show: each is planted, sealed again, and must be reported by its catcher, by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fault_case import Fault
from faults_language import LANGUAGE_FAULTS
from faults_vision import VISION_FAULTS

from exporters.verification import verify_tree, vision
from fp8pipe.artifact.tree import find_tree

FAULTS = (*LANGUAGE_FAULTS, *VISION_FAULTS)


@pytest.fixture(scope="module", autouse=True)
def _graphs_are_made_once():
    """What an export would write follows from the parent alone, and tracing it takes seconds."""
    made = {}
    real = vision._made_again

    def once(artifact, quantized, source):
        import onnx_ir as ir

        key = (artifact.kind, (Path(source) / "manifest.sha256").read_bytes())
        if key not in made:
            made[key] = ir.to_proto(real(artifact, quantized, source))
        return ir.from_proto(made[key])

    vision._made_again = once
    yield
    vision._made_again = real


def plant(fault: Fault, whole: Path, place: Path) -> Path:
    """A tree of what the fault needs, with the fault in it."""
    place.mkdir()
    for name in {fault.artifact, fault.parent} - {None}:
        if (whole / name).is_dir():
            shutil.copytree(whole / name, place / name)
        else:
            for path in whole.glob(f"{Path(name).stem}.*"):
                shutil.copy(path, place / path.name)
    fault.plant(place)
    return place


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_by_name(fault, whole_tree, tmp_path):
    if fault.artifact == "trt" and not (whole_tree / "trt" / "engines").is_dir():
        pytest.skip("TensorRT for RTX is not installed")
    root = plant(fault, whole_tree, tmp_path / "run")
    checked, _ = verify_tree(find_tree(root))
    caught = [f for f in checked.findings if f.catcher is fault.catcher and fault.named in f"{f.where}: {f.why}"]
    assert caught, "\n".join(map(str, checked.findings)) or "nothing was found"


def test_names_are_unique_and_there_are_many():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
