"""The plugin's modules that need only torch are imported here, those that need vLLM in its own environment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from lasting_engines import vllm_fork

from exporters.vllm.environment import find_vllm_python
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.launcher import in_process

_FOLDER = str(Path(__file__).resolve().parents[3] / "serving" / "vllm_plugin")
if _FOLDER not in sys.path:
    sys.path.insert(0, _FOLDER)


@pytest.fixture
def in_vllm(tmp_path: Path) -> Callable[..., Any]:
    """`in_vllm(script, **environment)` runs a script with vLLM's Python and this plugin; returns the JSON it prints."""
    try:
        python = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))

    def run(script: str, **environment: str) -> Any:
        variables = {**in_process(), "PYTHONPATH": _FOLDER, **environment}
        out, err = tmp_path / "out", tmp_path / "err"
        code = vllm_fork(str(python)).run(["-c", script], variables, out, err, 300, Event())
        assert code == 0, err.read_text(encoding="utf-8")[-2000:]
        return json.loads(out.read_text(encoding="utf-8").splitlines()[-1])

    return run
