"""Export to TensorRT: strongly typed Q/DQ graphs from an artifact's own codes, engines, and the truth about both."""

from exporters.tensorrt.engine_cache import EngineSource, ReadyEngine, ready_engine
from exporters.tensorrt.export import EXPORT_KIND, export_tensorrt
from exporters.tensorrt.options import Base, Builder, TrtExportOptions
from exporters.tensorrt.targets import plan_targets

__all__ = [
    "EXPORT_KIND",
    "Base",
    "Builder",
    "EngineSource",
    "ReadyEngine",
    "TrtExportOptions",
    "export_tensorrt",
    "plan_targets",
    "ready_engine",
]
