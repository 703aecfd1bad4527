"""Makes this folder's helper modules importable, and holds torch to one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test modules are imported one by one (importlib mode), so a folder's helpers are not on the path of themselves.
# The plugin's folder: its torch-only modules are tested here without vLLM.
_HERE = Path(__file__).resolve().parent
for _folder in (_HERE, _HERE.parents[1] / "serving" / "vllm_plugin"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


@pytest.fixture(autouse=True, scope="session")
def _single_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
