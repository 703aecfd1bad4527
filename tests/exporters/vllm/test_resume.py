"""An export that was cut at any moment goes on, and ends as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.resume import PROGRESS_NAME
from fp8pipe.core import progress as trackers
from fp8pipe.core.errors import GateFailedError

OPTIONS = VllmExportOptions(max_shard_bytes=30_000)


class _CutError(Exception):
    """As a signal would end it."""


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the next export once so many units were written or compared."""

    def cut(units: int) -> None:
        seen = []

        def advance(self: trackers.Tracker, n: int = 1, **fields: object) -> None:
            seen.append(n)
            if len(seen) == units:
                monkeypatch.undo()
                raise _CutError

        monkeypatch.setattr(trackers.Tracker, "advance", advance)

    return cut


def files_of(root: Path) -> dict[str, tuple[int, bytes]]:
    """When every file of weights was written, and its bytes."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(root.glob("*.safetensors"))}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.49, 0.51, 0.99])
def test_a_cut_export_goes_on(share: float, llama: Path, tmp_path: Path, cut_at: Callable[[int], None]) -> None:
    whole = export_vllm(llama, tmp_path / "whole", OPTIONS)
    steps = 2 * 21  # units, written and compared
    cut_at(1 + int(share * steps))
    with pytest.raises(_CutError):
        export_vllm(llama, tmp_path / "cut", OPTIONS)
    partial = tmp_path / "cut.partial"
    noted = (partial / PROGRESS_NAME).read_text() if share > 0.1 else ""
    kept = {name: found for name, found in files_of(partial).items() if name in noted}
    assert len(kept) == len(files_of(whole.root)) or share < 0.5
    again = export_vllm(llama, tmp_path / "cut", OPTIONS)
    assert again.content == whole.content
    assert [f.sha256 for f in again.manifest.files if not f.volatile] == [
        f.sha256 for f in whole.manifest.files if not f.volatile
    ]
    assert not (again.root / PROGRESS_NAME).exists()
    assert kept.items() <= files_of(again.root).items()  # not written again
    assert kept or share < 0.1


def test_what_another_source_left_is_not_kept(
    llama: Path, make_model: Callable[..., Path], tmp_path: Path, cut_at: Callable[[int], None]
) -> None:
    cut_at(30)
    with pytest.raises(_CutError):
        export_vllm(llama, tmp_path / "export", OPTIONS)
    before = files_of(tmp_path / "export.partial")
    other = make_model("llama", seed=7)
    export = export_vllm(other, tmp_path / "export", OPTIONS)
    assert not before.items() & files_of(export.root).items()
    assert export.content == export_vllm(other, tmp_path / "alone", OPTIONS).content


def test_a_kept_shard_that_is_damaged_is_refused_once(
    llama: Path, tmp_path: Path, cut_at: Callable[[int], None]
) -> None:
    cut_at(30)
    with pytest.raises(_CutError):
        export_vllm(llama, tmp_path / "export", OPTIONS)
    shard = next((tmp_path / "export.partial").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(GateFailedError, match="differs from its source"):
        export_vllm(llama, tmp_path / "export", OPTIONS)
    export_vllm(llama, tmp_path / "export", OPTIONS)  # all of it written anew
