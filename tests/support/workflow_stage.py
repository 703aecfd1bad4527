"""A stage that starts at once, for tests of the workflow: `workflow_stage.py NAME --config FILE --output DIR [flags]`.

It does what real stages do: writes through `ArtifactWriter`, keeps a checkpoint after every step, resumes, refuses,
fails a gate, or writes a record beside its input. Its output depends on its settings and on what it reads alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from pydantic import Field

from fp8pipe.artifact import ArtifactWriter, Gate, open_artifact
from fp8pipe.artifact.kinds import ArtifactKind, Details, register_kind
from fp8pipe.artifact.record import write_checked


class WorkDetails(Details):
    """What a stage says of itself."""

    score: float = Field(default=1.0, description="as it was set")
    resumed: int = Field(default=0, description="steps that an earlier run did")


register_kind(ArtifactKind("work", WorkDetails))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output", type=Path)
    for flag in ("--resume", "--force", "--json"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    settings = yaml.safe_load(given.config.read_text()) or {}
    print(f"working on {settings}", file=sys.stderr, flush=True)
    rank = os.environ.get("RANK")
    shown = [f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}", *([f"RANK={rank}"] if rank else [])]
    print(" ".join(shown), file=sys.stderr, flush=True)
    if settings.get("killed") and rank in (None, "1"):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank not in (None, "0"):  # as of real commands, one of several processes writes and reports
        return 0
    if settings.get("exit_code"):
        error = {"type": "E", "exit_code": settings["exit_code"], "what": "refused", "why": "asked to", "fix": "x"}
        print(json.dumps({"error": error}))
        return int(settings["exit_code"])
    if settings.get("orphan"):  # an engine in a session of its own, as vLLM's
        waits = [sys.executable, "-c", "import time; time.sleep(600)", settings["orphan"]]
        subprocess.Popen(waits, start_new_session=True)
    if given.command == "record":
        write_record(given.output, settings)
        return 14 if settings.get("verdict") == "REJECT" else 0
    if settings.get("writes") != "nothing":
        work(given, settings)
    if not settings.get("gate", 0) <= 1:  # as every command does: what was written stays, and the exit code says it
        error = {"type": "GateFailedError", "exit_code": 14, "what": "its gate failed", "why": "asked to", "fix": "x"}
        print(json.dumps({"error": error}))
        return 14
    return 0


def write_record(output: Path, settings: dict) -> None:
    """A sound record, or what `writes` asks for instead."""
    gate = Gate(name="own", value=0).model_dump(mode="json")
    record = {
        "schema_version": 3, "manifest_digest": open_artifact(settings["reads"]).digest, "versions": {"engine": "1"},
        "verdict": settings.get("verdict", "ACCEPT"), "gates": [gate], "reasons": [], "figures": {"speed": 9.0},
    }  # fmt: skip
    writes = settings.get("writes")
    if writes == "no verdict":
        del record["verdict"]
    if writes == "nothing":
        return
    text = "{not JSON" if writes == "no JSON" else json.dumps(record)
    if writes == "a list":
        text = "[]"
    write_checked(output, text)
    if writes == "a byte more":
        output.write_text(text + " ")
    if writes == "no checksum":
        output.with_suffix(".sha256").unlink()


def work(given: argparse.Namespace, settings: dict) -> None:
    with ArtifactWriter(given.output, kind="work", stage="work", force=given.force, resume=given.resume) as writer:
        checkpoints = writer.root / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        done = sorted(checkpoints.glob("step-*"))
        state = done[-1].read_text() if done else ""
        for step in range(len(done), settings.get("steps", 1)):
            state = hashlib.sha256(f"{state} {step} {settings.get('value')}".encode()).hexdigest()
            time.sleep(settings.get("seconds", 0.0))
            while not Path(settings.get("waits_for", ".")).exists():
                time.sleep(0.02)
            partial = checkpoints / ".new"
            partial.write_text(state)
            partial.rename(checkpoints / f"step-{step:04d}")
        parents = []
        if settings.get("reads"):
            parent = open_artifact(settings["reads"])
            state += parent.content
            parents = [parent.as_parent()]
        (writer.root / "weights.txt").write_text(state)
        (writer.root / "metrics.jsonl").write_text(f"{time.time()}\n")
        if "gate" in settings:
            writer.gate(Gate(name="own", value=settings["gate"], comparison="at most", threshold=1))
        writer.commit(
            config={"value": settings.get("value")}, parents=parents, exclude=["checkpoints"],
            volatile=["metrics.jsonl"], details=WorkDetails(score=settings.get("score", 1.0), resumed=len(done)),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
