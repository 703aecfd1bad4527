"""What the server of `ranks` imports for tests of vision models, once for all processes."""

from __future__ import annotations

import vit_families  # noqa: F401

import pipeline.vit.stage  # noqa: F401
from fp8pipe.models.compat import import_timm

import_timm()
