"""Puts the plugin's folder on the path: its modules that need torch alone are tested here, without vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).resolve().parents[3] / "serving" / "vllm_plugin")
if _FOLDER not in sys.path:
    sys.path.insert(0, _FOLDER)
