"""Artifacts: what is opened is what was written, and nothing finished is ever lost."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_artifacts import E4M3, SHARD, details_of, write

from fp8pipe.artifact import (
    SCHEMA_VERSION,
    ArtifactWriter,
    FileEntry,
    Gate,
    LayerRecord,
    Manifest,
    NumberFormat,
    Parent,
    check_file,
    open_artifact,
    staged,
    write_checked,
)
from fp8pipe.artifact.kinds import Details
from fp8pipe.core.errors import BadArtifactError, ConfigurationError


def test_what_is_opened_is_what_was_written(tmp_path):
    fields = {
        "config": {"steps": 3, "path": "x"},
        "seed": 5,
        "parents": [Parent(kind="model", digest="ab", path="/m")],
        "number_format": NumberFormat(name="e4m3", granularity="per-tensor"),
        "layers": [LayerRecord(name="l.0", weight=E4M3, shape=(4, 2))],
        "runtime": {"ratio": math.inf},
        "versions": {"thing": "1"},
    }
    written = write(tmp_path / "a", **fields)
    opened = open_artifact(tmp_path / "a", kind="falqon")
    assert opened.digest == written.digest
    manifest = opened.manifest
    assert [entry.path for entry in manifest.files] == ["config.json", SHARD, "nested/a.txt"]
    for entry in manifest.files:
        data = (opened.root / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (manifest.seed, manifest.config["steps"], manifest.versions["thing"]) == (5, 3, "1")
    assert manifest.versions["torch"] == torch.__version__
    assert manifest.number_format.scale_direction == "dequantized = code * scale"
    assert manifest.layers[0].shape == (4, 2)
    assert opened.size_bytes == sum(entry.size for entry in manifest.files)
    assert opened.as_parent().digest == opened.digest
    assert not (tmp_path / "a.partial").exists()
    assert not (tmp_path / "a" / ".lock").exists()


def test_the_manifest_is_the_documented_canonical_digest(tmp_path):
    written = write(tmp_path / "a")
    data = json.loads((tmp_path / "a" / "manifest.json").read_text())
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert written.digest == hashlib.sha256(canonical).hexdigest()


def test_warnings_and_gates_reach_the_manifest_even_nan(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        writer.warn("fell back")
        writer.warn("fell back")
        writer.gate(Gate(name="loss", value=math.nan, comparison="at most", threshold=1.0))
        writer.commit(details=details_of("falqon"))
    manifest = open_artifact(tmp_path / "a").manifest
    assert manifest.warnings == ["fell back"]
    assert math.isnan(manifest.gates[0].value)
    assert not manifest.gates[0].passed


def test_a_flipped_bit_names_the_file_and_both_digests(tmp_path):
    written = write(tmp_path / "a")
    path = tmp_path / "a" / SHARD
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    old = next(entry.sha256 for entry in written.manifest.files if entry.path == SHARD)
    with pytest.raises(BadArtifactError) as caught:
        open_artifact(tmp_path / "a")
    text = str(caught.value)
    assert SHARD in text
    assert old in text
    assert hashlib.sha256(data).hexdigest() in text
    # The size is right, so without hashing it passes: that is what verify is for.
    open_artifact(tmp_path / "a", verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_and_truncated_files_are_all_named(tmp_path, verify):
    write(tmp_path / "a")
    (tmp_path / "a" / SHARD).unlink()
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(BadArtifactError, match=r"2 finding\(s\)(.|\n)*config\.json has 1 bytes") as caught:
        open_artifact(tmp_path / "a", verify=verify)
    assert f"{SHARD} is missing" in str(caught.value)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"other")])
def test_files_of_a_cache_may_be_missing_or_differ_and_no_others(tmp_path, spoil):
    root = write(tmp_path / "a").root
    spoil(root / "nested" / "a.txt")
    opened = open_artifact(root, caches="nested")
    entry = next(entry for entry in opened.manifest.files if entry.path == "nested/a.txt")
    assert "nested/a.txt" in check_file(root, entry)
    with pytest.raises(BadArtifactError, match=r"nested/a\.txt"):
        open_artifact(root)
    with pytest.raises(BadArtifactError, match=r"nested/a\.txt"):
        open_artifact(root, caches="nest")
    spoil(root / SHARD)
    with pytest.raises(BadArtifactError, match=r"1 finding\(s\), 3 file\(s\) listed"):
        open_artifact(root, caches="nested")


@pytest.mark.parametrize("name", ["extra.safetensors", "nested/b.txt", "new/deep/c.bin", ".cache/mine", ".hidden"])
@pytest.mark.parametrize("options", [{}, {"verify": False}, {"caches": "nested"}])
def test_an_unlisted_file_is_an_error_for_every_reader(tmp_path, name, options):
    root = write(tmp_path / "a").root
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"")
    with pytest.raises(BadArtifactError, match=rf"{re.escape(name)} is not listed in the manifest"):
        open_artifact(root, **options)


@pytest.mark.parametrize("name", ["nested", "nested/a.txt", "config.json", "new"])
def test_a_link_is_an_error_wherever_it_leads(tmp_path, name):
    root = write(tmp_path / "a").root
    if (root / name).exists():
        (root / name).rename(tmp_path / "outside")
    else:
        (tmp_path / "outside").mkdir()
    (root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BadArtifactError, match=f"{name} is a link"):
        open_artifact(root, verify=False)


def test_what_a_hub_adds_by_itself_is_passed_over_and_reaches_no_engine(tmp_path):
    root = write(tmp_path / "a").root
    (root / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (root / ".cache" / "huggingface" / "download" / "model.safetensors.lock").write_bytes(b"")
    (root / ".gitattributes").write_text("*.safetensors filter=lfs")
    artifact = open_artifact(root)
    with staged(artifact) as place:
        found = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        assert found == sorted(entry.path for entry in artifact.manifest.files)
        assert all((place / name).read_bytes() == (root / name).read_bytes() for name in found)
        assert place.name == root.name
        assert place.parent.stat().st_mode & 0o77 == 0
    assert not place.exists()


def change_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    write_checked(path, json.dumps(json.loads(path.read_text()) | changes))


def test_a_newer_schema_is_refused_naming_both_versions(tmp_path):
    write(tmp_path / "a")
    change_manifest(tmp_path / "a", schema_version=SCHEMA_VERSION + 1, something_new={})
    both = f"is {SCHEMA_VERSION + 1}; this fp8pipe reads up to {SCHEMA_VERSION}"
    with pytest.raises(BadArtifactError, match=both):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize(
    "changes", [{"unknown": 1}, {"seed": "x"}, {"files": [{"path": "../up", "size": 1, "sha256": "0" * 64}]}]
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, changes):
    write(tmp_path / "a")
    change_manifest(tmp_path / "a", **changes)
    with pytest.raises(BadArtifactError, match=next(iter(changes))):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, text):
    write(tmp_path / "a")
    write_checked(tmp_path / "a" / "manifest.json", text)
    with pytest.raises(BadArtifactError, match="not a valid manifest"):
        open_artifact(tmp_path / "a")


def test_a_kind_is_opened_unless_another_was_asked_for_and_an_unknown_one_is_refused(tmp_path, plain_kind):
    with ArtifactWriter(tmp_path / "a", kind=plain_kind, stage="x") as writer:
        writer.commit(details=Details())
    assert open_artifact(tmp_path / "a").kind == "plain"
    with pytest.raises(BadArtifactError, match="'plain'; expected 'falqon' or 'lora-merged'"):
        open_artifact(tmp_path / "a", kind=["falqon", "lora-merged"])
    change_manifest(tmp_path / "a", kind="from-the-future")
    with pytest.raises(BadArtifactError, match=r"manifest\.json is of unknown kind 'from-the-future'"):
        open_artifact(tmp_path / "a")
    write(tmp_path / "b")
    with pytest.raises(BadArtifactError) as caught:
        open_artifact(tmp_path / "b", kind="vllm-export")
    assert f"fp8pipe export {tmp_path / 'b'} --target vllm --output DIR" in caught.value.fix


def test_unfinished_runs_are_not_opened(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (writer.root / "w.bin").write_bytes(b"half")
    with pytest.raises(BadArtifactError, match=r"unfinished: .*a\.partial"):
        open_artifact(tmp_path / "a")
    with pytest.raises(BadArtifactError, match="is unfinished"):
        open_artifact(tmp_path / "a.partial")
    with pytest.raises(BadArtifactError, match=r"holds no manifest\.json"):
        open_artifact(tmp_path)
    with pytest.raises(BadArtifactError, match="no such directory"):
        open_artifact(tmp_path / "nowhere")


def test_a_directory_of_artifacts_names_them(tmp_path):
    """A run's directory, given where one of its artifacts is meant."""
    for name in ("b", "a"):
        write(tmp_path / "run" / name)
    with pytest.raises(BadArtifactError) as found:
        open_artifact(tmp_path / "run")
    assert found.value.fix == f"give one of them: {tmp_path / 'run' / 'a'}, {tmp_path / 'run' / 'b'}"


def test_an_existing_artifact_is_kept_without_force(tmp_path):
    first = write(tmp_path / "a")
    with pytest.raises(ConfigurationError, match="exists already"):
        write(tmp_path / "a")
    assert open_artifact(tmp_path / "a").digest == first.digest


def test_force_replaces_only_at_the_end(tmp_path):
    first = write(tmp_path / "a", content=b"old")
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune", force=True) as writer:
        (writer.root / "w.bin").write_bytes(b"new")
        # The old one is whole until the last rename.
        assert open_artifact(tmp_path / "a").digest == first.digest
        writer.commit(details=details_of("falqon"))
    assert [entry.path for entry in open_artifact(tmp_path / "a").manifest.files] == ["w.bin"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_force_never_replaces_what_is_no_artifact(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match="not an artifact"):
        write(tmp_path / "home", force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (tmp_path / "a").mkdir()
        with pytest.raises(ConfigurationError, match="exists already"):
            writer.commit(details=details_of("falqon"))
    assert (tmp_path / "a.partial").is_dir()


def start(output: Path, **options: bool) -> ArtifactWriter:
    return ArtifactWriter(output, kind="falqon", stage="finetune", **options)


def test_leftovers_without_a_checkpoint_are_replaced(tmp_path):
    (start(tmp_path / "a").root / "stale.bin").write_bytes(b"stale")
    writer = start(tmp_path / "a")
    assert not writer.resumed
    assert [entry.path for entry in writer.commit(details=details_of("falqon")).manifest.files] == []


def test_a_resumable_run_is_thrown_away_only_when_asked(tmp_path):
    checkpoint = start(tmp_path / "a").root / "checkpoint-10"
    checkpoint.mkdir()
    with pytest.raises(ConfigurationError, match="can be resumed"):
        start(tmp_path / "a")
    resumed = start(tmp_path / "a", resume=True)
    assert resumed.resumed
    assert checkpoint.is_dir()
    forced = start(tmp_path / "a", force=True)
    assert not forced.resumed
    assert not checkpoint.exists()
    assert not start(tmp_path / "new", resume=True).resumed


def test_excluded_names_do_not_reach_the_artifact(tmp_path):
    writer = start(tmp_path / "a")
    (writer.root / "checkpoint").mkdir()
    (writer.root / "checkpoint" / "state.safetensors").write_bytes(b"x")
    (writer.root / "w.bin").write_bytes(b"y")
    artifact = writer.commit(details=details_of("falqon"), exclude=["checkpoint", "never-there"])
    assert sorted(path.name for path in artifact.root.iterdir()) == ["manifest.json", "manifest.sha256", "w.bin"]


def test_links_are_refused(tmp_path):
    writer = start(tmp_path / "a")
    (writer.root / "w.bin").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadArtifactError, match=r"w\.bin is not a plain file"):
        writer.commit(details=details_of("falqon"))
    assert not (tmp_path / "a").exists()


def test_discard_removes_what_was_begun(tmp_path):
    start(tmp_path / "a").discard()
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys; from fp8pipe.artifact import ArtifactWriter\n"
        "w = ArtifactWriter(sys.argv[1], kind='falqon', stage='x'); print('held', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigurationError, match="another process is writing"):
            start(tmp_path / "a")
        other.stdin.close()
    start(tmp_path / "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_a_configuration_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        start(tmp_path / "a")


def test_an_output_below_a_file_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        start(tmp_path / "file" / "a")


def test_paths_in_a_manifest_stay_inside():
    for path in ("/etc/passwd", "../up", "a/../../up", "a\\b", ""):
        with pytest.raises(ValueError, match="relative path inside"):
            FileEntry(path=path, size=0, sha256="0" * 64)


def test_the_digest_covers_every_field():
    fields = {"kind": "falqon", "stage": "s", "created": "now", "tool_version": "0", "details": details_of("falqon")}
    base = Manifest(**fields)
    assert base.digest == Manifest(**fields).digest
    changes = [{"kind": "x"}, {"seed": 1}, {"warnings": ["w"]}, {"details": details_of("falqon", rank=1)}]
    assert len({base.model_copy(update=change).digest for change in changes} | {base.digest}) == 5
