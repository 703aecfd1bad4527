"""What an export in ModelOpt's layout may be asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from exporters.tensorrt.language.options import CalibrationOptions
from fp8pipe.core.config import CONFIG_ONLY


class ModeloptExportOptions(CalibrationOptions):
    """Options of one checkpoint: it is served by an engine that builds its own graphs."""

    format: Literal["modelopt-checkpoint"] = Field(
        default="modelopt-checkpoint", description="A checkpoint in ModelOpt's layout"
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")
