"""Export to ONNX: a quantized vision model in, a graph out whose numbers are the artifact's, bit for bit."""

from exporters.onnx.export import CLASSES_FILE, EXPORT_KIND, MODEL_FILE, OnnxPlan, export_onnx, plan_export
from exporters.onnx.options import OnnxExportOptions, OnnxFormat

__all__ = [
    "CLASSES_FILE",
    "EXPORT_KIND",
    "MODEL_FILE",
    "OnnxExportOptions",
    "OnnxFormat",
    "OnnxPlan",
    "export_onnx",
    "plan_export",
]
