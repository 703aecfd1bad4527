"""The content digest: the same for a rerun elsewhere and later, another one for anything that was made differently."""

from __future__ import annotations

import pytest
from small_artifacts import details_of

from fp8pipe.artifact import ArtifactWriter, Gate, NumberFormat, Parent

PARENT = Parent(kind="model", digest="feedface" * 8, path="/models/base")


def write(place, weights=b"weights", metrics=b"1.0 s", **changes):
    values = {
        "config": {"steps": 3}, "seed": 1, "parents": [PARENT], "runtime": {"threads": 2},
        "number_format": NumberFormat(name="e4m3", granularity="per-channel"), "seconds": 12.5,
    } | changes  # fmt: skip
    kind = values.pop("kind", "falqon")
    with ArtifactWriter(place, kind=kind, stage="finetune") as writer:
        (writer.root / "model.safetensors").write_bytes(weights)
        (writer.root / "metrics").mkdir()
        (writer.root / "metrics" / "log.jsonl").write_bytes(metrics)
        writer.gate(Gate(name="seconds", value=values.pop("seconds"), comparison="at most", threshold=99))
        return writer.commit(volatile=["metrics"], details=details_of(kind), **values)


def test_times_places_and_measured_figures_are_left_out(tmp_path):
    one = write(tmp_path / "a")
    elsewhere = PARENT.model_copy(update={"path": "/elsewhere"})
    two = write(tmp_path / "b", metrics=b"2.0 s", parents=[elsewhere], seconds=98.0, runtime={"threads": 1})
    assert one.digest != two.digest
    assert one.content == two.content
    assert [entry.volatile for entry in one.manifest.files] == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": b"weightz"},
        {"config": {"steps": 4}},
        {"seed": 2},
        {"kind": "vit"},
        {"number_format": None},
        {"preprocessing": {"mean": [0.5]}},
        {"parents": [PARENT.model_copy(update={"digest": "0" * 64})]},
        {"parents": [PARENT.model_copy(update={"content": "0" * 64})]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_counts(tmp_path, change):
    assert write(tmp_path / "a").content != write(tmp_path / "b", **change).content


def test_a_child_names_its_parent_by_both_digests(tmp_path):
    parent = write(tmp_path / "a")
    child = write(tmp_path / "b", parents=[parent.as_parent()])
    assert child.manifest.parents[0].content == parent.content
    again = write(tmp_path / "c", metrics=b"9 s")
    assert write(tmp_path / "d", parents=[again.as_parent()]).content == child.content


def test_fields_that_later_versions_add_do_not_change_digests(tmp_path):
    """A child knows its parent by digest: a field that the parent's file lacks must not count with its default."""
    import hashlib
    import json

    from fp8pipe.artifact import Manifest

    path = write(tmp_path / "a").root / "manifest.json"
    data = json.loads(path.read_text())
    for entry in data["files"]:
        del entry["volatile"]  # as before that field was there
    for gate in data["gates"]:
        del gate["failure"], gate["source"]
    manifest = Manifest.from_json(json.dumps(data), where="old")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert manifest.digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert manifest.files[0].volatile is False
