"""The writer does not believe what it has written, and what is on the way to the disk is waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small_artifacts import SHARD, details_of, write

import fp8pipe.artifact.writer as writing
from fp8pipe.artifact import Artifact, ArtifactWriter, open_artifact
from fp8pipe.core.errors import BadArtifactError, ConfigurationError


@pytest.mark.parametrize("name", [SHARD, "config.json", "nested/a.txt"])
def test_what_changes_between_hashing_and_renaming_is_found(tmp_path, monkeypatch, name):
    real = writing.write_checked

    def spoil(path: Path, text: str) -> Path:
        data = bytearray((path.parent / name).read_bytes())
        data[-1] ^= 1
        (path.parent / name).write_bytes(data)
        return real(path, text)

    monkeypatch.setattr(writing, "write_checked", spoil)
    with pytest.raises(BadArtifactError, match=f"{name} has sha256"):
        write(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_manifest_that_is_read_back_as_another_is_found(tmp_path, monkeypatch):
    other = write(tmp_path / "other", seed=1)
    monkeypatch.setattr(writing, "read_artifact", lambda root, **_: Artifact(root, other.manifest))
    with pytest.raises(BadArtifactError, match="was not read back as written"):
        write(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_replacement_that_fails_leaves_the_old_artifact(tmp_path, monkeypatch):
    first = write(tmp_path / "a", content=b"old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "a.partial":
            raise OSError("the disk said no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="the disk said no"):
        write(tmp_path / "a", content=b"new", force=True)
    assert open_artifact(tmp_path / "a").digest == first.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.partial"]


def test_names_or_folders_may_be_volatile_and_what_begins_alike_is_not(tmp_path):
    entries = write(tmp_path / "a", volatile=["nested", "config"]).manifest.files
    assert {entry.path: entry.volatile for entry in entries} == {
        "config.json": False, SHARD: False, "nested/a.txt": True,
    }  # fmt: skip
    entries = write(tmp_path / "b", volatile=["config.json"]).manifest.files
    assert [entry.path for entry in entries if entry.volatile] == ["config.json"]


def test_volatile_bytes_count_for_the_digest_and_not_for_the_content(tmp_path):
    one, two = (write(tmp_path / name, content=name.encode(), volatile=["nested"]) for name in "ab")
    assert one.digest != two.digest
    assert one.content == two.content
    assert write(tmp_path / "c", content=b"c").content != write(tmp_path / "d", content=b"d").content


def test_every_file_and_folder_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    synced: list[str] = []
    real, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/"))
        real(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        synced.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    write(tmp_path / "a")
    before, after = synced[: synced.index("renamed")], synced[synced.index("renamed") :]
    inside = ("config.json", SHARD, "nested", "nested/a.txt", "manifest.json.partial", "manifest.sha256.partial")
    assert {f"a.partial/{name}" for name in inside} | {"a.partial"} <= set(before)
    assert after == ["renamed", str(tmp_path)]


def test_files_are_as_readable_as_others(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    with ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune") as writer:
        (writer.root / "w.bin").write_bytes(b"x")
        (writer.root / "w.bin").chmod(0o600)
        root = writer.commit(details=details_of("falqon")).root
    assert (root / "w.bin").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("target", ["file", "folder", "nothing"])
def test_a_link_is_refused_whatever_it_points_to(tmp_path, target):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    writer = ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune")
    (writer.root / "link").symlink_to(tmp_path / target)
    with pytest.raises(BadArtifactError, match="link is not a plain file"):
        writer.commit(details=details_of("falqon"))


def test_what_is_gone_already_may_be_discarded(tmp_path):
    writer = ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune")
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [PermissionError, NotADirectoryError, FileExistsError])
def test_a_place_that_cannot_be_written_to_is_the_user_s_to_change(tmp_path, monkeypatch, error):
    def refuse(*given, **named):
        raise error(13, "not here", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ConfigurationError, match="cannot be written"),
        ArtifactWriter(tmp_path / "a", kind="falqon", stage="finetune"),
    ):
        pass


def test_force_replaces_no_file_and_nothing_through_a_link(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(write(tmp_path / "real").root)
    for name in ("file", "link"):
        with pytest.raises(ConfigurationError, match="is not an artifact, and is not replaced"):
            write(tmp_path / name, force=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert open_artifact(tmp_path / "real").manifest.kind


@pytest.mark.parametrize("inside", ["sub", "nested/deep/sub", "../link/sub"])
def test_no_output_may_lie_inside_an_artifact(tmp_path, inside):
    parent = write(tmp_path / "parent")
    (tmp_path / "link").symlink_to(parent.root)
    for force in (False, True):
        with pytest.raises(ConfigurationError, match="lies inside the artifact") as error:
            write(parent.root / inside, force=force)
        assert error.value.exit_code == 10
    assert open_artifact(parent.root, verify=True).digest == parent.digest
    (tmp_path / "manifest.json").write_text("{}")  # of something else
    assert write(tmp_path / "beside").manifest.kind


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}], ids=str)
def test_nothing_is_written_or_removed_through_a_link_in_the_place_of_the_unfinished_run(tmp_path, options):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    writing.partial_of(tmp_path / "out").symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigurationError, match="in the way"):
        ArtifactWriter(tmp_path / "out", kind="falqon", stage="finetune", **options)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
