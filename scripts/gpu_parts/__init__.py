"""The parts of `scripts/gpu_session.py`: each module measures one aspect of the project on a GPU."""

from __future__ import annotations

import time
from typing import Final

BEGAN: Final = time.monotonic()  # taken before the large imports, since --minutes includes their time
