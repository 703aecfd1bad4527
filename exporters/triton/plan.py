"""The dry run of writing an export into a Triton repository."""

from __future__ import annotations

import tempfile
from pathlib import Path

from exporters.graph.description import MODEL_FILE
from exporters.graph.details import GraphDetails
from exporters.triton.graph import TritonDevice, write_graph
from fp8pipe.artifact import Artifact
from fp8pipe.core.phases import PhaseMeter, can_measure
from fp8pipe.core.plan import Plan, missing_disk


def plan_repository(artifact: Artifact, output: Path, device: TritonDevice) -> Plan:
    """Plan a model repository: a copy of the export's files, or its graph as a CPU gets it."""
    target = output / artifact.root.resolve().name
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})",),
        writes=(f"{target}{' (exists already: will be refused)' if target.exists() else ''}",),
        peak_memory_bytes=_repository_peak(artifact, device),
        disk_bytes=artifact.size_bytes,
        output_bytes=artifact.size_bytes,
        missing=missing_disk(output, artifact.size_bytes),
        facts={"kind": artifact.kind},
    )


def _repository_peak(artifact: Artifact, device: TritonDevice) -> int | None:
    """The one large step is done, in a folder that goes again."""
    if not can_measure():
        return None
    with PhaseMeter() as meter, tempfile.TemporaryDirectory() as scratch:
        meter.enter("graph")
        if isinstance(artifact.manifest.details, GraphDetails):
            entries = artifact.manifest.runtime.get("session_entries", {})
            write_graph(artifact.root / MODEL_FILE, Path(scratch) / MODEL_FILE, device, entries)
    return meter.phases["graph"].peak_bytes
