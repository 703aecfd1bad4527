"""300 single bits, flipped one at a time anywhere in a tree of artifacts: `verify` finds each and names the file."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.verify import check_bytes, find_tree
from fp8pipe.cli import main
from fp8pipe.core.errors import BadArtifactError

pytestmark = pytest.mark.slow  # the tree takes half a minute to write
FLIPS = 300


def flip(path: Path, place: int) -> bytes:
    """Flip one bit of a file; its bytes before."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[place // 8] ^= 1 << place % 8
    path.write_bytes(flipped)
    return data


def places(root: Path, count: int) -> list[tuple[Path, int]]:
    """One random bit of every file, and the rest uniform over all bytes of the tree."""
    chance = random.Random(20)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sizes = [8 * path.stat().st_size for path in files]
    chosen = [(path, chance.randrange(size)) for path, size in zip(files, sizes, strict=True)]
    drawn = chance.choices(files, weights=sizes, k=count - len(files))
    return chosen + [(path, chance.randrange(8 * path.stat().st_size)) for path in drawn]


def test_300_of_300_flipped_bits_are_found(tree):
    chosen = places(tree, FLIPS)
    assert len(chosen) == FLIPS
    missed = []
    for path, place in chosen:
        data = flip(path, place)
        findings = check_bytes(find_tree(tree)).findings
        # A checksum and its record are held against each other, so either may be the one that is named.
        named = {path.name, path.with_suffix(".json").name}
        places_found = [f for f in findings if named & {Path(f.where).name}]
        if not places_found:
            missed.append((path, place))
        path.write_bytes(data)
    assert missed == []
    assert check_bytes(find_tree(tree)).findings == []


@pytest.mark.parametrize("name", ["vllm/manifest.json", "onnx.validation.json", "run.sha256", "trt/model.onnx"])
def test_the_command_finds_them_too(tree, name):
    path = tree / name
    flip(path, 4 * path.stat().st_size)
    ended = CliRunner().invoke(main, ["verify", "--quick", str(tree)])
    assert ended.exit_code == 12, ended.output
    assert path.with_suffix(".json").name in ended.stderr or path.name in ended.stderr


def test_an_artifact_alone_is_enough(tree):
    """No child and no run's record is there to know the manifest's digest."""
    for name in ("manifest.json", "manifest.sha256"):
        data = flip(tree / "vllm" / name, 2000 if name.endswith("json") else 100)
        with pytest.raises(BadArtifactError, match=r"manifest\.json has sha256"):
            open_artifact(tree / "vllm", verify=False)
        ended = CliRunner().invoke(main, ["verify", "--quick", str(tree / "vllm")])
        assert ended.exit_code == 12
        (tree / "vllm" / name).write_bytes(data)
