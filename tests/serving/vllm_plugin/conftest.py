"""The plugin's modules that need only torch are imported here, those that need vLLM in its own environment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporters.vllm.environment import find_vllm_python
from fp8pipe.core.errors import MissingCapabilityError
from validation.vllm.launcher import in_process

_FOLDER = str(Path(__file__).resolve().parents[3] / "serving" / "vllm_plugin")
if _FOLDER not in sys.path:
    sys.path.insert(0, _FOLDER)


@pytest.fixture
def in_vllm() -> Callable[..., Any]:
    """`in_vllm(script, **environment)` runs a script with vLLM's Python and this plugin; returns the JSON it prints."""
    try:
        python = find_vllm_python()
    except MissingCapabilityError as error:
        pytest.skip(str(error))

    def run(script: str, **environment: str) -> Any:
        variables = {**in_process(), "PYTHONPATH": _FOLDER, **environment}
        command = [str(python), "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
