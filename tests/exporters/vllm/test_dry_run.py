"""The dry run goes through the whole export with a few rows of each kind of tensor, whatever the source stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from reference_checkpoints import write_native
from tiny_checkpoints import make_model, write_plain
from trained_exports import write_trained

from exporters.vllm import dry_run
from exporters.vllm.export import export_vllm, plan_export
from exporters.vllm.options import ExportFormat, VllmExportOptions

SOURCES: dict[str, Callable[[Path], Path]] = {
    "bf16": lambda root: write_plain(root / "plain", make_model()),
    "codes with a scale per tensor": lambda root: write_trained(root / "tuned", write_plain(root / "p", make_model())),
    "codes in blocks": lambda root: write_native(root / "native", make_model()),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_part_of_each_kind_of_tensor_is_exported_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    base = SOURCES[source](tmp_path)
    monkeypatch.setattr(dry_run, "_ROWS_BYTES", 1 << 16)  # 128 of the 512 rows of a projection in bf16
    for format in (ExportFormat.FP8, ExportFormat.BF16):
        options = VllmExportOptions(format=format)
        plan = plan_export(base, options)
        parts = [(unit, dry_run._some_rows(unit)) for unit in plan.units]
        assert any(part.entry.shape[0] == 128 < unit.entry.shape[0] for unit, part in parts)
        assert all(part.entry.shape[1:] == unit.entry.shape[1:] for unit, part in parts)
        _, shown = dry_run.plan_vllm(base, tmp_path / "export", options)
        assert shown.seconds > 0
        export = export_vllm(base, tmp_path / f"export-{format}", options)
        assert shown.output_bytes == pytest.approx(export.size_bytes, rel=0.02)


def test_a_weight_stored_as_in_out_is_one_block_and_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_ROWS_BYTES", 1 << 16)
    plan = plan_export(write_plain(tmp_path / "plain", make_model()), VllmExportOptions())
    unit = max(plan.units, key=lambda unit: unit.entry.shape[0])
    assert dry_run._some_rows(unit) is not unit
    transposed = replace(unit, transposed=True)
    assert dry_run._some_rows(transposed) is transposed
