"""The parts of `scripts/gpu_session.py`: what is measured on a GPU, one module each."""

from __future__ import annotations

import time
from typing import Final

BEGAN: Final = time.monotonic()  # before anything large is imported: that is part of the time that --minutes gives
