"""Makes this folder's helpers importable, and one tiny export for all its tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).resolve().parent
for _folder in (_HERE, _HERE.parent):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real FP8 export."""
    from tiny_checkpoints import make_model, write_plain

    from exporters.vllm.export import export_vllm
    from exporters.vllm.options import ExportFormat, VllmExportOptions

    root = tmp_path_factory.mktemp("language")
    export_vllm(write_plain(root / "plain", make_model()), root / "tiny", VllmExportOptions(format=ExportFormat.FP8))
    return root / "tiny"
