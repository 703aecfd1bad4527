"""Export to vLLM: an artifact in, a compressed-tensors checkpoint out, compared bit for bit."""

from exporters.findings import Finding, LintFindingsError
from exporters.vllm.export import EXPORT_KIND, export_vllm, plan_export, plan_warnings
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ExportPlan
from exporters.vllm.read import iter_shards, iter_weights, load_torch_model
from exporters.vllm.rehearse import rehearse_export

__all__ = [
    "EXPORT_KIND",
    "ExportFormat",
    "ExportPlan",
    "Finding",
    "LintFindingsError",
    "VllmExportOptions",
    "export_vllm",
    "iter_shards",
    "iter_weights",
    "load_torch_model",
    "plan_export",
    "plan_warnings",
    "rehearse_export",
]
